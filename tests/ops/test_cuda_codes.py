"""CUDA C++ of up to 64 tokens on a quantised W in the simulator: numbers, bits, what is read, what
is refused, and planted bugs."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from lora_kernels import QuantisedWeight, explain, lora_linear, use_backend
from lora_kernels.ops import cost
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.dispatch import choose_plan
from lora_kernels.ops.lora_linear import cuda_small
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc
from lora_kernels.testing import assert_within_rounding, make_problem
from tests.ops.interpreted import deterministic
from tests.ops.quantised import KINDS, make_format, make_quantised

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

BF16, F16 = torch.bfloat16, torch.float16
EXACT = 1.02  # of the error of rounding y: neither W nor h is rounded otherwise than in the formula


@pytest.fixture(autouse=True)
def simulated():
    """Not deterministic, so that W is read in parts; the memory of all tests is poisoned, which
    switches that on."""
    with use_backend("cuda", simulate=True), deterministic(False):
        yield


def draw(m, n, k, r, kind, block, dtype):
    """x, w, a, b."""
    p, w = make_problem(m, k, n, r, dtype), make_quantised(kind, n, k, k if kind == "int8" else block, dtype)
    return p.x, w, p.a, p.b


def exact(x, w, a, b, scale=1.0, bias=None, gain=None):
    x, w, a, b = (t.double() for t in (x, dequantised(w), a, b))
    z = x @ w.T + scale * (x @ a.T) @ b.T
    return z * (1 if gain is None else gain.double()) + (0 if bias is None else bias.double())


# m, n, k, r, kind, block: both widths of the product, edges of tiles, steps and parts, blocks
# across rows, of a part of a row, of several rows, and a last one that is short
SHAPES = [
    (1, 67, 96, 8, "nested", 64), (5, 130, 1056, 1, "nibbles", 64), (16, 65, 512, 64, "nested", 32),
    (3, 33, 288, 16, "nibbles", 4096), (17, 72, 2176, 65, "nested", 128), (64, 130, 800, 8, "nibbles", 256),
    (33, 3, 32, 1, "nested", 64), (9, 200, 272, 8, "int8", 0), (40, 67, 1104, 5, "int8", 0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(monkeypatch, shape, dtype):
    """And the same bits with the blocks in another order, few of them at once."""
    args, n = draw(*shape, dtype), shape[1]
    for part, vectors in ((64, (torch.randn(n).to(dtype), torch.randn(n))), (640, (None, None))):
        monkeypatch.setattr(cuda_small, "split_k_part", lambda *_, part=part: part)
        ys = []
        for seed in range(2):
            with device(seed=seed, resident=1 + 5 * seed) as sim:
                ys.append(lora_linear(*args, 0.5, *vectors))
        assert torch.equal(*ys)
        assert_within_rounding(ys[0], exact(*args, 0.5, *vectors), dtype, EXACT, name="y")
        assert sim.launches == 1


def same_numbers(w, tokens=64):
    """Bit for bit: each token takes one column of W alone."""
    n, k = w.shape
    zero = torch.zeros(1, k, dtype=w.dtype), torch.zeros(n, 1, dtype=w.dtype)
    ys = [lora_linear(x, w, *zero) for x in torch.eye(k, dtype=w.dtype).split(tokens)]
    return torch.equal(torch.cat(ys), dequantised(w).T)


def with_a_scale_of_zero(w):
    """Nested scales, of which the first is zero if its product is rounded before the sum."""
    return replace(w, scales=w.scales * 0 + 77, offset=-w.outer_table[77] * w.outer[0])


@pytest.mark.parametrize("kind", ["nibbles", "nested", "int8"])
def test_numbers_are_the_formulas(kind):
    for dtype in (BF16, F16):
        w = make_quantised(kind, 66, 96, 96 if kind == "int8" else 64, dtype)
        assert same_numbers(w)
    if kind == "nested":
        zero = with_a_scale_of_zero(w)
        assert not dequantised(zero).any() and same_numbers(zero)


@pytest.mark.slow
def test_other_architectures():
    args = draw(9, 67, 160, 8, "nested", 64, BF16)
    with device(arch=90):
        y = lora_linear(*args)
    assert_within_rounding(y, exact(*args), BF16, EXACT, name="y")


@pytest.mark.parametrize(("kind", "m"), [("nested", 4), ("nibbles", 64), ("int8", 16)])
def test_what_is_read(kind, m):
    """Every byte from memory once. Codes come into a block in whole sectors; of its scales a sector
    holds several, and the others are for its next steps. What lanes look up in shared memory takes
    them a pass each, but for scales that are codes."""
    args = x, w, a, b = draw(m, 128, 1024, 16, kind, 64, BF16)
    with device(trace=True) as sim:
        lora_linear(*args)
    inputs = w.nbytes + sum(t.nbytes for t in (x, a, b))
    read, _ = sim.dram()
    assert inputs <= read <= inputs + 128  # the tickets, and what is less than a sector
    codes, tiles = w.codes.nbytes, 128 // 64
    scratch = tiles * 4 * 64 * 64 * (16 if m <= 16 else 64)
    words = 0 if kind == "int8" else w.numel() // 32 * 4 * (2 if kind == "nested" else 1)
    assert sim.counters["load_bytes"] <= codes + words + (tiles + 1) * x.nbytes + a.nbytes + 2 * scratch
    assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]


def test_a_row_among_others():
    """In the deterministic mode a row's bits do not depend on how many come with it; NaN in one
    stays there."""
    x, w, a, b = draw(64, 72, 544, 20, "nested", 64, BF16)
    x[50] = float("nan")
    with deterministic(True):
        y = lora_linear(x, w, a, b, 0.5)
        for first, count in ((7, 1), (20, 30)):
            assert torch.equal(lora_linear(x[first : first + count], w, a, b, 0.5), y[first : first + count])
    assert y[50].isnan().all() and not y[:50].isnan().any() and not y[51:].isnan().any()


def test_what_backward_needs():
    """h in float32 and z; the gradients are another backend's."""
    x, w, a, b = draw(5, 72, 96, 8, "nested", 64, BF16)
    gain, bias = torch.randn(72).requires_grad_(), torch.randn(72)
    y = lora_linear(x, w, a.requires_grad_(), b, 0.5, bias, gain)
    assert_within_rounding(y.detach(), exact(x, w, a.detach(), b, 0.5, bias, gain.detach()), BF16, EXACT, name="y")
    with pytest.raises(NotImplementedError, match="backward cannot run on cuda: w is a QuantisedWeight"):
        y.sum().backward()
    with use_backend("triton", simulate=True):
        found = torch.autograd.grad(lora_linear(x, w, a, b, 0.5, bias, gain).sum(), (a, gain))
    y = lora_linear(x, w, a, b, 0.5, bias, gain)
    with use_backend("triton", simulate=True):
        for one, other in zip(torch.autograd.grad(y.sum(), (a, gain)), found, strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(0, 64, 64), (2, 0, 64), (3, 64, 0)], ids=str)
def test_nothing_to_do(shape):
    m, n, k = shape
    x, a, b = (torch.randn(s, dtype=BF16) for s in ((m, k), (4, k), (n, 4)))
    w = QuantisedWeight(
        torch.empty(n * k // 2, dtype=torch.uint8), (n, k), torch.ones(-(-n * k // 64)), 64, BF16, torch.ones(16)
    )
    assert torch.equal(lora_linear(x, w, a, b, 0.5, torch.ones(n)), torch.ones(m, n, dtype=BF16))


def refused(match, x, w, a, b, **flags):
    with pytest.raises(NotImplementedError, match=f"lora_linear_forward cannot run on cuda: {match}"):
        lora_linear(x, w, a, b, **flags)


def test_what_is_refused():
    """In words, each tensor by its name."""
    args = x, w, a, b = draw(4, 40, 96, 8, "nested", 64, BF16)
    refused("w is quantised; the kernel for codes takes up to 64 rows of x, found 65", x.new_ones(65, 96), *args[1:])
    refused("w is quantised; .* and has no dropout", *args, dropout=0.1)
    refused("x is torch.bfloat16 and a torch.float32; w is quantised", x, w, a.float(), b.float())
    refused("x is torch.float32; the kernels read bfloat16", x.float(), w.to(torch.float32), a, b)
    refused("x has 80 columns; the kernel for codes of 4 bits needs a multiple of 32", *draw(4, 40, 80, 8, "nested", 64, BF16))
    refused("x has 97 columns; the kernel for codes of 4 bits", *draw(4, 40, 97, 8, "nibbles", 64, BF16))
    refused("x has 97 columns; the kernel for codes of int8 needs a multiple of 16", *draw(4, 40, 97, 8, "int8", 64, BF16))
    for block in (16, 96):
        refused(f"w has blocks of {block}; .* power of two, of at least 32", *draw(4, 40, 96, 8, "nested", block, BF16))
    refused("the scales of w have blocks of 100", x, replace(w, outer_block=100, outer=torch.ones(1)), a, b)
    refused("w is int8 with blocks of 32; .* for each row, of 96", x, make_quantised("int8", 40, 96, 32, BF16), a, b)
    refused("w is float8_e4m3fn", x, make_quantised("float8", 40, 96, 96, BF16), a, b)
    refused("w has 4-bit codes in another order", x, make_format("mxfp4", 40, 96, BF16), a, b)
    shifted = torch.empty(w.codes.numel() + 1, dtype=torch.uint8)[1:].copy_(w.codes)
    refused("a part of the quantised w does not begin at a multiple of 16 bytes", x, replace(w, codes=shifted), a, b)
    refused("b has strides", x, w, a, b.T.contiguous().T)
    refused("the rows of a do not begin", x, w, torch.empty(a.numel() + 1, dtype=BF16)[1:].view_as(a).copy_(a), b)


def test_the_choice():
    """By bytes, beside Triton's kernels; alone it is the only one."""
    told = explain(lora_linear, *draw(4, 40, 96, 8, "nested", 64, BF16)).decisions[0]
    assert told.plan.winner == cost.CUDA and "cuda" in str(told)
    w = make_quantised("nested", 4096, 4096, 64, BF16)
    problem, both = Problem("forward", 16, 4096, (4096,), (16,), BF16, codes=w.nbytes), ("triton", "cuda")
    for arch in (80, 90, 120):
        found = {c.name: c for c in choose_plan(problem, arch, backends=both).candidates}
        assert found["cuda"].launches == 1 and found["cuda"].refused is None
        assert w.nbytes < found["cuda"].bytes < 1.2 * w.nbytes
        assert choose_plan(problem, arch, backends=both).winner == "cuda"
        for other in (problem._replace(m=65), problem._replace(dropout=True)):
            refusal = {c.name: c.refused for c in choose_plan(other, arch, backends=both).candidates}
            assert "of codes it takes up to 64, without dropout" in refusal["cuda"]
        assert choose_plan(problem, arch, True, backends=both).winner != "cuda"
    assert "w is quantised" in {c.name: c.refused for c in choose_plan(problem, 90, backends=both).candidates}["specialised"]


@pytest.mark.parametrize("kind", KINDS[:3])
def test_with_triton_there(monkeypatch, kind):
    """What is refused is what Triton takes."""
    monkeypatch.setattr(cuda_small, "stands_alone", lambda: False)
    args = draw(4, 64, 1024, 8, kind, 64, BF16)
    assert_within_rounding(lora_linear(*args), exact(*args), BF16, EXACT)
    with deterministic(True):
        refused("Triton's two launches is the choice", *args)


BUGS = [
    # the wrong half
    ("table[byte >> 4 & 15] * scale, table[byte & 15]", "table[byte & 15] * scale, table[byte >> 4 & 15]"),
    # the neighbour's scale
    ("owner = lane / 4 * 4 + 2 * step + half", "owner = lane / 4 * 4 + (2 * step + half + 1) % 4"),
    ("scale[i], owner)", "scale[0], owner)"),
    ("(word + SCALE_BYTES)), offset)", "(word + SCALE_BYTES)), 0.f)"),  # the offset forgotten
    ("__fadd_rn(__fmul_rn(fine, *reinterpret_cast<const float*>(word + SCALE_BYTES)), offset)",
     "fine * *reinterpret_cast<const float*>(word + SCALE_BYTES) + offset"),  # rounded once
    ("min(uint32_t(p.blocks) - first, 4u)", "4u"),  # beyond the last block
    (">> p.shift & 3", ">> p.shift & 1"),
    ("block >> p.outer_shift", "block >> p.shift"),
    ("row * layer.k + begin", "row * layer.k / 2 + begin"),
    ("is_row[i] = row < layer.n", "is_row[i] = true"),
    ("step * CODES + group * GROUP < columns", "true"),
    ("row % 2 * GROUPS + at", "at"),
    ("(at ^ row % 2 * 4)", "(at ^ row % 2)"),  # eight lanes in four places of the banks
    ("if (threadIdx.x < 16) table", "if (threadIdx.x < 15) table"),
    ("  __syncthreads();  // all copies", "  __syncwarp();  //"),
    ("begin / 2 + group * PIECE", "begin + group * PIECE"),
    ("token + i < p.layer.m", "true"),
    ("mma_m16n8k16<T>(sums[j], f[1], g.z, g.w)", "mma_m16n8k16<T>(sums[j], f[1], g.x, g.y)"),
    ("", ""),
]  # fmt: skip
QUICK = 0, 1, 3, 5, len(BUGS) - 1


@pytest.mark.parametrize(
    ("old", "new"), [each if i in QUICK else pytest.param(*each, marks=pytest.mark.slow) for i, each in enumerate(BUGS)]
)
def test_planted_bugs(planted, monkeypatch, old, new):
    """Numbers, races, bounds; a missing swizzle shows in the passes of shared memory."""
    planted(cuda_small.OF_CODES, old, new, keep="lora_linear_codes_u4_bf16_16")
    monkeypatch.setattr(cuda_small, "split_k_part", lambda *_: 256)
    # the last block is short, and the last word of scales has one
    x, w, a, b = draw(9, 67, 352, 8, "nested", 64, BF16)
    assert w.numel() % 64 and w.blocks % 4
    wanted = exact(x, w, a, b)
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        with device() as sim:
            y = lora_linear(x, w, a, b)
        assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]
        assert_within_rounding(y[1:], wanted[1:], BF16, EXACT)
        small = make_quantised("nested", 5, 96, 32, BF16)
        assert same_numbers(small, 16) and same_numbers(with_a_scale_of_zero(small), 16)
