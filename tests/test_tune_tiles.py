"""bench.tune's rows of tiles, without a GPU: a clock that reads planted times, and the gates as
they are."""

from functools import cache

import pytest
import torch

from bench import tune_tiles
from lora_kernels import use_backend, weight_norm
from lora_kernels.ops import missing_backends, tuning
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.launch import recorded
from lora_kernels.ops.tables import tiles
from lora_kernels.ops.tables.tiles import Row, Tile, TileRequest
from lora_kernels.ptxsim import device
from lora_kernels.testing.gates.launched import refusal
from lora_kernels.testing.gates.sass import missing
from tests.ops.interpreted import deterministic, interpreted

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

BF16 = torch.bfloat16
FEW = Problem("forward", 16, 64, (64,), (4,), BF16)
ANSWERS = {"dtype": BF16, "m": 16, "k": 64, "n": 64, "layers": 1, "two_sums": False, "one_pass": True, "mapped": False}


def proposed(folder, words, refuse=lambda one: None):
    def clock(calls):
        return {name: 1e-6 if words in name else 2e-6 for name in calls}

    with interpreted(90), deterministic(False):
        return tune_tiles.propose(
            [FEW], 90, lambda p: tuning.candidate_calls(p, "cpu"), clock, refuse, folder, "measured on a GPU"
        )


def test_a_faster_tile_becomes_the_first_row(tmp_path, monkeypatch):
    (new,) = proposed(tmp_path, "2 stages")
    assert new.conditions["arch"] == "90" and new.conditions["deterministic"] is False and new.why == "measured on a GPU"
    assert new.conditions["m"] == "16" and new.numbers["stages"] == 2
    before, kernels = tiles.read(), tiles.read(tmp_path / "tiles.json")
    assert kernels["forward"].rows == (new, *before["forward"].rows)
    assert {name: kernel for name, kernel in kernels.items() if name != "forward"} == {
        name: kernel for name, kernel in before.items() if name != "forward"
    }
    usual = tiles.tile("forward", 90, **ANSWERS)
    monkeypatch.setattr(tiles, "read", lambda: kernels)
    monkeypatch.setattr(tiles, "_found", {})
    assert tiles.tile("forward", 90, **ANSWERS).stages == 2 != usual.stages
    for other in ({"m": 17}, {"k": 129}, {"dtype": torch.float16}, {"one_pass": False}):
        assert tiles.tile("forward", 90, **ANSWERS | other).stages == 3, other
    assert tiles.tile("forward", 89, **ANSWERS) == usual
    with device(90), deterministic(True):  # bits of a row must not depend on m
        assert tiles.tile("forward", torch.empty(1), **ANSWERS) == usual


def test_a_second_measurement_takes_the_place_of_the_first(tmp_path, monkeypatch):
    proposed(tmp_path, "2 stages")
    kernels = tiles.read(tmp_path / "tiles.json")
    monkeypatch.setattr(tiles, "read", cache(lambda: kernels))
    monkeypatch.setattr(tiles, "_found", {})
    (new,) = proposed(tmp_path, "3 stages")
    monkeypatch.undo()
    tiles.forget()
    assert tiles.read(tmp_path / "tiles.json")["forward"].rows == (new, *tiles.read()["forward"].rows)


@pytest.mark.parametrize(("words", "refuse"), [("nothing", lambda one: None), ("2 stages", lambda one: "spills")])
def test_nothing_is_written_where_no_tile_is_faster_and_passes(tmp_path, words, refuse):
    assert proposed(tmp_path, words, refuse) == [] and not list(tmp_path.iterdir())


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize(("other", "wrong"), [
    ({}, None), ({"rows": 128, "depth": 256, "warps": 4}, "spills: "), ({"depth": 256, "stages": 8}, "shared memory: "),
])  # fmt: skip
def test_the_gates_have_a_say(other, wrong):
    """On sm_90: the shipped tile passes, one with more sums than registers spills, one with more
    stages does not fit."""
    with use_backend("triton", simulate=True), device(90), tiles.seen() as looks, recorded() as found:
        arguments = [torch.empty(s, dtype=BF16) for s in ((4096, 4096), (64, 4096), (4096, 64))]
        weight_norm(*arguments, 0.5)
        (asked,) = looks
        changed = TileRequest("norm", asked.answers, Tile(**{**vars(asked.tile), **other}))
        with tiles.tried(changed):
            weight_norm(*arguments, 0.5)
    said = refusal(found[-1], 90)
    assert (said is None) if wrong is None else wrong in said


def test_a_row_has_all_numbers_and_reads_back():
    t = Tile(rows=64, columns=64, depth=32, ranks=16, warps=4, stages=2, registers=128)
    one = tiles.MeasuredTile("forward", {"dtype": "bfloat16", "m": 256, "layers": 1, "mapped": True}, t, {})
    made = tune_tiles.row(one, 100, "why")
    assert tiles.resolve([made, Row({}, {"rows": 128})], {**one.answers, "arch": 100, "deterministic": False}) == t
    assert tiles.resolve([made, Row({}, {"rows": 128})], {**one.answers, "arch": 90, "deterministic": False}).rows == 128
