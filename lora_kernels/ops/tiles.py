"""bf16 products with float32 sums on AMX tiles, where the processor has them."""

import torch
from torch import Tensor

from lora_kernels import _cpu
from lora_kernels.ops.buffers import matrix

TILE = 16  # rows of a tile


def on_tiles(x: Tensor, w: Tensor) -> bool:
    """Whether the product runs on tiles: bf16 both, and w by rows."""
    return x.dtype is w.dtype is torch.bfloat16 and w.stride(1) == 1 and _cpu.has_matmul()


def product(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """scale · x wᵀ in float32."""
    y = x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32)
    tokens, n_in = x.shape
    _cpu.forward_tiles(
        matrix(x), matrix(w), None, matrix(y), None, None, None, 0, scale, tokens, n_in, w.shape[0], 0, torch.get_num_threads()
    )
    return y


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x w in float32: x [tokens, in], w [in, out]."""
    (tokens, n_in), n_out = x.shape, w.shape[1]
    # zeros up to whole tiles, and rows an odd number of cache lines apart so that they use all cache sets
    padded = x.new_zeros(-(-tokens // TILE) * TILE, -(-n_in // 64) * 64 + 32)
    padded[:tokens, :n_in] = x
    y = x.new_empty(len(padded), -(-n_out // 32) * 32 + TILE, dtype=torch.float32)
    _cpu.matmul(matrix(padded), matrix(w), y.data_ptr(), y.stride(0), tokens, n_in, n_out, torch.get_num_threads())
    return y[:tokens, :n_out]
