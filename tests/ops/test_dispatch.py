"""Which kernel is chosen for a shape: bytes against figures worked out by hand, refusals, tables,
what it says of itself."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.ops import cost, dispatch, tables
from lora_kernels.ops.chips import CHIPS, nearest_architecture, nearest_chip
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.dispatch import choose_plan, forced_candidate, tables_from
from lora_kernels.ops.launch import architecture, multiprocessors
from lora_kernels.ptxsim import device

BF16, F32 = torch.bfloat16, torch.float32
MIB = 2**20


def forward(m=8192, k=4096, n=4096, r=16, dtype=BF16, **flags):
    return Problem("forward", m, k, (n,), (r,), dtype, **flags)


def backward(*args, **flags):
    return forward(*args, **flags)._replace(direction="backward")


def found(p, arch=90, **options):
    return {c.name: c for c in choose_plan(p, arch, **options).candidates}


def megabytes(p):
    return {name: (c.bytes / MIB, c.launches) for name, c in found(p).items()}


problems = st.builds(
    Problem, st.sampled_from(["forward", "backward"]), st.integers(0, 20000), st.integers(1, 30000),
    st.tuples(st.integers(1, 30000)), st.tuples(st.integers(1, 512)), st.sampled_from([BF16, torch.float16, F32]),
    *[st.booleans()] * 4,
)  # fmt: skip


def test_bytes_and_launches_of_a_square_layer():
    # MiB: x, y and dy 64 each, W 32, A, B, dA and dB 1/8 each, h and P 1/2 each (float32)
    shrink, grow = 64 + 1 / 8 + 1 / 2, 64 + 32 + 1 / 2 + 1 / 8 + 64
    expand, gemm = 1 / 2 + 1 / 8 + 64, 64 + 32 + 64
    assert megabytes(forward()) == {
        "two launches": (shrink + grow, 2),
        "one pass": (64 + 32 + 1 / 8 + 1 / 8 + 64, 1),
        "addmm": (shrink + expand + 64 + gemm, 3),
    }
    assert megabytes(forward(gain=True))["addmm"] == (shrink + gemm + 64 + expand, 3)
    dropped = forward(gain=True, dropout=True, drop_base=True)
    assert megabytes(dropped)["addmm"] == (shrink + 64 + gemm + 64 + expand + 64 + gemm, 4)
    b1, b3 = 64 + 1 / 2 + 1 / 8 + 1 / 2 + 1 / 8, 64 + 1 / 2 + 1 / 8
    sums = 1 / 4 + 1 / 8  # of dA's parts
    assert megabytes(backward()) == {
        "fused": (b1 + grow + b3, 3),
        "addmm": (b1 + b3 + expand + 64 + gemm + sums, 5),
    }
    # y, for the gain's gradient
    assert megabytes(backward(gain=True))["fused"][0] == b1 + 64 + grow + b3
    assert megabytes(backward(gain=True))["addmm"] == (b1 + 64 + 64 + b3 + expand + 64 + gemm + sums, 5)
    dropped = dropped._replace(direction="backward")
    assert megabytes(dropped)["addmm"] == (b1 + 64 + 64 + b3 + gemm + 64 + expand + 64 + gemm + sums, 6)


def test_bytes_of_other_shapes():
    # gate of Llama-3-8B: x 64, W 112, y 224, B 7/16
    assert megabytes(forward(n=14336))["two launches"][0] == (64 + 1 / 8 + 1 / 2) + (64 + 112 + 1 / 2 + 7 / 16 + 224)
    # float32, a token: x and y 16 KiB, W 64 MiB, A and B 256 KiB
    assert found(forward(1, dtype=F32))["one pass"].bytes == 2 * 16384 + 64 * MIB + 2 * 262144
    # q, k and v, which share x: 64 once a launch; W 32 + 8 + 8; y 64 + 16 + 16; h 24 ranks; B of
    # each by its own rank
    group = Problem("forward", 8192, 4096, (4096, 1024, 1024), (16, 8, 0), BF16)
    h, b = 8192 * 24 * 4 / MIB, (4096 * 16 + 1024 * 8) * 2 / MIB
    shrink = 64 + 24 * 4096 * 2 / MIB + h
    assert megabytes(group)["two launches"] == (shrink + 64 + 48 + h + b + 96, 2)


def test_times_of_a_square_layer_by_hand():
    on, shares = nearest_chip(90), dict.fromkeys(tables.SHARES, 0.5)
    launches = cost.candidate_launches(forward())["two launches"]
    first, second = (cost.rooflines(step, None, forward(), on, shares) for step in launches)
    assert first["memory"] == pytest.approx(64.625 * MIB / (3.35e12 * 0.5))
    # 64 × 32 tiles on 132 multiprocessors are 16 waves
    flops = 2 * 8192 * 4096 * (4096 + 16)
    assert second["compute"] == pytest.approx(flops / (989e12 * 0.5) * 16 * 132 / 2048)
    times = max(first.values()) + max(second.values())
    assert cost.seconds("two launches", launches, forward(), on, shares) == pytest.approx(times + 2 * 2.5e-6)


def test_what_the_launch_before_left_in_the_cache_costs_no_memory():
    on, shares = nearest_chip(90), dict.fromkeys(tables.SHARES, 1.0)
    for m, warm in ((1024, True), (8192, False)):  # y is 8 MiB of the H100's 50, and 64
        _, gemm, add = cost.candidate_launches(forward(m, gain=True))["addmm"]
        y = m * 4096 * 2
        assert cost.rooflines(add, gemm, forward(m), on, shares)["l2"] == pytest.approx(warm * y / on.l2_rate)
        lines = cost.rooflines(add, gemm, forward(m), on, shares), cost.rooflines(add, None, forward(m), on, shares)
        assert lines[1]["memory"] - lines[0]["memory"] == pytest.approx(warm * y / on.dram)


def test_dropout_is_drawn_where_a_candidate_needs_it():
    def masks(p):
        return {name: [step.masks for step in steps] for name, steps in cost.candidate_launches(p).items()}

    x = 64 * 4096
    drawn = {"two launches": [x, 0], "one pass": [x * 64], "addmm": [x, 0, 0], "cuda": [x, 0], "specialised": [x, 0, 0]}
    assert masks(forward(64, dropout=True)) == drawn
    assert masks(forward(64, dropout=True, drop_base=True))["two launches"] == [x, x * 64]
    # a block of 64 ranks at a time
    assert masks(forward(64, r=65, dropout=True))["two launches"] == [2 * x, 0]
    assert masks(forward(64, dropout=True, drop_base=True))["addmm"] == [x, 0, 0, 0]
    again = {"fused": [0, x, x], "addmm": [0, x, x, 0, 0], "specialised": [0, x, 0, x, 0]}
    assert masks(backward(64, dropout=True)) == again


def test_the_first_launch_hides_where_launches_may_overlap():
    def hidden(arch, m):
        steps, on, shares = (
            cost.candidate_launches(forward(m))["two launches"],
            nearest_chip(arch),
            tables.table_for(arch).efficiencies(True, m),
        )
        # another name: nothing overlaps
        apart = cost.seconds("addmm", steps, forward(m), on, shares)
        return apart - cost.seconds("two launches", steps, forward(m), on, shares)

    assert hidden(90, 16) > 0 and hidden(100, 16) > 0 and hidden(80, 16) == 0 and hidden(90, 65) == 0


@given(problems, st.sampled_from(["m", "k", "n", "r"]), st.sampled_from(sorted(CHIPS)))
def test_more_never_costs_less(p, what, arch):
    size = getattr(p, what)
    more = p._replace(**{what: tuple(2 * each for each in size) if isinstance(size, tuple) else 2 * size})
    on, shares = nearest_chip(arch), tables.table_for(arch).efficiencies(p.is_half, p.m)
    for (name, less), (_, greater) in zip(
        cost.candidate_launches(p).items(), cost.candidate_launches(more).items(), strict=True
    ):
        assert sum(s.bytes_moved for s in greater) >= sum(s.bytes_moved for s in less)
        # else tiles, efficiency, or how many programs share a depth may change
        if what != "m" and p.m > 64:
            assert cost.seconds(name, greater, more, on, shares) >= cost.seconds(name, less, p, on, shares) * (1 - 1e-9) > 0


@pytest.mark.parametrize(("problem", "arch", "name", "reason"), [
    (forward(257), 90, "one pass", "m is 257: above 256, before sm_100"),
    (forward(256), 90, "one pass", None),
    (forward(257), 100, "one pass", None),
    (forward(16, r=65), 100, "one pass", "r is 65: above 64, h does not fit beside the sums"),
    (forward(16, r=64), 80, "one pass", None),
    (forward(16, gain=True, dropout=True, drop_base=True), 90, "one pass", "the base is dropped, too"),
    (forward(gain=True, dropout=True, drop_base=True), 90, "addmm", None),
    (Problem("forward", 16, 64, (64, 64), (8, 8), BF16), 90, "addmm", None),
    (Problem("forward", 16, 64, (64, 64), (8, 65), BF16), 90, "one pass", "r is 65"),
    (backward(dropout=True, drop_base=True), 90, "addmm", None),
])  # fmt: skip
def test_refusals(problem, arch, name, reason):
    refused = found(problem, arch)[name].refused
    assert refused is None if reason is None else refused.startswith(reason)
    with forced_candidate(name):
        if reason is None:
            for deterministic in (False, True)[: 1 if name == "addmm" else 2]:
                made = choose_plan(problem, arch, deterministic)
                assert (made.winner, made.why) == (name, "forced")
        else:
            words = f"^lora_linear {problem.direction} cannot run as {name}: {reason}"
            with pytest.raises(NotImplementedError, match=words.replace("⊙", ".")):
                choose_plan(problem, arch)


@given(problems, st.integers(0, 10**6))
def test_something_always_wins_and_no_architecture_is_unknown(p, arch):
    made = choose_plan(p, arch, multiprocessors=arch % 200 or None)
    assert found(p, arch)[made.winner].refused is None and str(made)


@pytest.mark.parametrize(("arch", "like"), [(75, 80), (80, 80), (87, 86), (88, 89), (89, 89), (94, 90), (99, 90), (103, 100),
                                            (110, 100), (121, 120), (130, 120), (1000, 120), (0, 80)])  # fmt: skip
def test_an_architecture_that_is_not_known_is_taken_for_its_neighbour(arch, like):
    assert nearest_architecture(arch, CHIPS) == like == nearest_chip(arch).arch == tables.table_for(arch).arch
    told = choose_plan(forward(), arch).source
    assert told.startswith(f"sm_{like} (") and (f"the nearest to sm_{arch} that is known" in told) == (arch != like)


def test_a_chip_with_fewer_multiprocessors():
    whole, part = nearest_chip(90), nearest_chip(90, 66)
    assert (part.half, part.l2_rate, part.dram) == (whole.half / 2, whole.l2_rate / 2, whole.dram)
    times = [found(forward(), multiprocessors=count)["addmm"].seconds for count in (66, 132, None)]
    assert nearest_chip(90, 132) is whole and times[0] > times[1] == times[2]


def test_known_choices_of_the_model():
    """DESIGN's: one launch for few rows; for many the library's GEMM until a GPU has shown another
    to be faster."""
    assert choose_plan(forward(1), 90).winner == choose_plan(forward(16), 90).winner == "one pass"
    assert choose_plan(backward(16), 90).winner == "fused"


@pytest.mark.parametrize(("flags", "ratio"), [
    ({}, "1.20"), ({"gain": True, "dropout": True, "drop_base": True}, "2.41"),
])  # fmt: skip
def test_a_step_by_the_model_is_what_the_docs_say(flags, ratio):
    """8192×4096×4096 on an H100 with the 0.81 of its peak that cuBLAS was seen at, over the frozen
    layer's two GEMMs."""
    on, shares = nearest_chip(90), tables.table_for(90).efficiencies(True, 8192) | {"library": 0.81}
    both = [forward(**flags), backward(**flags)]
    ours = sum(cost.seconds("addmm", cost.candidate_launches(p)["addmm"], p, on, shares) for p in both)
    frozen = sum(cost.seconds("addmm", [cost.gemm_step(p)], p, on, shares) for p in both)
    assert f"{ours / frozen:.2f}" == ratio and f" {ratio}" in (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()


@given(problems, st.sampled_from(sorted(CHIPS)))
def test_many_rows_take_the_librarys_gemm_where_nothing_was_measured(p, arch):
    made = choose_plan(p, arch, backends=("triton", "cuda"))
    assert (made.winner == "addmm" and "nothing was measured" in made.why) or p.m <= 64


@given(problems, st.integers(0, 10**6), st.sampled_from([*CHIPS, 75, 103]), st.integers(1, 300))
def test_a_deterministic_choice_does_not_depend_on_m_nor_on_the_size_of_the_chip(p, m, arch, multiprocessors):
    one, other = choose_plan(p, arch, True), choose_plan(p._replace(m=m), arch, True, multiprocessors)
    assert (one.winner, one.why, one.candidates, one.source) == (other.winner, other.why, other.candidates, other.source)
    assert one.winner != "addmm" and "whatever m is" in one.source
    assert "chooses its GEMM by the number of rows" in next(c.refused for c in one.candidates if c.name == "addmm")


def measured(folder, *choices, arch=90):
    tables.write_table(tables.table_for(arch)._replace(gpu="a GPU", measured=True, stamp={}, choices=choices), folder)
    return tables_from(folder)


def choice(p, winner, **seconds):
    return tables.Choice(p.direction, str(p.dtype)[6:], p.m, p.k, p.n, p.r, winner, seconds)


def test_a_measured_choice_beats_the_prediction(tmp_path):
    assert choose_plan(forward(), 90).winner == "addmm"
    with measured(tmp_path, choice(forward(), "two launches", **{"two launches": 1e-4})):
        made = choose_plan(forward(), 90)
        assert (made.winner, made.why) == ("two launches", "measured at m 8192, k 4096, n 4096, r 16: two launches 100.0 µs")
        assert "predicted from efficiencies measured on a GPU" in made.source
        near, far = {"m": 4096, "k": 8192, "n": 2048, "r": 32}, {"m": 4095, "k": 8193, "n": 2047, "r": 33}
        assert choose_plan(forward(**near), 90).winner == choose_plan(forward(gain=True), 90).winner == "two launches"
        assert choose_plan(forward(), 90, True).winner == choose_plan(forward(m=1), 90, True).winner == "two launches"
        for name, size in far.items():
            assert "measured at" not in choose_plan(forward(**{name: size}), 90).why
        for other in (backward(), forward(dtype=torch.float16), forward(dropout=True)):
            assert "measured at" not in choose_plan(other, 90).why
        # by efficiencies that were measured
        assert choose_plan(forward(m=20000, k=1024), 90).why == "least predicted time"
        unknown = choose_plan(forward(dtype=F32), 90)
        assert "not measured" in unknown.source and unknown.winner == "addmm"
        with forced_candidate("addmm"):
            assert choose_plan(forward(), 90).winner == "addmm"
        assert choose_plan(forward(), 103).why.startswith("measured at")  # the folder has no other
    assert choose_plan(forward(), 90).winner == "addmm"


def test_the_nearest_measured_choice_that_can_run_decides(tmp_path):
    close, closer = choice(forward(256, r=48), "two launches"), choice(forward(256, r=64), "one pass")
    with measured(tmp_path, close, closer):
        assert (
            choose_plan(forward(256, r=64), 90).winner == "one pass"
            and choose_plan(forward(256, r=32), 90).winner == "two launches"
        )
        # one pass, which is nearer, refuses
        assert choose_plan(forward(256, r=66), 90).winner == "two launches"
        assert choose_plan(forward(256, r=65, gain=True, drop_base=True), 90, True).why == "the others refuse"


def test_an_empty_folder_is_the_packages_tables(tmp_path):
    with tables_from(tmp_path):
        assert choose_plan(forward(), 90) == dispatch.choose_plan(forward(), 90)
        assert tables.table_for(90, str(tmp_path)) is tables.table_for(90)


def test_forced_nests_and_restores():
    assert choose_plan(forward(16), 90).winner == "one pass"
    with forced_candidate("two launches"):
        assert (
            choose_plan(backward(16), 90).winner == "fused" and choose_plan(backward(16), 90).why != "forced"
        )  # no such candidate there
        with forced_candidate("addmm"):
            assert choose_plan(forward(16), 90).winner == choose_plan(backward(16), 90).winner == "addmm"
        assert choose_plan(forward(16), 90).winner == "two launches"
    assert choose_plan(forward(16), 90).winner == "one pass"
    named = "must be one of two launches, one pass, addmm, cuda, specialised, fused, codes, found 'both'"
    with pytest.raises(ValueError, match=named), forced_candidate("both"):
        pass
    with forced_candidate("cuda"):
        assert choose_plan(forward(16), 90, backends=("triton", "cuda")).winner == "cuda"
        with pytest.raises(NotImplementedError, match="cannot run as cuda: its backend refuses, or triton alone was asked"):
            choose_plan(forward(16), 90)
        with pytest.raises(NotImplementedError, match="cannot run as cuda: float32: it takes 16 bits"):
            choose_plan(forward(16, dtype=F32), 90, backends=("cuda",))
    with pytest.raises(ValueError, match="direction must be forward or backward, found 'sideways'"):
        choose_plan(forward()._replace(direction="sideways"), 90)


def test_cuda_where_few_rows_read_w_once():
    """One launch for few rows; tensor cores that mma.sync does not reach for many."""
    both = ("triton", "cuda")
    for arch in (80, 86, 89, 90, 100, 120):
        assert (
            choose_plan(forward(1), arch, backends=both).winner
            == choose_plan(forward(16), arch, backends=both).winner
            == "cuda"
        )
        assert choose_plan(forward(8192), arch, backends=both).winner == "addmm"
        assert choose_plan(forward(8192), arch, backends=("cuda",)).winner == "addmm"
        assert choose_plan(forward(8192), arch, True, backends=both).winner == "two launches"
        assert choose_plan(forward(8192), arch, True, backends=("cuda",)).winner == "cuda"
    few = [found(forward(16, dropout=drops), backends=both)["cuda"] for drops in (False, True)]
    x, w, ab, y, h = 16 * 4096 * 2, 32 * MIB, 2 * 16 * 4096 * 2, 16 * 4096 * 2, 16 * 16 * 4
    assert (few[0].bytes, few[0].launches) == (x + w + ab + y + h, 1)
    assert (few[1].bytes, few[1].launches) == (2 * x + w + ab + y + 2 * h, 2)


def test_what_was_measured_with_a_backend_that_is_not_asked(tmp_path):
    row = choice(forward(256, r=64), "cuda")._replace(seconds={"cuda": 1e-6, "one pass": 3e-6, "two launches": 2e-6})
    with measured(tmp_path, row):
        assert choose_plan(forward(256, r=64), 90, backends=("triton", "cuda")).winner == "cuda"
        p = choose_plan(forward(256, r=64), 90)
        assert p.winner == "two launches" and "cuda 1.0 µs" in p.why


def test_a_plan_in_print():
    lines = str(choose_plan(forward(n=1024, gain=True), 90)).splitlines()
    assert lines[0] == "forward m 8192, k 4096, n 1024, r 16, bfloat16, gain"
    assert lines[1] == "sm_90 (H100, 132 multiprocessors): predicted, not measured"
    assert lines[2].split() == ["candidate", "MiB", "launches", "predicted", "µs"]
    names = [line[:12].rstrip() for line in lines[3:]]
    assert names == ["two launches", "one pass", "addmm"] and lines[3].split()[2:4] == ["153.16", "2"]
    assert "  won: many rows, and nothing was measured" in lines[5] and "  refuses: m is 8192: above 256" in lines[4]
    ends = {line.index(str(launches)) for line, launches in zip(lines[3:], ("  2  ", "  1  ", "  3  "), strict=True)}
    assert len(ends) == 1, "columns"


def test_a_shape_that_comes_again_is_only_looked_up(monkeypatch):
    first = choose_plan(forward(77), 90)
    monkeypatch.setattr(cost, "candidate_launches", None)
    assert choose_plan(forward(77), 90) is first
    dispatch.clear_caches()
    with pytest.raises(TypeError):
        choose_plan(forward(77), 90)


@pytest.mark.parametrize("arch", CHIPS)
def test_the_tables_that_are_shipped(arch):
    path = Path(tables.FOLDER) / f"sm_{arch}.json"
    found = json.loads(path.read_text())
    assert found["arch"] == arch and list(found["efficiency"]) == ["half", "single"]
    for classes in found["efficiency"].values():
        assert list(classes) == list(tables.SIZES)
        for shares in classes.values():
            assert tuple(shares) == tables.SHARES and all(0 < share <= 1 for share in shares.values())
    assert bool(found["measured"]) == bool(found["gpu"]) == bool(found["stamp"]) and found["measured"] >= bool(found["choices"])
    pattern = "ops/tables/*.json"  # which the package's data has
    assert f'"{pattern}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert path in Path(dispatch.__file__).parents[1].glob(pattern)


def test_a_table_is_read_as_it_was_written(tmp_path):
    made = tables.table_for(90)._replace(choices=(choice(forward(), "addmm", addmm=1e-4), choice(backward(), "fused")))
    assert tables.table_for(90, str(tmp_path)) == tables.table_for(90)
    path = tables.write_table(made, tmp_path)
    assert tables.table_for(90, str(tmp_path)) == made and max(map(len, path.read_text().splitlines())) < 250


def test_where_a_tensor_is():
    assert (architecture(torch.empty(1)), multiprocessors(torch.empty(1))) == (80, None)
    with device(arch=120):
        assert architecture(torch.empty(1)) == 120


@pytest.mark.parametrize(("k", "n", "wanted"), [
    (4096, 4096, (4, 0)),  # W of 32 MiB stays in L2
    (4096, 6144, (4, 24)),  # 48 MiB: its halves do, and x is read twice
    # seven parts of 224 MiB, where the rows that stay would have it read three times
    (4096, 28672, (4, 32)),
    (28672, 4096, (4, 0)),  # rows of 7 MiB: a few stay, and W is read for each few
])  # fmt: skip
def test_the_order_of_tiles(k, n, wanted):
    """Tiles of 128 by 128 in bfloat16 behind an H100's 50 MiB."""
    assert cost.tile_order(128 * k * 2, 128 * k * 2, 128 * 128 * 2, n // 128, 50 * 2**20) == wanted
