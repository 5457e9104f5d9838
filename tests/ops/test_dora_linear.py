"""dora_linear: y and the norm against float64 on every backend, and one read of W in Triton's
kernel."""

import pytest
import torch

from lora_kernels import dora_linear, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.ptxsim import device
from lora_kernels.testing import make_problem

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(1, 64, 48, 4), (5, 130, 65, 17), (64, 96, 80, 64), (70, 40, 33, 3), (3, 40, 33, 100), (0, 16, 16, 2)]


def check(shape, dtype, adapters=None, bias=True):
    m, k, n, r = shape
    p = make_problem(m, k, n, r, dtype, adapters or dtype, bias=bias)
    magnitude = torch.randn(n)
    with torch.no_grad():
        p.w[0], p.b[0] = 0, 0
    y, norm = dora_linear(p.x, p.w, p.a, p.b, magnitude, 0.5, p.bias)
    x, w, a, b = (t.detach().double() for t in (p.x, p.w, p.a, p.b))
    adapted = w + 0.5 * b @ a
    wanted = adapted.square().sum(1).sqrt()
    assert norm.dtype is F32 and y.dtype is dtype and norm[0] == 0
    assert ((norm - wanted).abs() <= (1e-5 if dtype is F32 else 1e-4) * wanted).all()
    gain = torch.where(wanted == 0, 1.0, magnitude.double() / torch.where(wanted == 0, 1.0, wanted))
    exact = gain * (x @ adapted.T) + (p.bias.double() if bias else 0.0)
    error = (y - exact).norm()
    rounding = (exact.to(dtype) - exact).norm()
    assert error <= (1.5 * rounding if dtype is not F32 else 2e-6 * exact.norm() + 1e-30)
    again, norm_again = dora_linear(p.x, p.w, p.a, p.b, magnitude, 0.5, p.bias)
    assert torch.equal(again, y) and torch.equal(norm_again, norm)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_values(backend, dtype, shape):
    with use_backend(backend):
        check(shape, dtype)


@pytest.mark.skipif("triton" in missing_backends(), reason=missing_backends().get("triton", ""))
class TestTriton:
    @pytest.fixture(autouse=True)
    def simulated(self):
        with use_backend("triton", simulate=True):
            yield

    @pytest.mark.parametrize(("shape", "dtype", "adapters"), [
        (SHAPES[0], BF16, BF16), (SHAPES[1], BF16, F32), (SHAPES[2], F16, F16), (SHAPES[1], F32, F32), (SHAPES[3], BF16, BF16),
        (SHAPES[4], BF16, BF16), (SHAPES[5], BF16, BF16),
    ])  # fmt: skip
    def test_values(self, shape, dtype, adapters):
        check(shape, dtype, adapters, bias=False)

    @pytest.mark.parametrize("arch", [90, 120])
    def test_other_architectures(self, arch):
        with device(arch):
            check(SHAPES[1], BF16)

    def test_w_is_read_once(self):
        """One launch; W, which is nearly all there is to read, by each of its bytes once."""
        p = make_problem(16, 512, 256, 8, BF16)
        with device(trace=True) as sim:
            dora_linear(p.x, p.w, p.a, p.b, torch.ones(256), 0.5)
        size = {name: getattr(p, name).numel() * 2 for name in "xwab"}
        blocks = 256 // 32
        assert sim.launches == 1
        # some of them by several warps
        others = size["b"] + blocks * (size["x"] + size["a"]) + 4 * 256
        assert sim.counters["load_bytes"] <= size["w"] + 1.2 * others
        read, written = sim.dram()
        assert read <= 1.03 * sum(size.values()) + 4 * 256 and written == 2 * 16 * 256 + 4 * 256


def test_errors():
    p = make_problem(3, 16, 8, 2, F32)
    with pytest.raises(ValueError, match="dora_linear: gain must have shape .8., found .7."):
        dora_linear(p.x, p.w, p.a, p.b, torch.ones(7))


def test_registered():
    p = make_problem(3, 16, 8, 2, F32)
    torch.library.opcheck(torch.ops.lora_kernels.dora_linear.default, (p.x, p.w, p.a, p.b, 0.5, None, torch.ones(8)))
