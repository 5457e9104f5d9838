"""lora_linear on a base of int8 with a scale for each row: W = w_scale ⊙ w."""

from contextlib import nullcontext

import pytest
import torch

from lora_kernels import lora_linear, use_backend
from lora_kernels.ops.lora_linear import cuda_backward
from lora_kernels.ops.registry import ON_GPU
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc
from lora_kernels.testing import assert_within_rounding
from tests.ops.interpreted import deterministic

DTYPES = [torch.bfloat16, torch.float16]


def draw(m, k, n, r, dtype):
    torch.manual_seed(0)
    x, a, b = torch.randn(m, k), torch.randn(r, k) * k**-0.5, torch.randn(n, r) * r**-0.5
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return x.to(dtype), w, a.to(dtype), b.to(dtype), (torch.rand(n) + 0.5) / 64 * k**-0.5


def wide(x, w, a, b, w_scale):
    x, a, b = (t.detach().double() for t in (x, a, b))
    return x, w_scale.double()[:, None] * w.double(), a, b


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.filterwarnings("ignore:.*slow reference")
def test_values_and_gradients(dtype):
    """Those of the layer whose weight is W: dx is that of the numbers that forward multiplies
    with."""
    x, w, a, b, w_scale = draw(5, 48, 24, 3, dtype)
    gain, bias, dy = torch.randn(24), torch.randn(24), torch.randn(5, 24)
    flags = {"dropout": 0.2, "seed": torch.tensor(1)}
    results = []
    for x_, w_, a_, b_, scale in ((x, w, a, b, {"w_scale": w_scale}), (*wide(x, w, a, b, w_scale), {})):
        kind = torch.float64 if not scale else torch.float32
        leaves = [t.clone().requires_grad_() for t in (x_, a_, b_, bias.to(kind), gain.to(kind))]
        y = lora_linear(leaves[0], w_, leaves[1], leaves[2], 0.5, leaves[3], leaves[4], **flags, **scale)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for found, wanted in zip(*results, strict=True):
        # the numbers of the sums are of size 1; dy is rounded, too
        close = 1e-4 if dtype is torch.float32 else 0.05
        torch.testing.assert_close(found.double(), wanted, rtol=close, atol=close)
    assert results[0][0].dtype is dtype


def test_gradcheck():
    x, w, a, b, w_scale = draw(3, 16, 8, 2, torch.float64)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, w, a, b, 0.5, w_scale=w_scale.double()), leaves)


@pytest.mark.filterwarnings("ignore:.*slow reference")
def test_opcheck_and_compile():
    x, w, a, b, w_scale = draw(3, 16, 8, 2, torch.float32)
    plain = (x, w, a, b, 1.0, None, None, 0.0, None, False)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_forward.default, (*plain, True, False, w_scale))
    y, h, z = torch.ops.lora_kernels.lora_linear_forward(*plain, True, False, w_scale)
    needs = [1, 1, 1, 0, 0]
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_backward.default, (y, *plain, h, None, None, needs, w_scale))
    compiled = torch.compile(lambda x: lora_linear(x, w, a, b, 0.5, w_scale=w_scale), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), lora_linear(x, w, a, b, 0.5, w_scale=w_scale))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"w_scale": None}, TypeError, r"w must have the dtype of x, torch.float32, found torch.int8 \(int8 wants w_scale\)"),
    ({"w": torch.zeros(8, 16)}, TypeError, "w must be int8, since w_scale is given, found torch.float32"),
    ({"w_scale": torch.ones(7)}, ValueError, r"w_scale must have shape \[8\], found \[7\]"),
    ({"w_scale": torch.ones(8, dtype=torch.int32)}, TypeError, "w_scale must be floating, found torch.int32"),
    ({"w_scale": 0.5}, TypeError, "w_scale must be a tensor, found float"),
    ({"w_scale": torch.ones(8, requires_grad=True)}, ValueError, "w_scale is frozen and gets no gradient"),
])  # fmt: skip
def test_what_does_not_fit(change, error, message):
    x, w, a, b, w_scale = draw(3, 16, 8, 2, torch.float32)
    args = {"x": x, "w": w, "a": a, "b": b, "w_scale": w_scale} | change
    with pytest.raises(error, match=f"lora_linear: {message}"):
        lora_linear(**args)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_that_refuse(backend):
    x, w, a, b, w_scale = draw(3, 16, 8, 2, torch.float32)
    simulate = backend in ON_GPU  # on the CPU the missing GPU is what it says first
    with use_backend(backend, simulate), pytest.raises(NotImplementedError, match="w is torch.int8; the kernels read float32"):
        lora_linear(x, w, a, b, w_scale=w_scale)


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason=f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)")
SHAPES = [(1, 64, 64, 16), (5, 272, 136, 17), (16, 1104, 72, 8), (17, 512, 203, 65), (64, 784, 130, 5), (3, 16, 8, 2)]


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_of_cuda(shape, dtype):
    x, w, a, b, w_scale = draw(*shape, dtype)
    bias, gain = torch.randn(shape[2]).to(dtype), torch.randn(shape[2])
    x_wide, w_wide, a_wide, b_wide = wide(x, w, a, b, w_scale)
    for seed, (p, g) in enumerate([(None, None), (bias, gain)]):
        vectors = (None if v is None else v.double() for v in (p, g))
        wanted = lora_linear(x_wide, w_wide, a_wide, b_wide, 0.5, *vectors)
        with use_backend("cuda", simulate=True), deterministic(bool(seed)), device(seed=seed) as sim:
            y = lora_linear(x, w, a, b, 0.5, p, g, w_scale=w_scale)
        assert_within_rounding(y, wanted, dtype, 1.02, name="y")
        assert sim.launches == 1
        assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]


@needs_nvcc
def test_every_byte_of_w():
    """All numbers of int8, exactly, in both types."""
    w = torch.arange(-128, 128).to(torch.int8).repeat(16, 1)[:, torch.randperm(256)].contiguous()
    for dtype in DTYPES:
        x = torch.zeros(64, 256, dtype=dtype)
        x[torch.arange(64), torch.arange(64) * 4 + 3] = 1
        zero = torch.zeros(1, 256, dtype=dtype), torch.zeros(16, 1, dtype=dtype)
        with use_backend("cuda", simulate=True):
            y = lora_linear(x, w, *zero, w_scale=torch.ones(16))
        assert torch.equal(y, w[:, 3::4].T.to(dtype))


@needs_nvcc
def test_w_is_read_once_in_bytes():
    x, w, a, b, w_scale = draw(4, 1024, 512, 16, torch.bfloat16)
    with use_backend("cuda", simulate=True), deterministic(False), device(trace=True) as sim:
        lora_linear(x, w, a, b, 0.5, w_scale=w_scale)
    size = sum(t.numel() * t.element_size() for t in (x, w, a, b, w_scale))
    assert size <= sim.dram()[0] <= size + 64


@needs_nvcc
@pytest.mark.parametrize(("old", "new", "times"), [
    ("four ^ 0x80808080u", "four", 2),  # of both types
    ("- 8388736.f", "- 8388608.f", 1),
    ("sixteen % 4 * 2 + lane % 4 / 2", "sixteen % 4 * 2 + lane % 2", 1),
    ("sums[j][i] *= w_scale[i / 2]", "sums[j][i] *= w_scale[i % 2]", 1),
    ("PAIRS : Swizzle::EIGHT", "EIGHT : Swizzle::EIGHT", 1),
])  # fmt: skip
def test_planted_bugs(planted, old, new, times):
    planted("lora_linear/cuda_small.cu", old, new, keep="lora_linear_small_i8_bf16_16", times=times)
    x, w, a, b, w_scale = draw(9, 272, 72, 5, torch.bfloat16)
    wanted = lora_linear(*wide(x, w, a, b, w_scale), 0.5)
    with pytest.raises(AssertionError), use_backend("cuda", simulate=True), device() as sim:
        y = lora_linear(x, w, a, b, 0.5, w_scale=w_scale)
        assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]
        assert_within_rounding(y, wanted, torch.bfloat16, 1.02)


def gradients(args, gain=None, bias=None, dy=None, backend="cuda"):
    """Those of x, a, b and of gain and bias, if they are there: of `args` in float64 if there is no
    backend."""
    x, w, a, b, w_scale = args
    if backend is None:
        x, w, a, b = wide(*args)
        gain, bias, dy = (None if v is None else v.double() for v in (gain, bias, dy))
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, gain, bias) if t is not None]
    of = dict(zip("xab", leaves, strict=False)) | {name: t for name, t in zip(("gain", "bias"), leaves[3:], strict=False)}
    with use_backend("reference"):
        y = lora_linear(
            of["x"],
            w,
            of["a"],
            of["b"],
            0.5,
            of.get("bias"),
            of.get("gain"),
            **({} if backend is None else {"w_scale": w_scale}),
        )
    with use_backend(backend or "reference", simulate=backend == "cuda"):
        return dict(zip(of, torch.autograd.grad(y, leaves, dy), strict=True))


@needs_nvcc
@pytest.mark.parametrize(
    "shape", SHAPES[:3] + [(17, 512, 208, 65), (64, 784, 136, 5), (3, 16, 8, 2), (33, 272, 1096, 16)], ids=str
)
def test_gradients_of_cuda(shape):
    args = draw(*shape, torch.bfloat16)
    bias, gain, dy = torch.randn(shape[2]), torch.randn(shape[2]), torch.randn(shape[0], shape[2]).bfloat16()
    for seed, more in enumerate([{}, {"gain": gain}, {"gain": gain, "bias": bias}]):
        wanted = gradients(args, **more, dy=dy, backend=None)
        with deterministic(bool(seed)), device(seed=seed) as sim:
            found = gradients(args, **more, dy=dy)
        for name in "xab":
            assert_within_rounding(found[name], wanted[name], torch.bfloat16, 1.02, name=name)
        for name in more:  # dgain is had from a rounded y
            assert (found[name].double() - wanted[name]).norm() <= 5e-3 * wanted[name].norm(), name
        assert sim.launches == 4 + (more.keys() == {"gain"})
        assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]


@needs_nvcc
def test_gains_of_zero():
    args = draw(5, 64, 24, 3, torch.bfloat16)
    gain, dy = torch.randn(24), torch.randn(5, 24).bfloat16()
    gain[[0, 7, 8, 20]] = 0
    with device():
        found = gradients(args, gain, dy=dy)["gain"]
    wanted = gradients(args, gain, dy=dy, backend=None)["gain"]
    torch.testing.assert_close(found[gain == 0].double(), wanted[gain == 0], rtol=1e-4, atol=1e-4)


@needs_nvcc
def test_any_order_gives_the_same_gradients():
    args, dy = draw(20, 272, 1096, 5, torch.bfloat16), torch.randn(20, 1096).bfloat16()
    results = []
    for seed in range(3):
        with deterministic(False), device(seed=seed, resident=1 + 7 * (seed % 2)):
            results.append(gradients(args, dy=dy))
    assert all(one[name].equal(results[0][name]) for one in results for name in one)


@needs_nvcc
def test_a_row_alone_has_the_same_gradient():
    args, dy = draw(40, 128, 136, 5, torch.bfloat16), torch.randn(40, 136).bfloat16()
    with deterministic(True), device():
        dx = gradients(args, dy=dy)["x"]
        for row in (0, 39):
            alone = (args[0][row : row + 1], *args[1:])
            assert gradients(alone, dy=dy[row : row + 1])["x"].equal(dx[row : row + 1])


@needs_nvcc
def test_backward_reads_w_once_in_bytes():
    x, w, a, b, w_scale = draw(4, 1024, 512, 16, torch.bfloat16)
    dy, p, gain = torch.randn(4, 512).bfloat16(), torch.randn(1, 4, 16), torch.randn(512)
    with use_backend("cuda", simulate=True), deterministic(False), device(trace=True) as sim:
        cuda_backward.input_gradient_small(dy, w, a, p, gain, w_scale)
    size = sum(t.numel() * t.element_size() for t in (w, a, dy, p, gain, w_scale))
    assert size <= sim.dram()[0] <= size + 64
    assert sim.launches == 1


MORE_BUGS_OF_DX = [
    ("0x3120", "0x3210"),
    ("  __syncthreads();  // all copies", "  __syncwarp();  //"),
    ("cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    ("step + 1) * STEP, end);\n    __syncthreads();", "step + 1) * STEP, end);"),
    ("step + 1) * STEP, end);", "step) * STEP, end);"),
    ("make_uint2(__byte_perm(v.x, v.y, 0x7632)", "make_uint2(__byte_perm(v.x, v.y, 0x5410)"),
    ("low ? rest : tile", "tile"),
    ("if (blockIdx.y == 0) add_adapter", "add_adapter"),
    ("if (!is_last_block(p.tickets + blockIdx.x, parts)) return;", ""),
    ("rank + r < p.r && at < p.k", "at < p.k"),
]  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize(("old", "new"), [
    ("    __syncthreads();  // the tiles have been read\n", ""),
    ("token < p.m && at < p.k", "at < p.k"),
    ("", ""),
    *(pytest.param(*bug, marks=pytest.mark.slow) for bug in MORE_BUGS_OF_DX),
])  # fmt: skip
def test_planted_bugs_of_dx(planted, old, new):
    planted(cuda_backward.DX_SMALL, old, new, keep="lora_linear_dx_small_16")
    args, dy = draw(9, 272, 1096, 70, torch.bfloat16), torch.randn(9, 1096).bfloat16()
    wanted = gradients(args, dy=dy, backend=None)["x"]
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for seed in range(2):
            with deterministic(False), device(seed=seed) as sim:
                found = gradients(args, dy=dy)["x"]
            assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]
            assert_within_rounding(found, wanted, torch.bfloat16, 1.02)


@needs_nvcc
@pytest.mark.parametrize(("shape", "flags", "message"), [
    ((65, 64, 64, 4), {}, "w is int8; the kernel for that takes up to 64 rows of x, found 65"),
    ((4, 64, 64, 4), {"dropout": 0.1}, "found 4, and has no dropout"),
    ((4, 24, 64, 4), {}, "x has 24 columns; w is int8, and the kernel for that needs a multiple of 16"),
])  # fmt: skip
def test_what_cuda_refuses(shape, flags, message):
    x, w, a, b, w_scale = draw(*shape, torch.bfloat16)
    with use_backend("cuda", simulate=True), pytest.raises(NotImplementedError, match=message):
        lora_linear(x, w, a, b, w_scale=w_scale, **flags)


@needs_nvcc
@pytest.mark.parametrize(("m", "k", "message"), [
    (65, 64, "w is int8; the kernel for that takes up to 64 rows of x, found 65"),
    (4, 24, "x has 24 columns; w is int8, and the kernel for that needs a multiple of 16"),
])  # fmt: skip
def test_what_the_backward_of_cuda_refuses(m, k, message):
    args = draw(m, k, 64, 4, torch.bfloat16)
    with pytest.raises(NotImplementedError, match=message):
        gradients(args, dy=torch.randn(m, 64).bfloat16())
