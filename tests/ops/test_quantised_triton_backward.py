"""Gradients over codes in Triton's kernels: values and traffic in the simulator, a wide space of
sizes in the interpreter, and planted bugs."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch

from lora_kernels import explain, lora_linear, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.testing import assert_problem, assert_within_rounding, exact, make_problem
from lora_kernels.testing.interpreter_memory import InterpreterViolation
from tests.ops.quantised import KINDS, make_quantised

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.lora_linear import triton_codes
from tests.ops.interpreted import deterministic, interpreted, sweep
from tests.ops.quantised_plants import planted

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def simulated():
    with use_backend("triton", simulate=True), deterministic(False):
        yield


def step(p, w, wanted="xab"):
    """y and the gradients of a problem over w, and what was decided."""
    leaves = {name: getattr(p, name).detach().clone().requires_grad_() for name in wanted if getattr(p, name) is not None}
    held = replace(p, w=w, **leaves)
    found = {}

    def run():
        y = lora_linear(*held.arguments())
        found.update(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True), y=y.detach())

    return found, [decision.plan for decision in explain(run).decisions]


def problem(tokens, n_in, n_out, rank, kind="nested", dtype=BF16, block=64, **flags):
    w = make_quantised(kind, n_out, n_in, block, dtype)
    return replace(make_problem(tokens, n_in, n_out, rank, dtype, **flags), w=dequantised(w)), w


@pytest.mark.parametrize(("kind", "dtype"), [
    ("nested", BF16),
    *(pytest.param(*each, marks=pytest.mark.slow)
      for each in (*((kind, BF16) for kind in KINDS if kind != "nested"), ("nibbles", F32), ("int8", F16))),
])  # fmt: skip
def test_few_tokens(kind, dtype):
    """All gradients, of the gain, too; blocks end inside a tile, and outputs, too."""
    p, w = problem(5, 96, 70, 8, kind, dtype, 32, gain=True, bias=True)
    assert_problem(p, w)
    with interpreted():
        _, plans = step(p, w)
    assert [plan.winner for plan in plans] == ["codes", "codes"]


@pytest.mark.parametrize(("sizes", "flags"), [
    pytest.param((17, 40, 140, 5), {"dropout": 0.3}, marks=pytest.mark.slow),
    pytest.param((64, 130, 40, 20), {"gain": True, "dropout": 0.3, "dropout_semantics": "lora_only"}, marks=pytest.mark.slow),
    pytest.param((3, 33, 65, 3), {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_odd_sizes(sizes, flags, monkeypatch):
    """Of 140 outputs each tile has two programs; rows of 33 numbers begin inside bytes."""
    monkeypatch.setattr(triton_codes, "SHARE", 64)
    p, w = problem(*sizes, **flags)
    assert_problem(p, w)


@pytest.mark.parametrize(("makes_dx", "where"), [
    (True, interpreted), (False, interpreted), pytest.param(True, device, marks=pytest.mark.slow), (False, device),
])  # fmt: skip
def test_gains_of_zero(makes_dx, where):
    """y does not tell their gradients; the rows of W that do are read as codes."""
    p, w = problem(6, 66, 70, 4, gain=True)
    p.gain[[0, 33, 69]] = 0.0
    with where():
        found, plans = step(p, w, ["x"] * makes_dx + ["a", "b", "gain"])
    for name in ("a", "b", "gain", *["x"] * makes_dx):
        assert_within_rounding(found[name], exact(p).values[name], BF16, inherited=0.01, name=name)
    zero = exact(p).values["gain"][[0, 33, 69]]
    torch.testing.assert_close(found["gain"][[0, 33, 69]].double(), zero, rtol=0.02, atol=0.02)
    assert len(plans) == 2 and (plans[1] is None) is not makes_dx


def test_nothing_to_compute():
    """No tokens, no outputs: empty, and sums of nothing are zero."""
    for tokens, n_out in ((0, 40), (3, 0)):
        p, w = problem(tokens, 64, n_out, 4)
        with interpreted():
            found, _ = step(p, w)
        assert found["y"].shape == (tokens, n_out) and found["x"].shape == (tokens, 64)
        assert not found["a"].any() and not found["b"].any() and not found["x"].any()


def test_bits(monkeypatch):
    """The same twice, with blocks in another order; forced in the deterministic mode, those of a
    row alone."""
    monkeypatch.setattr(triton_codes, "SHARE", 64)
    p, w = problem(20, 40, 140, 8, dropout=0.2)
    with interpreted():
        wanted, _ = step(p, w)
    with interpreted(seed=5):
        found, _ = step(p, w)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    p, w = problem(20, 40, 140, 8, gain=True)
    with interpreted(), deterministic(True), forced_candidate("codes"):
        whole, _ = step(p, w)
        row, _ = step(replace(p, x=p.x[3:4], dy=p.dy[3:4]), w)
    assert torch.equal(row["x"], whole["x"][3:4])


@pytest.mark.parametrize(("arch", "tokens"), [
    (90, 64), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((80, 16), (80, 64), (90, 16))),
])  # fmt: skip
def test_dx_reads_codes_once(arch, tokens):
    p, w = problem(tokens, 128, 1024, 16)
    with device(arch, trace=True) as sim:
        lora_linear(p.x.requires_grad_(), w, p.a, p.b).backward(p.dy)
    before, last = sim.ends[-2:]
    read = _bytes_read(sim, before, last)
    others = p.dy.nbytes + p.a.nbytes + tokens * 16 * 4 * -(-1024 // 128)
    assert len(sim.ends) == 3 and w.nbytes - 1024 <= read <= 1.01 * (w.nbytes + others)


def _bytes_read(sim, first, last):
    """Of one launch, which finds the cache empty."""
    whole = replace(sim, trace=sim.trace[first:last], ends=[last - first])
    return whole.dram(apart=True)[0]


@pytest.mark.parametrize(("tokens", "forms", "launches"), [
    (64, ("codes", "codes"), 4), pytest.param(512, ("two launches", "fused"), 7, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_step_moves_the_floor(tokens, forms, launches):
    """Each tensor of a launch once, by the cost model's count, and no tenth more; a W in 16 bits is
    written and read where there are many tokens, in each direction."""
    p, w = problem(tokens, 512, 512, 8, gain=True)
    leaves = [t.requires_grad_() for t in (p.x, p.a, p.b)]
    with device(trace=True, check=False, resident=16, shuffle=False) as sim:
        with forced_candidate(forms[0]):
            y = lora_linear(p.x, w, p.a, p.b, 0.5, None, p.gain)
        with forced_candidate(forms[1]):
            torch.autograd.grad(y, leaves, p.dy)
    _, plans = step(p, w)
    least = sum(next(c for c in plan.candidates if c.name == form).bytes for plan, form in zip(plans, forms, strict=True))
    assert sim.launches == launches
    assert 0.97 * least <= sum(sim.dram(apart=True)) <= 1.1 * least


BUGS = [
    ("(weight, outputs + BN, column", "(weight, outputs, column"),
    ("scales, outputs, column, layer.n", "scales, outputs, 0, layer.n"),
    ("tl.reshape(numbers.to(ds.dtype), (BN, BK))", "tl.trans(tl.reshape(numbers.to(ds.dtype), (BK, BN)))"),
    ("scales, outputs = next_scales, first", "scales, outputs = (tl.sort(next_scales[0]),), first"),
    ("gains = tl.load(layer.gain + outputs, mask", "gains = tl.load(layer.gain + 0 * outputs, mask"),
    ("depth = tl.cdiv(tl.cdiv(layer.n, BN), SPLITS) * BN", "depth = layer.n // SPLITS"),
    ("(tile - tiles) * SPLITS + tl.program_id(1), sums", "tile - tiles, sums"),
    ("min(layer.n, begin + depth), m, k", "begin + depth - BN, m, k"),
    ("layer.drop.inverse * term, 0.0)", "term, 0.0)"),
    ("tl.join(pairs >> 4, pairs & 15)", "tl.join(pairs & 15, pairs >> 4)"),
    ("quotient(groups * GROUP, weight.block", "1 + quotient(groups * GROUP, weight.block"),
    (" + tl.load(weight.offset)", ""),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), BUGS)
def test_planted_bugs(old, new, monkeypatch, tmp_path):
    """In dx, or in a sum of what is left in parts."""
    planted(monkeypatch, tmp_path, old, new)
    monkeypatch.setattr(triton_codes, "SHARE", 64)
    p, w = problem(5, 192, 140, 8, gain=True, dropout=0.3, dropout_semantics="lora_only")
    values = exact(p).values
    with pytest.raises((AssertionError, SimulationError, InterpreterViolation)), interpreted():
        found, _ = step(p, w)
        for name in "xab":
            assert_within_rounding(found[name], values[name], BF16, name=name)


def check_step(draw):
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from([BF16, F16, F32]))
    gain, dropout = draw(st.booleans()), draw(st.sampled_from([0.0, 0.0, 0.3]))
    tokens, block = draw(st.integers(0, 64)), draw(st.sampled_from([7, 32, 64, 192, 4096]))
    p, w = problem(
        tokens, draw(st.integers(1, 200)), draw(st.integers(1, 200)), draw(st.sampled_from([1, 8, 17, 70])), kind, dtype, block,
        gain=gain, bias=draw(st.booleans()), dropout=dropout, dropout_semantics=draw(st.sampled_from(["peft", "lora_only"])),
    )  # fmt: skip
    with interpreted(draw(st.sampled_from([80, 90])), draw(st.sampled_from([None, 1]))):
        assert_problem(p, w)


test_steps, test_steps_widely = sweep(3, 60)(check_step)
