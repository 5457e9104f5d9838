"""lora_linear in CUDA C++ around the library's GEMM, in the simulator: every flag, dtype and
layout, its error beside PEFT's, and that its waits and masks are needed."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from lora_kernels import lora_linear, lora_linear_group, use_backend
from lora_kernels.ops.dropout import mask
from lora_kernels.ops.lora_linear import cuda_skinny as skinny
from lora_kernels.ops.lora_linear.library import Term
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc
from lora_kernels.testing import assert_problem, assert_within_rounding, make_group, make_problem, run
from lora_kernels.testing.check import member
from lora_kernels.testing.grid import as_layout
from lora_kernels.testing.tolerances import rms
from tests.ops.interpreted import deterministic

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FLAGS = {
    "lora": {}, "bias": {"bias": True}, "dora": {"gain": True}, "dropout": {"dropout": 0.3},
    "dora, bias, dropped base": {"gain": True, "bias": True, "dropout": 0.3},
    "dora, dropout": {"dropout": 0.3, "gain": True, "dropout_semantics": "lora_only"},
}  # fmt: skip
KINDS = [(BF16, None), (BF16, F32), (F16, None), (F16, F32)]


@pytest.fixture
def simulated():
    with use_backend("cuda", simulate=True), deterministic(False):
        yield


def short(kind):
    return "-".join("same" if each is None else str(each)[6:] for each in kind)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", KINDS, ids=short)
def test_values_and_gradients(simulated, kind, flags):
    """Edges of tiles and of blocks of ranks."""
    with device(seed=1) as sim:
        assert_problem(make_problem(70, 72, 136, 33, *kind, **FLAGS[flags]))
    assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]


# tokens, in, out, r: parts of x's columns, several blocks of ranks, few tokens, nothing, numbers
# that fill no piece
SHAPES = [(130, 2056, 40, 5), (300, 72, 136, 130), (3, 64, 64, 16), (0, 16, 16, 4), (67, 75, 61, 5), (1, 7, 9, 70)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(simulated, shape):
    assert_problem(make_problem(*shape, BF16, F32, **FLAGS["dora, bias, dropped base"]))


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", KINDS, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_shapes(simulated, shape, kind, flags):
    assert_problem(make_problem(*shape, *kind, **FLAGS[flags]))


@pytest.mark.parametrize("layout", ["transposed", "offset", "sliced_rows", "every_other", "gapped_rows"])
def test_layouts(simulated, layout):
    p = make_problem(70, 64, 72, 9, F16, gain=True, dropout=0.3)
    names = ("x", "w", "a", "b", "dy")
    wanted = run(p)
    found = run(replace(p, **{name: as_layout(getattr(p, name), layout) for name in names}))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-3)


def test_on_sm_90(simulated):
    with device(arch=90):
        assert_problem(make_problem(70, 72, 136, 20, BF16, F32, **FLAGS["dora, bias, dropped base"]))


def test_the_same_bits_in_any_order(simulated):
    p = make_problem(200, 136, 200, 20, F16, F32, gain=True, bias=True, dropout=0.2)
    results = []
    for seed in range(3):
        with device(seed=seed, resident=1 + 7 * (seed % 2)):
            results.append(run(p))
    assert all(one[name].equal(results[0][name]) for one in results for name in one)


def test_launches(simulated):
    """Beside the library's GEMMs: A packed where it is float32, h, what is elementwise; then B1,
    B3, dx's share, the sums."""
    for kind, flags, counts in (((BF16, None), {}, (2, 4)), ((BF16, F32), {"gain": True}, (3, 5)), ((F16, None), {}, (2, 4))):
        p = make_problem(70, 64, 64, 16, *kind, **flags)
        leaves = p.require_grad()
        with device() as forward:
            y = lora_linear(*p.arguments())
        with device() as backward:
            torch.autograd.grad(y, list(leaves.values()), p.dy)
        assert (forward.launches, backward.launches) == counts


def test_decode_with_float32_adapters(simulated):
    for m in (1, 16, 64):
        assert_problem(make_problem(m, 72, 136, 8, BF16, F32))


MEMBERS = [
    {"n_out": 136, "rank": 5}, {"n_out": 72, "rank": 33, "bias": True},
    {"n_out": 40, "rank": 16, "gain": True},
    {"n_out": 64, "rank": 8, "gain": True, "dropout": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("kind", [(BF16, F32), (F16, None)], ids=short)
@pytest.mark.parametrize("count", [2, 4])
def test_groups(simulated, kind, count):
    """x's gradient is rounded once for each of its terms, as PEFT's is; assert_group wants one
    rounding."""
    problems = make_group(MEMBERS[:count], 70, 72, kind[0], adapter_dtype=kind[1])
    found, _ = values_of(problems)
    for p, of in zip(problems, found, strict=True):
        alone = run(p)
        assert all(of[name].equal(alone[name]) for name in of)


def values_of(problems):
    leaves = [p.require_grad() for p in problems]
    dropout = [p.dropout for p in problems]
    ys = lora_linear_group(problems[0].x, [member(p) for p in problems], dropout)
    names = [[name for name in found if name != "x"] for found in leaves]
    tensors = [problems[0].x, *(found[name] for found, each in zip(leaves, names, strict=True) for name in each)]
    dx, *grads = torch.autograd.grad(ys, tensors, [p.dy for p in problems])
    rest = iter(grads)
    return [{"y": y} | {name: next(rest) for name in each} for y, each in zip(ys, names, strict=True)], dx


def test_x_of_a_group(simulated):
    """Its error is no more than that of the sum of what PEFT's layers give, each rounded."""
    problems = make_group(MEMBERS[:3], 70, 72, BF16, adapter_dtype=F32)
    _, dx = values_of(problems)
    wanted = sum(exact_dx(p) for p in problems)
    theirs = sum_of_rounded([exact_dx(p) for p in problems], BF16)
    assert rms(dx - wanted) <= 1.5 * rms(theirs - wanted)


def exact_dx(p):
    dy = p.dy.double() if p.gain is None else p.dy.double() * p.gain.double()
    return (dy @ p.w.double() + p.scale * dy @ p.b.double() @ p.a.double()).detach()


def sum_of_rounded(terms, dtype):
    total = torch.zeros_like(terms[0]).to(dtype)
    for term in terms:
        total = total + term.to(dtype)
    return total.double()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_error_beside_that_of_peft(simulated, dtype):
    """h Bᵀ is rounded before the GEMM adds to it. Of a trained adapter, whose term is small beside
    the base's, that is nothing to see; PEFT rounds h, h Bᵀ and the base, too. Where the adapter is
    all there is, it is one more rounding."""
    p = make_problem(200, 256, 264, 16, dtype)
    small, alone = replace(p, b=0.1 * p.b), replace(p, w=1e-3 * p.w, b=8 * p.b)
    for q, ratio in ((small, 1.03), (alone, 1.02 * 2**0.5)):
        x, w, a, b = (t.double() for t in (q.x, q.w, q.a, q.b))
        wanted = x @ w.T + q.scale * (x @ a.T) @ b.T
        peft = q.x @ q.w.T + (q.x @ q.a.T @ q.b.T) * q.scale
        with torch.no_grad():
            y = lora_linear(*q.arguments())
        assert_within_rounding(y, wanted, dtype, ratio, name="y")
        assert rms(y - wanted) <= rms(peft - wanted)


def expanded(m=200, n=200, r=40, dtype=BF16, of_b=F32, drop=0.25):
    """Arguments of `expand` with everything on, and what it should fill."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    h, b, z, gain, bias = normal(3, m, r), normal(n, r).to(of_b), normal(m, n).to(dtype), normal(n), normal(n)
    seed = torch.tensor(3)
    s = z.double() + h.double().sum(0) @ b.double().T
    wanted = mask(seed, drop, m, n, torch.float64, z.device) * (gain.double() * s - z.double()) + bias.double()
    return Term(h, b, z, gain, (drop, seed)), bias, wanted, s


@pytest.mark.parametrize(("dtype", "of_b"), [(BF16, F32), (F16, F32), (F16, F16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("n", [200, 131])
def test_expand(simulated, dtype, of_b, n):
    term, bias, wanted, s = expanded(n=n, dtype=dtype, of_b=of_b)
    out, z_out = torch.empty(200, n, dtype=dtype), torch.empty(200, n, dtype=dtype)
    skinny.expand(out, [term], less=1, bias=bias, z_out=z_out)
    assert_within_rounding(out, wanted, dtype, 1.02)
    assert_within_rounding(z_out, s, dtype, 1.02)
    # in place, and one more
    skinny.expand(term.z, [term, term._replace(drop=(0.0, None), z=None)], less=1, bias=bias)
    more = term.gain.double() * (term.h.double().sum(0) @ term.b.double().T)
    assert_within_rounding(term.z, out.double() + more, dtype, 1.02)


def test_what_expand_moves(simulated):
    """z is read once and out written once, h once for each 128 columns."""
    term, bias, *_ = expanded(m=512, n=384, r=16, of_b=BF16)
    out, h = torch.empty(512, 384, dtype=BF16), term.h[:1].contiguous()
    with device(trace=True, shuffle=False) as sim:
        skinny.expand(out, [Term(h, term.b, term.z, term.gain)], bias=bias)
    size = 512 * 384 * 2
    read, written = sim.dram()
    assert written == size and size <= read <= size + h.numel() * 4 + term.b.numel() * 2 + 2 * 384 * 4


@pytest.mark.parametrize(("source", "old", "new"), [
    (skinny.EXPAND, "__syncthreads();  // the tiles have been read", ";"),
    (skinny.EXPAND, "load_h(p, h_tile, row, end, rank);\n      __syncthreads();", "load_h(p, h_tile, row, end, rank);"),
    (skinny.EXPAND, "__syncthreads();\n#pragma unroll\n    for (int i = 0; i < ROWS", "\n    for (int i = 0; i < ROWS"),
    (skinny.EXPAND, "if (row == begin || p.r > RANKS) load_b", "if (row == begin) load_b"),
    (skinny.EXPAND, "part < p.parts", "part < 1"),
    (skinny.EXPAND, "mma_m16n8k16<B>(sums[i][j + l], f_rest[i]", "if (false) mma_m16n8k16<B>(sums[i][j + l], f_rest[i]"),
    (skinny.EXPAND, "if (!exact) mma_m16n8k16", "if (false) mma_m16n8k16"),
    (skinny.EXPAND, "if (row + r >= end || column + mine >= p.n) continue;", "if (row + r >= end) continue;"),
    (skinny.EXPAND, "if (row + r >= end || column + mine >= p.n) continue;", "if (column + mine >= p.n) continue;"),
    (skinny.EXPAND, "column / 4 + half", "column / 4"),
    (skinny.EXPAND, "- p.less * z[j]", ""),
    (skinny.EXPAND, "p.inverse * s[half * 4 + j]", "s[half * 4 + j]"),
    (skinny.EXPAND, "flip = mine / 32 % 2", "flip = 0"),
    (skinny.EXPAND, "", ""),
])  # fmt: skip
def test_planted_bugs_of_expand(planted, monkeypatch, simulated, source, old, new):
    planted(source, old, new, keep="lora_linear_expand_bf16")
    # so that a block walks down two steps
    monkeypatch.setattr(skinny, "part_of_rows", lambda *_, **__: 128)
    term, bias, wanted, s = expanded()
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for seed in range(2):
            out, z_out = torch.empty(200, 200, dtype=BF16), torch.empty(200, 200, dtype=BF16)
            with device(seed=seed) as sim:
                skinny.expand(out, [term], less=1, bias=bias, z_out=z_out)
            assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]
            assert_within_rounding(out, wanted, BF16, 1.02)
            assert_within_rounding(z_out, s, BF16, 1.02)


THIN_BUGS = {
    "shrink": [
        ("static_cast<const A*>(p.a) + i * p.r * p.a_row", "static_cast<const A*>(p.a)"),
        ("if (p.kept && blockIdx.y == 0 && t < p.m && at < p.kept_row)", "if (p.kept && blockIdx.y == 0 && at < p.kept_row)"),
        ("make_uint2(f[i], f[i + 2])", "make_uint2(f[i], f[i])"),
        ("at < size", "true"),
        ("mma_m16n8k16<__nv_bfloat16>(sums, f, rest0, rest1);", ""),
        ("if (std::is_same<T, __half>::value) mma_m16n8k16<__nv_bfloat16>(sums, f_rest, g0, g1);", ""),
        ("", ""),
    ],
    "any": [
        ("ANY ? (end + 7) / 8 * 8 : end", "end + 64"),
        ("row + r < rows && at < columns ? m[", "row + r < rows ? m["),
        ("* stride + at * step]", "* stride + at]"),
        ("", ""),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "old", "new"), [(kernel, *bug) for kernel, bugs in THIN_BUGS.items() for bug in bugs])
def test_planted_bugs_of_shrink(planted, simulated, kernel, old, new):
    dtype, k = F16, 136 if kernel == "shrink" else 75
    planted(skinny.THIN, old, new, keep=f"lora_linear_shrink_{'drop_split_f16_16' if kernel == 'shrink' else 'any_f16'}")
    p = make_problem(70, k, 8, 13, dtype, F32)
    x, seed = p.x if kernel == "shrink" else as_layout(p.x, "every_other"), torch.tensor(5)
    wanted = mask(seed, 0.3, 70, k, torch.float64, x.device) * p.x.double() @ p.a.double().T
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for order in range(2):
            with device(seed=order):
                h, kept = skinny.shrink(x, p.a, 1.0, (0.3, seed), keep=True)
            torch.testing.assert_close(h.double().sum(0), wanted, rtol=3e-5, atol=3e-5)
            assert kept.equal(p.x * (mask(seed, 0.3, 70, k, F32, x.device) > 0))
            assert not kept._base[:, k:].any()


@pytest.mark.parametrize(("old", "new"), [
    ("gain[j] * to_float(values[j])", "to_float(values[j])"),
    ("p.gain[column + c * 8 + j] - p.less", "p.gain[column + c * 8 + j]"),
    ("if (column + c * 8 >= p.scaled_row) return;", ""),
    ("if (row + r < end) *reinterpret_cast<uint4*>(out)", "*reinterpret_cast<uint4*>(out)"),
    ("p.v.dtype != 1", "false"),
    ("", ""),
])  # fmt: skip
def test_planted_bugs_of_sides(planted, simulated, old, new):
    planted(skinny.SIDES, old, new, keep="lora_linear_sides_f16_16")
    p = make_problem(70, 8, 136, 13, F16, F32)
    gain, h = torch.randn(136) if "dtype" not in old else None, torch.randn(70, 13)
    of = p.dy.double()
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for order in range(2):
            with device(seed=order):
                found = skinny.both_sides(p.dy, p.b, h, None, gain, 2.0, True, 13, None if gain is None else 1)
            gains = torch.ones(136).double() if gain is None else gain.double()
            torch.testing.assert_close(found[0].double().sum(0), 2.0 * of * gains @ p.b.double(), rtol=3e-5, atol=3e-4)
            torch.testing.assert_close(found[1].double().sum(0), of.T @ h.double(), rtol=3e-5, atol=3e-4)
            if gain is not None:
                assert_within_rounding(found[4], of * (gains - 1), F16, 1.02)
