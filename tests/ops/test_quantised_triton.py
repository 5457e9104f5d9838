"""Quantised weights in Triton's kernels: numbers, products and norms in the simulator, what they
read, and planted bugs."""

import math
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from lora_kernels import QuantisedWeight, dora_linear, explain, lora_linear, use_backend, weight_norm
from lora_kernels.ops import missing_backends, row_norm_squared
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.testing import assert_problem, assert_within_rounding, exact, make_problem
from tests.ops.quantised import KINDS, NF4, make_quantised

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops.cost import Problem
from lora_kernels.ops.dispatch import choose_plan, forced_candidate
from lora_kernels.ops.lora_linear import triton_codes
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows
from tests.ops.interpreted import deterministic
from tests.ops.quantised_plants import planted

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def simulated():
    with use_backend("triton", simulate=True), deterministic(False):
        yield


def same_bits(found, wanted):
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, BF16) for kind in KINDS), ("nested", F32), pytest.param("nibbles", F16, marks=pytest.mark.slow)],
)
def test_numbers_are_the_formulas(kind, dtype):
    """Bit for bit: blocks that end within rows, within bytes, and beyond the last number."""
    for n_out, n_in, block in (
        (33, 64, 64), (3, 33, 64), (17, 100, 32), (9, 66, 64), (31, 66, 7), (3, 1100, 2048), (4, 64, 192),
    ):  # fmt: skip
        w = make_quantised(kind, n_out, n_in, block, dtype)
        assert same_bits(w.dequantise(), dequantised(w)), (n_out, n_in, block)


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows(kind):
    for n_in in (128, 65):
        w = make_quantised(kind, 24, n_in, 64, BF16)
        wanted = dequantised(w)
        for first, rows in ((0, 8), (3, 20), (23, 1), (24, 0), (0, 24)):
            assert same_bits(dequantise_rows(Quantised(*w.fields()), first, rows), wanted[first : first + rows])


def test_every_code():
    """All bytes of each kind, NaN and zeros of both signs too."""
    codes, one, table = torch.arange(256).to(torch.uint8), torch.ones(1), torch.tensor(NF4)
    pairs = QuantisedWeight(codes, (1, 512), one, 512, F32, table).dequantise()[0]
    assert same_bits(pairs.view(256, 2), table[torch.stack((codes >> 4, codes & 15), 1).long()])
    for kind in (torch.int8, torch.float8_e4m3fn):
        found, wanted = QuantisedWeight(codes.view(kind), (1, 256), one, 256, F32).dequantise()[0], codes.view(kind).float()
        assert torch.equal(found.isnan(), wanted.isnan()) and same_bits(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0, 1e-39, 3e38])
def test_odd_scales(value):
    w = make_quantised("nibbles", 4, 64, 64, BF16)
    w.scales[2] = value
    found, wanted = w.dequantise(), dequantised(w)
    assert torch.equal(found.isnan(), wanted.isnan()) and same_bits(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantise_reads_and_writes_once(kind):
    w = make_quantised(kind, 96, 512, 64, BF16)
    with device(trace=True) as sim:
        w.dequantise()
    read, written = sim.dram()
    # of 256 values of scales those that there are
    least, unused = w.nbytes, 1024 if kind == "nested" else 0
    assert sim.launches == 1 and least - unused <= read <= 1.02 * least and written == 2 * w.numel()
    assert sim.counters["store_sectors"] * 32 == written
    assert sim.counters["shared_wavefronts"] == sim.counters["shared_ideal"]


@pytest.fixture
def plant(monkeypatch, tmp_path):
    return partial(planted, monkeypatch, tmp_path)


BUGS = [
    ("tl.join(pairs >> 4, pairs & 15)", "tl.join(pairs & 15, pairs >> 4)"),
    ("groups[:, None] * (GROUP // 2) + tl.arange", "groups[:, None] * (GROUP // 2) + 1 + tl.arange"),
    ("quotient(groups * GROUP, weight.block", "quotient(groups * GROUP + 1, weight.block"),
    ("quotient(groups * GROUP, weight.block", "1 + quotient(groups * GROUP, weight.block"),
    (" + tl.load(weight.offset)", ""),
    ("tl.zeros(fine.shape, tl.float32)) + tl.load(weight.offset)", "tl.load(weight.offset) + 0.0 * fine)"),
    ("quotient(blocks, weight.outer_block", "quotient(2 * blocks, weight.outer_block"),
    ("tl.where(groups % 2 == ORDER, pairs", "tl.where(groups % 2 != ORDER, pairs"),
    ("places < count, first", "places < count - 1, first"),
    ("inside, groups = places < count", "inside, groups = places <= count"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), BUGS)
def test_planted_bugs(old, new, plant):
    """Numbers that are not the formula's, or an access out of bounds."""
    plant(old, new)
    # the last block is short; an outer block ends inside; rows begin inside bytes
    for n_out, n_in, block in ((3, 64, 128), (3, 33, 8), (300, 128, 128)):
        w = make_quantised("nested", n_out, n_in, block, F32)
        try:
            if not same_bits(w.dequantise(), dequantised(w)):
                return
        except SimulationError as error:
            assert "out of bounds" in str(error)
            return
    pytest.fail("not found")


def check(tokens, n_in, n_out, rank, kind="nested", dtype=BF16, block=64, **flags):
    w = make_quantised(kind, n_out, n_in, block, dtype)
    p = make_problem(tokens, n_in, n_out, rank, dtype, **flags)
    results = assert_problem(replace(p, w=dequantised(w)), w)
    return p, w, results


def chosen(p, w):
    return explain(lora_linear, p.x, w, p.a, p.b, p.scale, p.bias, p.gain).decisions[0].plan.winner


@pytest.mark.parametrize(
    ("kind", "dtype", "tokens"),
    [*((kind, BF16, 5) for kind in KINDS), ("nibbles", F32, 3), pytest.param("nested", F16, 20, marks=pytest.mark.slow)],
)
def test_few_tokens(kind, dtype, tokens):
    """From the codes; of the depth some tiles more than one program, blocks end inside a tile."""
    p, w, _ = check(tokens, 96, 70, 8, kind, dtype, 32, gain=True, bias=True)
    assert chosen(p, w) == "codes"


@pytest.mark.parametrize(("tokens", "sizes", "block"), [
    pytest.param(40, (130, 33, 40), 64, marks=pytest.mark.slow), pytest.param(2, (65, 31, 3), 64, marks=pytest.mark.slow),
    (17, (1088, 32, 16), 7),
])  # fmt: skip
def test_few_tokens_of_odd_sizes(tokens, sizes, block):
    check(tokens, *sizes, block=block, dropout=0.3, gain=True, dropout_semantics="lora_only")


@pytest.mark.parametrize(("kind", "dtype"), [
    ("nested", BF16), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("float8", F16), ("int8", F32))),
])  # fmt: skip
def test_many_tokens(kind, dtype):
    """From W itself, as many rows as there are."""
    p, w, _ = check(70, 96, 80, 8, kind, dtype, gain=True, bias=True)
    assert chosen(p, w) == "addmm"


@pytest.mark.parametrize("flags", [
    pytest.param({"gain": True, "dropout": 0.3}, marks=pytest.mark.slow), {"gain": True},
    pytest.param({}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_the_other_candidates(flags):
    """A launch that makes W, and then as of a plain W: the same bits."""
    p, w, _ = check(9, 64, 40, 80, **flags)
    plain = replace(p, w=dequantised(w))
    for name in ("two launches", "addmm"):
        with forced_candidate(name):
            y = lora_linear(p.x, w, *plain.arguments()[2:])
            assert torch.equal(y, lora_linear(*plain.arguments()))


def test_deterministic():
    """The same bits twice, with blocks in another order, and of a row alone."""
    for exactly in (False, True):
        p, w = make_problem(20, 1088, 40, 8, BF16), make_quantised("nested", 40, 1088, 64, BF16)
        ys = []
        for seed in (0, 0, 5):
            with device(seed=seed), deterministic(exactly):
                ys.append(lora_linear(p.x, w, p.a, p.b))
                if exactly:
                    assert torch.equal(lora_linear(p.x[3:4], w, p.a, p.b), ys[0][3:4])
        assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2])


@pytest.mark.parametrize(("arch", "tokens"), [(80, 16), (80, 64), (90, 16), (90, 64)])
def test_codes_are_read_once(arch, tokens):
    """From memory all that there is once, up to 64 tokens; and in the memory of a block no more
    accesses at a time than there must be."""
    w, p = make_quantised("nested", 128, 1024, 64, BF16), make_problem(tokens, 1024, 128, 16, BF16)
    with device(arch, trace=True) as sim, forced_candidate("codes"):
        lora_linear(p.x, w, p.a, p.b)
    read, _ = sim.dram()
    assert sim.launches == 1
    assert read <= 1.01 * (w.nbytes + sum(t.nbytes for t in (p.x, p.a, p.b)))
    assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]


def test_a_step_never_holds_two_weights(monkeypatch):
    """Forward and backward of many tokens: each makes W, and lets it go."""
    made = []

    def noted(*args):
        assert not any(known() is not None for known in made)
        w = dequantise_rows(*args)
        made.append(weakref.ref(w))
        return w

    monkeypatch.setattr(triton_codes, "dequantise_rows", noted)
    w, p = make_quantised("nested", 48, 64, 64, BF16), make_problem(80, 64, 48, 8, BF16)
    x, a, b = (t.requires_grad_() for t in (p.x, p.a, p.b))
    torch.autograd.grad(lora_linear(x, w, a, b), (x, a, b), p.dy)
    assert len(made) == 2 and not any(known() is not None for known in made)


def test_explain():
    w = make_quantised("nested", 4096, 4096, 64, BF16)
    for m, arch in ((1, 80), (16, 90), (64, 100)):
        problem = Problem("forward", m, 4096, (4096,), (16,), BF16, codes=w.nbytes)
        plan = choose_plan(problem, arch)
        found = {c.name: c for c in plan.candidates}
        assert plan.winner == "codes" and found["codes"].launches == 1
        assert w.nbytes < found["codes"].bytes < 1.2 * w.nbytes
        assert found["one pass"].bytes == found["codes"].bytes + 2 * 2 * 4096**2
        assert f"w of {w.nbytes / 2**20:.2f} MiB" in str(plan)
    assert choose_plan(problem._replace(m=65), 90).winner == "addmm"
    assert choose_plan(problem, 90, True).winner == "two launches"
    assert [c.launches for c in choose_plan(problem._replace(direction="backward"), 90).candidates] == [4, 6, 3]
    with forced_candidate("codes"), pytest.raises(NotImplementedError, match="m is 65: above 64"):
        choose_plan(problem._replace(m=65), 90)
    with forced_candidate("codes"), pytest.raises(NotImplementedError, match="cannot run as codes"):
        choose_plan(problem._replace(codes=0), 90)


MAIN_BUGS = [
    ("along = first // GROUP", "along = tl.maximum(first // GROUP - 1, 0)"),
    ("rows[:, None] * (k // GROUP) + along", "rows[:, None] * (k // GROUP + 1) + along"),
    ("columns, first + BK, layer.n", "columns, first, layer.n"),
    ("        scales = next_scales\n", "        scales = (tl.flip(next_scales[0], 0),)\n"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), MAIN_BUGS)
def test_planted_bugs_of_the_main_loop(old, new, plant):
    plant(old, new)
    p, w = make_problem(5, 256, 40, 8, BF16), make_quantised("nested", 40, 256, 64, BF16)
    values = exact(replace(p, w=dequantised(w))).values
    with pytest.raises((AssertionError, SimulationError)):
        assert_within_rounding(lora_linear(p.x, w, *p.arguments()[2:]), values["y"], BF16)


@pytest.mark.parametrize(("kind", "dtype", "factors"), [
    ("nested", BF16, BF16),
    *(pytest.param(*each, marks=pytest.mark.slow)
      for each in (("int8", F16, F32), ("float8", BF16, F32), ("nibbles", F32, F32))),
])  # fmt: skip
def test_norms(kind, dtype, factors):
    for n_out, n_in, rank in ((40, 96, 8), (33, 65, 70)):
        w, p = make_quantised(kind, n_out, n_in, 32, dtype), make_problem(1, n_in, n_out, rank, dtype, factors)
        dense = dequantised(w)
        adapted = dense.double() + 1.5 * (p.b.double() @ p.a.double())
        torch.testing.assert_close(weight_norm(w, p.a, p.b, 1.5).double(), adapted.norm(dim=1), rtol=2e-6, atol=0)
        torch.testing.assert_close(row_norm_squared(w).double(), dense.double().square().sum(1), rtol=1e-6, atol=0)
    a, b = (t.float().requires_grad_() for t in (p.a, p.b))
    found = torch.autograd.grad(weight_norm(w, a, b, 1.5).sum(), (a, b))
    wanted = torch.autograd.grad((dense.double() + 1.5 * (b.double() @ a.double())).norm(dim=1).sum(), (a, b))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_norms_read_codes_once():
    w, p = make_quantised("nested", 64, 512, 64, BF16), make_problem(1, 512, 64, 16, BF16)
    for run, others in ((lambda: weight_norm(w, p.a, p.b), p.a.nbytes + p.b.nbytes), (lambda: row_norm_squared(w), 0)):
        with device(trace=True) as sim:
            run()
        read, written = sim.dram()
        assert sim.launches == 1 and read <= 1.01 * (w.nbytes + others) and written == 64 * 4


def test_dora():
    """Its norm from the codes, and then the product from them."""
    w, p = make_quantised("nested", 40, 96, 64, BF16), make_problem(5, 96, 40, 8, BF16)
    magnitude = torch.rand(40) + 0.5
    y, norm = dora_linear(p.x, w, p.a, p.b, magnitude, 0.5)
    assert torch.equal(norm, weight_norm(w, p.a, p.b, 0.5))
    assert torch.equal(y, lora_linear(p.x, w, p.a, p.b, 0.5, None, magnitude / norm))
