"""How the programs of a launch share what is summed: rows, or for CUDA C++ the depth of a tile
(csrc/common/split_k.cuh)."""

from functools import lru_cache

import torch
from torch import Tensor

from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.launch import architecture, ceil_div, multiprocessors


def split_k_part(x: Tensor, depth: int, step: int, tiles: int, others: int, cost: int) -> int:
    """How much of `depth` a block takes, a multiple of `step`, so that blocks, which come two at
    once to each multiprocessor of x's GPU, have about as much to do each. `others` blocks do
    something else; `cost` is what the sums of a part cost beside a unit of depth. In the
    deterministic mode all: then the sums of a row are those of a GEMM, however many rows there are.
    """
    depth = max(depth, 1)
    if torch.are_deterministic_algorithms_enabled():
        return step * ceil_div(depth, step)
    return _balanced_part(
        depth, step, tiles, others, cost, 2 * nearest_chip(architecture(x), multiprocessors(x)).multiprocessors
    )


@lru_cache(maxsize=4096)
def _balanced_part(depth: int, step: int, tiles: int, others: int, cost: int, slots: int) -> int:
    # of the slots' time, and of that of the sums, which are written and read
    def waste(parts: int) -> float:
        blocks = tiles * parts + others
        return ceil_div(blocks, slots) * slots / max(blocks, 1) - 1 + parts * cost / depth

    parts = min(range(1, max(1, min(8, depth // (4 * step))) + 1), key=waste)
    return step * ceil_div(ceil_div(depth, step), parts)


def part_of_rows(m: int, blocks: int, most: int) -> int:
    """How many of m rows one program sums, a power of two from 64 to `most`: as many as leave a
    program for most multiprocessors, since each part is written. `blocks` programs share the
    rows."""
    rows = most
    while rows > 64 and blocks * ceil_div(m, rows) < 96:
        rows //= 2
    return rows
