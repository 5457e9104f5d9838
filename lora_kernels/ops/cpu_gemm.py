"""The product x Wᵀ on the CPU, in float32 whatever the dtype."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from lora_kernels import _cpu
from lora_kernels.ops.cpu_amx import on_tiles, product

BLOCK = 256  # rows of W widened at a time: 4 MiB of float32 at 4096 columns
PIECE = 4096  # outputs of a float32 piece, where W is read as it is
PACKED_FROM = 25  # tokens, from which a product with x packed is faster than the kernel for few;
# and up to which than the GEMM
PACKED = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 256}


def fused_token_limit(dtype: torch.dtype) -> int:
    """Up to how many tokens the fused kernel is faster than the product and passes before and after
    it."""
    if dtype is torch.bfloat16 and _cpu.has_tiles():
        return 4 if _cpu.level() == "amx" else 12
    return 64 if dtype is not torch.float32 and _cpu.level() == "portable" else 32


def packs_x(x: Tensor, w: Tensor) -> bool:
    """Whether the product of x, by rows, is the one that packs x. Without AVX2 it is not faster."""
    if not PACKED_FROM <= x.shape[0] <= PACKED.get(x.dtype, 0) or x.dtype is not w.dtype:
        return False
    return w.stride(1) == 1 and w.numel() > 0 and not on_tiles(x, w) and _cpu.level() != "portable"


def base_product(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x Wᵀ in float32, for float32 in `out`; x by rows."""
    tokens, (n_out, n_in) = x.shape[0], w.shape
    if packs_x(x, w):
        y = x.new_empty(tokens, n_out, dtype=torch.float32) if out is None else out
        if _cpu.base_product(x, w, y, torch.get_num_threads()):
            return y
    if tokens and w.numel() and tokens <= fused_token_limit(x.dtype):
        y = x.new_empty(tokens, n_out, dtype=torch.float32) if out is None else out
        a, b = _no_adapter(n_out, n_in, w.dtype)
        if _cpu.forward_small(x, w, a, b, y, None, None, None, None, 1.0, None, torch.get_num_threads()):
            return y
    if on_tiles(x, w) and tokens and w.numel():
        return product(x, w)
    if x.dtype is torch.float32:
        return torch.mm(x, w.T, out=out)
    y = x.new_empty(tokens, n_out, dtype=torch.float32)
    for rows, wide in base_product_slices(x, w):
        y[:, rows] = wide
    return y


@lru_cache(maxsize=1024)
def _no_adapter(n_out: int, n_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of rank 0; to make them anew costs as much as a row of a small layer."""
    return torch.empty(0, n_in, dtype=dtype), torch.empty(n_out, 0, dtype=dtype)


def base_product_slices(x: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x Wᵀ as (rows of W, product): in float32 one piece, of 16-bit weights float32 pieces."""
    if x.dtype is w.dtype is torch.float32:
        yield slice(0, w.shape[0]), base_product(x, w)
        return
    if packs_x(x, w):
        for first in range(0, w.shape[0], PIECE):
            rows = slice(first, min(first + PIECE, w.shape[0]))
            yield rows, base_product(x, w[rows])
        return
    wide, scratch = x.float(), x.new_empty(min(BLOCK, w.shape[0]), w.shape[1], dtype=torch.float32)
    part = wide.new_empty(x.shape[0], len(scratch))
    for first in range(0, w.shape[0], BLOCK):
        rows = slice(first, min(first + BLOCK, w.shape[0]))
        block = scratch[: rows.stop - first]
        block.copy_(w[rows])
        product = part if len(block) == len(scratch) else wide.new_empty(x.shape[0], len(block))
        torch.mm(wide, block.T, out=product)
        yield rows, product
