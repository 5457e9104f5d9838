"""Numbers of 8 bits as Triton compiles them for sm_89 and sm_120, and its assertions."""

import pytest
import torch

from lora_kernels.ptxsim import Kernel, SimulationError

pytest.importorskip("triton", reason="triton is not installed here (requirements-dev.txt has it for Linux on x86-64)")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_kernels.ptxsim.triton_ptx import simulate_triton
from tests.ptxsim import triton_kernels as kernels
from tests.ptxsim.test_triton import close, dot_arguments, own_cache  # noqa: F401

EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", EIGHT, ids=str)
@pytest.mark.parametrize("arch", [89, 120])
def test_dot(dtype, arch):
    torch.manual_seed(0)
    args, wanted = dot_arguments(64, 64, 128, dtype, (32, 64, 64))
    run = simulate_triton(kernels.dot, (2, 1), args, [args["y"]], arch=arch)
    assert any("e4m3" in name or "e5m2" in name for name in run.by_opcode)
    close(args["y"], wanted, 2e-7)
    x, w = args["x"].float(), args["w"].float()
    sums = torch.zeros(64, 64)
    for k in range(128):
        sums += x[:, k : k + 1] * w[k]
    assert torch.equal(args["y"], sums)  # in order of k, in float32


@triton.jit
def copy(x, y, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@pytest.mark.parametrize("dtype", EIGHT, ids=str)
def test_conversions(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    for wide in (torch.float16, torch.float32):
        y = torch.zeros(256, dtype=wide)
        simulate_triton(copy, (1,), {"x": every, "y": y, "B": 256}, [y], arch=89)
        assert torch.equal(y.nan_to_num(7e4), every.to(wide).nan_to_num(7e4))
        # numbers of float16, by way of which Triton goes, that no type overflows at
        x = torch.cat([torch.randn(200) * 40, torch.randn(56) * 0.01]).clamp(-400, 400).half().to(wide)
        back = torch.zeros(256, dtype=dtype)
        simulate_triton(copy, (1,), {"x": x, "y": back, "B": 256}, [back], arch=89)
        assert torch.equal(back.float(), x.to(dtype).float())


@triton.jit
def checked(x, y, B: tl.constexpr):
    at = tl.arange(0, B)
    value = tl.load(x + at)
    tl.device_assert(value >= 0, "negative")
    tl.store(y + at, value)


def test_assertions():
    source = ASTSource(fn=checked, signature={"x": "*i32", "y": "*i32", "B": "constexpr"}, constexprs={"B": 64})
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1, "debug": True})
    kernel = Kernel(made.asm["ptx"])
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    rest = [0] * (len(kernel.parameters) - 2)
    kernel.launch((1,), (32,), [x, y, *rest], [y])
    assert torch.equal(x, y)
    x[40] = -1
    with pytest.raises(SimulationError, match=r"lane 8: assertion failed: negative, .*test_eight_bits\.py:\d+"):
        kernel.launch((1,), (32,), [x, y, *rest], [y])
