"""Which tiles are tried around the table's, which are kept, and where they hold: without a GPU,
with a clock that reads planted times."""

import json

import pytest
import torch

from lora_kernels import explain, lora_linear
from lora_kernels.ops import dispatch, launch, missing_backends, tables, tile_tuning, tuning
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.launch import recorded
from lora_kernels.ops.tables.tiles import Tile
from lora_kernels.testing import make_problem
from tests.ops.interpreted import deterministic, interpreted

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

GPU, BF16 = "Planted GPU 80GB", torch.bfloat16
PLAIN = Problem("forward", 200, 32, (24,), (4,), BF16)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A GPU of a name, simulated, and a cache directory of its own."""
    from lora_kernels.ops.lora_linear import triton as backend

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for place in (launch, backend):
        monkeypatch.setattr(place, "gpu_name", lambda t: GPU)
    dispatch.clear_caches()
    with deterministic(False):
        yield
    dispatch.clear_caches()


def clock_of(words, winner="two launches", timed=None):
    """To it `winner` is the fastest candidate, and a tile whose words have these is the fastest
    tile."""

    def clock(calls):
        if timed is not None:
            timed.append(list(calls))
        return {name: 1e-6 if name == winner else 0.5e-6 if words and words in name else 2e-6 for name in calls}

    return clock


def launched(m=200, k=32, n=24):
    """What a forward of such a layer launches, by our own GEMM."""
    with recorded() as found, dispatch.forced_candidate("two launches"):
        lora_linear(*make_problem(m, k, n, 4, BF16).arguments())
    return {one.name: (one.args["BM"], one.args["BK"], one.warps, one.stages) for one in found}


def test_neighbours_differ_in_one_number():
    t = Tile(rows=128, columns=128, depth=64, ranks=16, warps=8, stages=3)
    found = list(tile_tuning.neighbours(t))
    assert len(found) == len(set(found)) == 10
    for other in found:
        assert sum(getattr(t, name) != getattr(other, name) for name in ("rows", "columns", "depth", "warps", "stages")) == 1
    assert {other.warps for other in found} == {4, 8, 16} and {other.stages for other in found} == {2, 3, 4}
    assert all(other.stages >= 1 for other in tile_tuning.neighbours(Tile(rows=16, stages=1)))


def test_the_fastest_tile_is_kept_and_launched_for_just_that():
    with interpreted(80):
        usual = launched()
        tuning.tune([PLAIN], "cpu", clock=clock_of("8 warps, 4 stages"))
        assert launched()["forward_kernel"] == (128, 64, 8, 4) and usual["forward_kernel"] == (128, 64, 8, 3)
        assert launched()["shrink_kernel"] == usual["shrink_kernel"]
        assert launched(m=129)["forward_kernel"][3] == 4  # 256 rows at most, as 200
        assert {launched(m=64)["forward_kernel"][3], launched(m=257)["forward_kernel"][3], launched(k=40)["forward_kernel"][3],
                launched(n=48)["forward_kernel"][3]} == {3}  # fmt: skip
        with deterministic(True):
            assert launched()["forward_kernel"] == (128, 64, 8, 3)
        kept = tables.user_table(GPU).tiles
    assert [row["kernel"] for row in kept] == ["forward"] and kept[0]["seconds"]["table"] == 2e-6
    assert kept[0]["answers"] | {"m": 256, "k": 32, "n": 32, "dtype": "bfloat16"} == kept[0]["answers"]


def test_explain_says_the_tile():
    arguments = make_problem(200, 32, 24, 4, BF16).arguments()
    with interpreted(80):
        assert "measured here" not in str(explain(lora_linear, *arguments))
        tuning.tune([PLAIN], "cpu", clock=clock_of("8 warps, 4 stages"))
        said = str(explain(lora_linear, *arguments))
    assert "forward: rows 128 × columns 128 × depth 64 × ranks 16, 8 warps, 4 stages, measured here" in said
    assert "won: measured here at m 200" in said


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_kernel_of_the_winner_is_tried_and_gives_the_same(direction):
    """With all numbers of all neighbours: the results are those of the table's tiles, but for the
    order of sums."""
    p, timed = PLAIN._replace(m=20, direction=direction), []
    winner = "two launches" if direction == "forward" else "fused"
    with interpreted(80):
        torch.manual_seed(0)
        call = tuning.candidate_calls(p, "cpu")[winner]
        wanted = [t for t in _flat(call()) if t is not None]
        worst = []

        def clock(calls):
            timed.append(list(calls))
            for run in calls.values():
                found = [t for t in _flat(run()) if t is not None]
                worst.append(max((a - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)))
            return dict.fromkeys(calls, 1.0)

        assert tile_tuning.tune_tiles(winner, call, clock, lambda one: None, 1e18) == []
    assert len(timed) == len(tile_tuning.KERNELS[winner]) and min(map(len, timed)) >= 4
    assert max(worst) < 0.01


def _flat(result):
    return [t for each in result for t in (_flat(each) if isinstance(each, list | tuple) else [each])]


def test_what_is_refused_is_not_timed():
    timed, asked = [], []

    def refuse(one):
        asked.append(one)
        return "spills" if one.warps == 4 or one.stages == 4 else None

    with interpreted(80):
        tuning.tune([PLAIN], "cpu", clock=clock_of("", timed=timed), refuse=refuse)
    tried = [text for calls in timed[1:] for text in calls]
    assert any("16 warps" in text for text in tried) and any("2 stages" in text for text in tried)
    assert not any(" 4 warps" in text and "rows 128 × columns 128" in text for text in tried)
    assert not any("4 stages" in text for text in tried) and {one.name for one in asked} >= {"forward_kernel", "shrink_kernel"}


@pytest.mark.parametrize("arch", [80, 90])
def test_an_unsound_tile_is_not_timed(arch):
    """On sm_90 a register operand of wgmma has no stages: of dx with gain the launch takes one,
    whatever is asked."""
    p = Problem("backward", 200, 128, (128,), (4,), BF16, gain=True)
    timed, names = [], []
    with interpreted(arch):
        call = tuning.candidate_calls(p, "cpu")["fused"]

        def clock(calls):
            timed.append(list(calls))
            return dict.fromkeys(calls, 1.0)

        tile_tuning.tune_tiles("fused", call, clock, lambda one: names.append(one.name), 1e18)
        with recorded() as found:
            call()
    assert next(one.stages for one in found if one.name == "input_gradient_kernel") == (1 if arch == 90 else 4)
    # the thin kernels have none
    of_dx = [text for calls in timed for text in calls if "depth" in text]
    assert bool(of_dx) == ("input_gradient_kernel" in names) == (arch == 80)
    assert "both_sides_kernel" in names and "outer_kernel" in names


def test_a_tile_that_was_found_holds_while_the_next_kernel_is_timed():
    of_forward = []
    with interpreted(80):
        call = tuning.candidate_calls(PLAIN, "cpu")["two launches"]

        def clock(calls):
            with recorded() as found:
                calls["table"]()
            of_forward.append(next(one.stages for one in found if one.name == "forward_kernel"))
            return {name: 0.5 if "depth 64 × ranks 16, 8 warps, 4 stages" in name else 1.0 for name in calls}

        kept = tile_tuning.tune_tiles("two launches", call, clock, lambda one: None, 1e18)
    assert of_forward == [3, 4] and [one.tile.stages for one in kept] == [4]


def test_no_neighbour_is_compiled_when_the_time_is_over(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(tile_tuning.time, "monotonic", lambda: now[0])

    def refuse(one):
        asked.append(one)
        now[0] += 10
        return None

    with interpreted(80):
        call = tuning.candidate_calls(PLAIN, "cpu")["two launches"]
        assert tile_tuning.tune_tiles("two launches", call, lambda calls: dict.fromkeys(calls, 1.0), refuse, 25.0) == []
    assert len(asked) == 3


def test_a_little_faster_is_noise():
    with interpreted(80):
        def clock(calls):
            return {name: 2e-6 if name in ("table", "addmm", "one pass", "cuda") else 1.96e-6 for name in calls}

        tuning.tune([PLAIN], "cpu", clock=clock)
    assert tables.user_table(GPU).choices and not tables.user_table(GPU).tiles


def test_the_time_is_kept(monkeypatch):
    """Tiles are for what the candidates leave of it."""
    now, timed = iter(range(0, 10000, 10)), []
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(now))
    problems = [PLAIN._replace(m=m) for m in (100, 1000)]
    with interpreted(80):
        tuning.tune(problems, "cpu", seconds=25, clock=clock_of("4 stages", timed=timed))
    assert len(timed) == 2 and not tables.user_table(GPU).tiles


def test_in_the_deterministic_mode_no_tile_is_timed():
    timed = []
    with interpreted(80), deterministic(True):
        tuning.tune([PLAIN._replace(m=20, n=(64,), k=64)], "cpu", clock=clock_of("4 stages", timed=timed))
    assert all("table" not in calls for calls in timed) and not tables.user_table(GPU).tiles


def test_a_later_tile_takes_the_place_of_an_older_one_and_choices_stay():
    with interpreted(80):
        tuning.tune([PLAIN], "cpu", clock=clock_of("8 warps, 4 stages"))
        tuning.tune([PLAIN._replace(k=64)], "cpu", clock=clock_of(""))
        assert len(tables.user_table(GPU).tiles) == 1 and len(tables.user_table(GPU).choices) == 2
        tuning.tune([PLAIN], "cpu", clock=clock_of("8 warps, 2 stages"))
        assert launched()["forward_kernel"][3] in (2, 4) and len(tables.user_table(GPU).tiles) == 1


def test_a_file_of_an_older_or_a_later_version_is_read():
    tables.keep_choices(GPU, 80, [tuning.measured_choice(PLAIN, {"addmm": 2e-6, "two launches": 1e-6})])
    path = tables.user_file(GPU)
    found = json.loads(path.read_text())
    assert "tiles" not in found
    path.write_text(json.dumps(found | {"tiles": [], "more": {"of": "later"}}))
    dispatch.clear_caches()
    assert dispatch.choose_plan(PLAIN, 80, gpu=GPU).winner == "two launches"


@pytest.mark.parametrize("row", [
    {"kernel": "forward"}, {"kernel": "forward", "answers": {}, "tile": {"dept": 3}, "seconds": {}},
])  # fmt: skip
def test_tiles_that_are_none_are_left_aside(row):
    tables.keep_choices(GPU, 80, [tuning.measured_choice(PLAIN, {"addmm": 2e-6, "two launches": 1e-6})])
    path = tables.user_file(GPU)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tiles": [row]}))
    dispatch.clear_caches()
    with interpreted(80), pytest.warns(UserWarning, match="its tiles are none .* and are left aside"):
        assert launched()["forward_kernel"] == (128, 64, 8, 3)


def test_words():
    t = Tile(rows=64, columns=64, depth=32, ranks=16, warps=4, stages=2)
    one = tile_tuning.MeasuredTile(
        "forward", {"dtype": "bfloat16", "m": 256, "mapped": False}, t, {"table": 2e-6, str(t): 1e-6}
    )
    (line,) = tile_tuning.words([one])
    assert line == f"forward of dtype bfloat16, m 256: {t} (µs: table 2.0, here 1.0)"
    assert str(t) == "rows 64 × columns 64 × depth 32 × ranks 16, 4 warps, 2 stages"
