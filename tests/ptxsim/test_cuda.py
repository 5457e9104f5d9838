"""A tensor-core kernel as nvcc compiles it: right numbers, no finding, and each planted bug found."""

from pathlib import Path

import pytest
import torch

from lora_kernels.testing.nvcc import compile_ptx, find_nvcc
from lora_kernels.testing.ptxsim import Kernel, SimulationError

if find_nvcc() is None:
    pytest.skip("nvcc is not installed here (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

SOURCE = Path(__file__).parent / "kernels" / "matmul.cu"
SHAPES = [(64, 64, 64), (1, 2, 8), (100, 72, 40), (130, 200, 104)]


def kernel(*bugs):
    return Kernel(compile_ptx(SOURCE, "sm_80", *(f"-DBUG_{bug}" for bug in bugs)))


def multiply(kernel, m, n, k, **options):
    torch.manual_seed(0)
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    y = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    # a tensor of eight numbers: 16 bytes are copied at a time
    run = kernel.launch((-(-n // 64), -(-m // 64)), (128,), [x, w, y, m, n, k], [y], **options)
    error = (y.double() - x.double() @ w.double().T).abs().max().item()
    return error, run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("late", [True, False])
def test_clean(shape, late):
    for seed in range(3):
        error, run = multiply(kernel(), *shape, late=late, seed=seed)
        assert error <= 2**-8 * 4 * shape[2] ** 0.5
        assert not run.errors


FOUND = {
    "NO_BARRIER": "race|nobody wrote|not been waited for",
    "WAIT_TOO_WEAK": "not been waited for|nobody wrote",
    "NO_BARRIER_BEFORE_REFILL": "cp.async at .*: shared race with a read|not been waited for",
    "NO_ROW_MASK": r"cp.async: out of bounds, matmul_param_\d",
    "COLUMN_MASK": r"cp.async: out of bounds, matmul_param_\d",
    "DIVERGENT_BARRIER": "not all lanes of the warp are here",
    "SYNCWARP": "race|nobody wrote|not been waited for",
    "BLOCKS_OVERLAP": r"race on matmul_param_2\+\d+ with a write of block",
    "NO_ZERO_FILL": "ldmatrix at .*: reads shared memory that nobody wrote",
}


@pytest.mark.parametrize("bug", FOUND)
@pytest.mark.parametrize("seed", range(3))
def test_planted_bugs_are_found(bug, seed):
    # two blocks each way and several steps of depth, with ragged edges
    with pytest.raises(SimulationError, match=FOUND[bug]):
        multiply(kernel(bug), 100, 100, 104, seed=seed)


def test_a_wrong_row_shows_in_the_numbers():
    error, run = multiply(kernel("WRONG_ROW"), 64, 64, 64)
    assert error > 1 and not run.errors


def test_bank_conflicts_show_in_the_counters():
    clean, conflicts = (multiply(kernel(*bugs), 64, 64, 64)[1].counters for bugs in ((), ("NO_SWIZZLE",)))
    assert clean["shared_wavefronts"] == clean["shared_ideal"]
    assert conflicts["shared_wavefronts"] > 1.9 * conflicts["shared_ideal"]
    assert conflicts["shared_ideal"] == clean["shared_ideal"] and conflicts["mma"] == clean["mma"]


def test_counters_are_what_the_tiles_say():
    m = n = k = 128
    counters = multiply(kernel(), m, n, k)[1].counters
    blocks, steps = 4, k // 32
    assert counters["blocks"] == blocks
    assert counters["mma"] == m * n * k // (16 * 8 * 16)
    assert counters["load_bytes"] == blocks * steps * 2 * 64 * 32 * 2
    assert counters["load_sectors"] == counters["load_bytes"] // 32
    # a lane stores 4 bytes and four of them half a sector, eight times a row: each sector is touched twice
    assert counters["store_bytes"] == m * n * 2 and counters["store_sectors"] == m * n * 2 // 16
    assert counters["barriers"] == blocks * 4 * 2 * steps  # warps, twice a step
