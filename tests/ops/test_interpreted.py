"""The ops' Triton kernels against float64 over a wide space of sizes, dtypes, flags and layouts, in
the mended interpreter; with programs in any order the same bits. No race, no access out of bounds,
no overflow: the interpreter raises. The slow part is the same sweep with many more examples."""

from contextlib import nullcontext
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch

from lora_kernels import dora_linear, merged_weight, weight_norm
from lora_kernels.ops import missing_backends, row_norm_squared
from lora_kernels.testing import (
    as_layout,
    assert_componentwise,
    assert_group,
    assert_problem,
    assert_within_rounding,
    make_group,
    make_problem,
    run,
    run_group,
)

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops.dispatch import forced_candidate
from tests.ops.interpreted import deterministic, interpreted, sweep

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
RANKS = [1, 3, 16, 17, 64, 65, 130, 512]
LAYOUTS = ["contiguous", "transposed", "offset", "sliced_rows", "every_other", "gapped_rows"]
PAIRS = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32)]
tokens = st.one_of(st.integers(0, 70), st.sampled_from([1, 16, 64, 65]))
sizes = st.integers(1, 200)
# a rank costs as many steps as a column, so that the large ones are rarer than the small
ranks = st.one_of(st.integers(1, 20), st.sampled_from(RANKS[:6]), st.sampled_from(RANKS))


def flags(draw):
    drops = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))
    return {
        "bias": draw(st.booleans()), "gain": draw(st.booleans()), "dropout": drops,
        "scale": draw(st.sampled_from([1.0, -0.5, 2.0])),
    }  # fmt: skip


def twice(work, arch=80, form=None, exactly=True, seeds=(None, 1, 2)):
    """What `work` gives, and the same bits with the programs in two other orders."""
    results = []
    for seed in seeds:
        with interpreted(arch, seed), forced_candidate(form) if form else nullcontext(), deterministic(exactly):
            results.append(work())
    return results[0], results[1:]


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def in_layouts(draw, problem, layouts=LAYOUTS):
    return replace(problem, **{
        n: as_layout(getattr(problem, n), draw(st.sampled_from(layouts))) for n in ("x", "w", "a", "b", "dy")
    })  # fmt: skip


def form_of(draw, gain, dropout, semantics, rank):
    """One of dispatch's candidates that does not refuse, or its own choice."""
    drop_base = gain and dropout > 0 and semantics == "peft"
    able = [None, "two launches"]
    able += [] if drop_base or rank > 64 else ["one pass"]
    able += [] if drop_base or gain else ["addmm"]
    return draw(st.sampled_from(able))


def check_linear(draw):
    dtype, kind = draw(st.sampled_from(PAIRS))
    given, semantics, rank = flags(draw), draw(st.sampled_from(["peft", "lora_only"])), draw(ranks)
    problem = make_problem(draw(tokens), draw(sizes), draw(sizes), rank, dtype, kind, seed=draw(st.integers(0, 99)),
                           dropout_semantics=semantics, **given)  # fmt: skip
    arch, form = draw(st.sampled_from([80, 90])), form_of(draw, given["gain"], given["dropout"], semantics, rank)
    # torch's own product on a CPU with AMX takes in the NaN that lie between the rows
    problem = in_layouts(draw, problem, LAYOUTS[:2] if form == "addmm" else LAYOUTS)
    with interpreted(arch), forced_candidate(form) if form else nullcontext(), deterministic(form != "addmm"):
        results = assert_problem(problem)
    _, others = twice(lambda: run(problem), arch, form, exactly=form != "addmm")
    assert all(same(results, other) for other in others)


test_linear, test_linear_widely = sweep(4, 100)(check_linear)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("dtype", "kind"), [(BF16, BF16), (F16, F32), (F32, F32)], ids=str)
def test_ranks(rank, dtype, kind):
    with interpreted():
        assert_problem(make_problem(5, 37, 29, rank, dtype, kind, gain=True, bias=True))


@pytest.mark.parametrize("form", ["one pass", "two launches", "addmm"])
@pytest.mark.parametrize(("dtype", "kind"), [(BF16, BF16), (F32, F32)], ids=str)
def test_a_shared_depth(dtype, kind, form):
    """Few rows: several programs share a tile's depth, and the last of them to come adds up,
    whichever it is."""
    problem = make_problem(5, 1100, 70, 9, dtype, kind, bias=True)
    with interpreted(90), forced_candidate(form), deterministic(False):
        results = assert_problem(problem)
    found, others = twice(lambda: run(problem), 90, form, exactly=False)
    assert same(results, found) and all(same(results, other) for other in others)


@pytest.mark.parametrize("semantics", ["peft", "lora_only"])
def test_gains_of_zero(semantics):
    problem = make_problem(21, 70, 75, 20, F32, gain=True, dropout=0.3, dropout_semantics=semantics)
    problem.gain[::37] = 0
    with interpreted():
        assert_problem(problem)


def check_group(draw):
    dtype, kind = draw(st.sampled_from(PAIRS))
    semantics = draw(st.sampled_from(["peft", "lora_only"]))
    members = [
        flags(draw)
        | {"n_out": draw(st.integers(1, 130)), "rank": draw(st.sampled_from([1, 3, 8, 17, 64])), "adapter_dtype": kind}
        for _ in range(draw(st.integers(1, 4)))
    ]
    problems = make_group(members, draw(tokens), draw(sizes), dtype, draw(st.integers(0, 99)), dropout_semantics=semantics)
    arch = draw(st.sampled_from([80, 90]))
    with interpreted(arch):
        results = assert_group(problems)
    again, _ = twice(lambda: run_group(problems), arch, seeds=(1,))
    assert all(same(one, two) for one, two in zip(results, again, strict=True))


test_group, test_group_widely = sweep(2, 60)(check_group)
test_group = pytest.mark.slow(test_group)


def draw_weight(draw, ranks=ranks):
    dtype, kind = draw(st.sampled_from(PAIRS))
    n, k, rank, scale = draw(sizes), draw(sizes), draw(ranks), draw(st.sampled_from([1.0, -0.5, 4.0]))
    p = make_problem(0, k, n, rank, dtype, kind, gain=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    w, a, b = (as_layout(t, draw(st.sampled_from(LAYOUTS))) for t in (p.w, p.a, p.b))
    return w, a, b, scale, p.gain


def check_norm(draw):
    w, a, b, scale, _ = draw_weight(draw, st.one_of(st.integers(1, 20), st.sampled_from(RANKS[:6])))
    dn = torch.randn(len(w), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    a, b = a.requires_grad_(), b.requires_grad_()

    def work():
        norm = weight_norm(w, a, b, scale)
        da, db = torch.autograd.grad(norm, (a, b), dn)
        return {"norm": norm, "a": da, "b": db, "squared": row_norm_squared(w)}

    found, others = twice(work)
    assert all(same(found, other) for other in others)
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    adapted = w.double() + scale * wide[1] @ wide[0]
    wanted = adapted.square().sum(1).sqrt()
    grads = torch.autograd.grad(wanted, wide, dn.double())
    sizes_of = w.double().abs() + abs(scale) * wide[1].detach().abs() @ wide[0].detach().abs()
    limit = 1e-6 * sizes_of.square().sum(1).sqrt() + 1e-6 * wanted
    assert ((found["norm"].double() - wanted).abs() <= limit).all()
    squared = w.double().square().sum(1)
    assert_componentwise(found["squared"], squared, squared, w.shape[1], F32, name="squared")
    # the same formulas on absolute values: c ⊙ (|W| + |s||B||A|) stands for the adapted weight
    c = (dn.double().abs() / wanted.detach())[:, None] * sizes_of * abs(scale)
    magnitudes = wide[1].detach().abs().T @ c, c @ wide[0].detach().abs().T
    for name, truth, magnitude in zip("ab", grads, magnitudes, strict=True):
        assert found[name].dtype is a.dtype
        assert_componentwise(found[name], truth, magnitude, sum(w.shape) + 2 * len(a), a.dtype, name=f"gradient of {name}")
        if a.dtype is not F32 and truth.numel() >= 8:
            assert_within_rounding(found[name], truth, a.dtype, name=f"gradient of {name}")


test_norm, test_norm_widely = sweep(2, 100)(check_norm)


def check_dora(draw):
    (dtype, kind), k, n = draw(st.sampled_from(PAIRS)), draw(sizes), draw(sizes)
    m, rank = draw(st.integers(1, 64)), draw(st.one_of(st.integers(1, 20), st.just(64)))
    scale = draw(st.sampled_from([2.0, -0.5]))
    p = make_problem(m, k, n, rank, dtype, kind, bias=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    p = in_layouts(draw, p)
    magnitude = torch.randn(n, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    found, others = twice(lambda: dict(zip("yn", dora_linear(p.x, p.w, p.a, p.b, magnitude, scale, p.bias), strict=True)))
    assert all(same(found, other) for other in others)
    x, w, a, b = (t.double() for t in (p.x, p.w, p.a, p.b))
    adapted, size = w + scale * b @ a, w.abs() + abs(scale) * b.abs() @ a.abs()
    norm = adapted.square().sum(1).sqrt()
    assert ((found["n"].double() - norm).abs() <= 1e-6 * size.square().sum(1).sqrt() + 1e-6 * norm).all()
    # by the norm that it found: the error of that is held to above
    gain = magnitude.double() / found["n"].double()
    truth, terms = gain * (x @ adapted.T), gain.abs() * (x.abs() @ size.T)
    if p.bias is not None:
        truth, terms = truth + p.bias.double(), terms + p.bias.double().abs()
    # as assert_problem holds lora_linear to: float32 times float16 is three products of bfloat16
    assert_componentwise(found["y"], truth, terms, k + rank, dtype, roundings=1 if dtype is F32 else 3)
    if dtype is not F32 and truth.numel() >= 8:
        assert_within_rounding(found["y"], truth, dtype)


test_dora, test_dora_widely = sweep(4, 100)(check_dora)


def check_merge(draw):
    w, a, b, scale, gain = draw_weight(draw)
    found, others = twice(lambda: {"merged": merged_weight(w, a, b, scale, gain)})
    truth = w.double() + scale * b.double() @ a.double()
    size = w.double().abs() + abs(scale) * b.double().abs() @ a.double().abs()
    if gain is not None:
        truth, size = gain.double()[:, None] * truth, gain.double().abs()[:, None] * size
    assert_componentwise(found["merged"], truth, size, len(a), w.dtype)
    if w.dtype is not F32:
        assert_within_rounding(found["merged"], truth, w.dtype, ideal_ratio=1.02)
    assert all(same(found, other) for other in others)
    with interpreted(seed=3):
        assert merged_weight(w, a, b, scale, gain, out=w).equal(found["merged"])


test_merge, test_merge_widely = sweep(6, 100)(check_merge)
