"""CUDA C++ kernels in the simulator: numbers, what they read, and that their barriers and waits are
needed."""

import pytest
import torch

from lora_kernels import explain, use_backend, weight_norm
from lora_kernels.ops.weight_norm import row_norm_squared
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc
from lora_kernels.testing import assert_within_rounding
from tests.ops.far import far
from tests.ops.test_cuda_merge import OTHERS

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)


def draw(n_out, n_in, rank, dtype):
    torch.manual_seed(0)
    w, a, b = (torch.randn(s) for s in ((n_out, n_in), (rank, n_in), (n_out, rank)))
    w, a, b = w.to(dtype), (a * max(n_in, 1) ** -0.5).to(dtype), b.to(dtype)
    return w, a, b, (w.double() + 0.5 * b.double() @ a.double()).square().sum(1).sqrt()


@pytest.fixture
def simulated():
    with use_backend("cuda", simulate=True):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 16), (65, 136, 17), (3, 8, 1), (70, 512, 64), (9, 304, 128), (0, 16, 2), (5, 0, 3)])
def test_norm(simulated, dtype, shape):
    w, a, b, wanted = draw(*shape, dtype)
    for seed in range(2):
        with device(seed=seed) as sim:
            norm = weight_norm(w, a, b, 0.5)
        assert ((norm - wanted).abs() <= 1e-6 * wanted).all()
    assert sim.counters["shared_wavefronts"] == sim.counters["shared_ideal"]


def test_a_row_that_cancels(simulated):
    w, a, b, _ = draw(64, 256, 16, torch.bfloat16)
    w[3] = (-0.5 * b[3].float() @ a.float()).bfloat16()
    wanted = (w.double() + 0.5 * b.double() @ a.double()).square().sum(1).sqrt()
    assert ((weight_norm(w, a, b, 0.5) - wanted).abs() <= 1e-4 * wanted).all()


def test_w_is_read_once(simulated):
    w, a, b, _ = draw(256, 1024, 16, torch.bfloat16)
    with device(trace=True) as sim:
        weight_norm(w, a, b, 0.5)
    size = {name: t.numel() * 2 for name, t in {"w": w, "a": a, "b": b}.items()}
    assert sim.launches == 1 and sim.counters["store_bytes"] == 4 * len(w)
    assert sim.counters["load_bytes"] == size["w"] + len(w) // 64 * size["a"] + size["b"]
    assert sim.dram() == (sum(size.values()), 4 * len(w))


@pytest.mark.parametrize("name", ["w", "a", "b"])
def test_offsets_of_64_bits(simulated, name):
    args = dict(zip("wab", draw(3, 24, 3, torch.bfloat16), strict=False))
    assert torch.equal(weight_norm(**args | {name: far(args[name])}), weight_norm(**args))


@pytest.mark.parametrize(("old", "new"), [
    ("  __syncthreads();  // all copies", "  __syncwarp();  //"),
    ("cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    ("  cp_async_commit();\n", ""),
    ("row % 8 : row % 4 * 2", "0 : 0"),
    ("inside ? PIECE : 0", "PIECE"),
    ("inside && j < rank ?", "inside ?"),
    ("(step + STAGES - 1, steps", "(step + STAGES, steps"),
])  # fmt: skip
def test_planted_bugs(planted, simulated, old, new):
    """Races, waits, bounds are named; a missing swizzle shows in the passes of shared memory,
    missing zeros in the numbers."""
    planted("weight_norm/cuda.cu", old, new, keep="weight_norm_bf16_16")
    w, a, b, wanted = draw(100, 328, 5, torch.bfloat16)
    if "0 : 0" in new:
        with device() as sim:
            weight_norm(w, a, b, 0.5)
        assert sim.counters["shared_wavefronts"] > 2 * sim.counters["shared_ideal"]
    elif "PIECE" in old:
        assert ((weight_norm(w, a, b, 0.5) - wanted).abs() > 1e-3 * wanted).any()
    else:
        with pytest.raises(SimulationError, match="race|nobody wrote|not been waited for|out of bounds"):
            for seed in range(4):
                with device(seed=seed):
                    weight_norm(w, a, b, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", OTHERS)
def test_other_types_layouts_and_ranks(simulated, change, dtype):
    """By a kernel that takes all; and the gradients, with W read once for both."""
    w, a, b, _ = draw(70, 144, 13, dtype)
    w, a, b = OTHERS[change](w, a, b)
    wide_a, wide_b = (t.double().requires_grad_() for t in (a, b))
    wanted, dn = (w.double() + 0.5 * wide_b @ wide_a).square().sum(1).sqrt(), torch.randn(70)
    wanted.backward(dn.double())
    norms = []
    for seed in range(2):
        with device(seed=seed):
            norms.append(weight_norm(w, a.requires_grad_(), b.requires_grad_(), 0.5))
    assert norms[0].equal(norms[1]) and ((norms[0] - wanted).abs() <= 2e-5 * wanted).all()
    for t, wide in zip((a, b), torch.autograd.grad(norms[0], (a, b), dn), strict=True):
        exact = (wide_a if t is a else wide_b).grad
        assert_within_rounding(wide, exact, t.dtype, 1.5) if t.dtype is dtype else torch.testing.assert_close(
            wide.double(), exact, rtol=1e-4, atol=1e-5
        )


def test_the_square_of_w_alone(simulated):
    w = torch.randn(70, 75).bfloat16()
    torch.testing.assert_close(row_norm_squared(w).double(), w.double().square().sum(1), rtol=1e-6, atol=0)


def test_it_says_what_ran(simulated):
    w, a, b, _ = draw(8, 16, 8, torch.bfloat16)
    assert explain(weight_norm, w, a, b).decisions[0].chosen == "cuda (simulated)"
