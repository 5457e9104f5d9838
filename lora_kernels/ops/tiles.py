"""bf16 products with float32 sums on AMX tiles, where the processor has them."""

import torch
from torch import Tensor

from lora_kernels import _cpu
from lora_kernels.ops.buffers import matrix

TILE = 16  # rows of a tile
FEW = 64  # tokens for which four tiles hold the sums of one tile of W


def on_tiles(x: Tensor, w: Tensor) -> bool:
    """Whether the product runs on tiles: bf16 both, and w by rows."""
    return x.dtype is w.dtype is torch.bfloat16 and w.stride(1) == 1 and _cpu.has_matmul()


def few_tokens(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ in float32 for at most FEW rows of x; w is read as it lies in memory, where `matmul` would pack it."""
    y = x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32)
    tokens, n_in = x.shape
    _cpu.matmul_few(
        matrix(x), matrix(w), y.data_ptr(), y.stride(0), tokens, n_in, w.shape[0], torch.get_num_threads()
    )
    return y


def padded(x: Tensor) -> Tensor:
    """x with zeros up to whole tiles, its rows an odd number of cache lines apart so that they use all cache sets."""
    tokens, n_in = x.shape
    whole = x.new_zeros(-(-tokens // TILE) * TILE, -(-n_in // 64) * 64 + 32)
    whole[:tokens, :n_in] = x
    return whole


def matmul(padded_x: Tensor, w: Tensor, tokens: int, *, transposed: bool) -> Tensor:
    """x wᵀ if transposed, else x w, in float32; takes `padded(x)`, whose first `tokens` rows are x."""
    n_out, n_in = w.shape if transposed else w.shape[::-1]
    y = padded_x.new_empty(len(padded_x), -(-n_out // 32) * 32 + TILE, dtype=torch.float32)
    _cpu.matmul(
        matrix(padded_x), matrix(w), y.data_ptr(), y.stride(0), transposed, tokens, n_in, n_out, torch.get_num_threads()
    )
    return y[:tokens, :n_out]
