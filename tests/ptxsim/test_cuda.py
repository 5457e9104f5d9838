"""CUDA C++ as nvcc compiles it, in shapes with ragged edges: right numbers, the same bits each
time, no finding."""

import pytest
import torch

from lora_kernels.ptxsim.nvcc import find_nvcc
from tests.ptxsim import problems
from tests.ptxsim.corpus import HALF, MISSED, by_simulator, cuda_kernel, shaped, tiles

if find_nvcc() is None:
    pytest.skip("nvcc is not installed here (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

# multiples of eight in depth: 16 bytes are copied at a time
SHAPES = [(64, 64, 64), (1, 2, 8), (100, 72, 40), (130, 200, 104)]


def clean(*case, late=True, **changed):
    assert by_simulator(shaped(*case, **changed), late=late) == (MISSED, "")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("late", [True, False])
def test_matmul(shape, late):
    grid = (tiles(shape[1], 64), tiles(shape[0], 64))
    clean("matmul.cu", grid, problems.multiply, *shape, torch.bfloat16, 2**-8, late=late)
    clean("matmul.cu", grid, problems.multiply, *shape, torch.float16, 2**-11, options=HALF, late=late)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 13, 16])
def test_lora(shape, rank):
    grid = (tiles(shape[1], 64), tiles(shape[0], 64))
    clean("lora.cu", grid, problems.lora, *shape, rank, torch.float16, 2**-10)
    clean("lora.cu", grid, problems.lora, *shape, rank, torch.bfloat16, 2**-7, options=())


@pytest.mark.parametrize("n", [1, 4, 255, 1000])
def test_vector_add(n):
    clean("vector_add.cu", (tiles(n, 256),), problems.add, n)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 33), (64, 128)])
def test_row_norm(n, k):
    clean("row_norm.cu", (tiles(n, 4),), problems.row_norm, n, k)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 3), (16, 16, 64), (37, 50, 61)])
def test_split_k(m, n, k):
    grid = (tiles(n, 16), tiles(m, 16), 3)
    clean("split_k.cu", grid, problems.split_k, m, n, k)
    clean("split_k.cu, ticket", grid, problems.ticket, m, n, k, 3, grid[0] * grid[1])


@pytest.mark.parametrize("k", [1, 31, 64, 129])
def test_gather(k):
    clean("gather.cu", (7,), problems.gather, [0, -1, 4, 3, -7, 5, 1 << 33], k, 5)


@pytest.mark.parametrize(("rows", "columns", "p"), [(3, 1, 0.5), (2, 130, 0.1), (7, 64, 0.9)])
def test_dropout(rows, columns, p):
    clean("dropout.cu", (tiles(columns, 128), rows), problems.dropped, rows, columns, p)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 512), (2, 129)])
def test_softmax(rows, n):
    clean("softmax.cu", (rows,), problems.softmax, rows, n)


def test_counters_are_what_the_tiles_say():
    m = n = k = 128
    problem = problems.multiply(m, n, k, torch.bfloat16)
    kernel = cuda_kernel("matmul.cu", (), None)
    counters = kernel.launch((2, 2), (128,), list(problem.args.values()), problem.writes).counters
    blocks, steps = 4, k // 32
    assert counters["blocks"] == blocks
    assert counters["mma"] == m * n * k // (16 * 8 * 16)
    assert counters["load_bytes"] == blocks * steps * 2 * 64 * 32 * 2
    assert counters["load_sectors"] == counters["load_bytes"] // 32
    # a lane stores 4 bytes and four of them half a sector, eight times a row: each sector is
    # touched twice
    assert counters["store_bytes"] == m * n * 2 and counters["store_sectors"] == m * n * 2 // 16
    assert counters["barriers"] == blocks * 4 * 2 * steps  # warps, twice a step
    assert counters["shared_wavefronts"] == counters["shared_ideal"]
