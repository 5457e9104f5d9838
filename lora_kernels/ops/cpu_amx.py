"""bf16 products with float32 sums on AMX tiles or by vdpbf16ps, where the processor has these."""

import torch
from torch import Tensor

from lora_kernels import _cpu
from lora_kernels.ops.cpu_quantised import Packed


def on_tiles(x: Tensor, w: Tensor | Packed) -> bool:
    """Whether the product is the processor's own: bf16 both, and w by rows."""
    return x.dtype is w.dtype is torch.bfloat16 and w.stride(1) == 1 and _cpu.has_tiles()


def product(x: Tensor, w: Tensor | Packed) -> Tensor:
    """x wᵀ in float32: w [out, in]."""
    return _product(x, w, False, x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32))


def product_back(dy: Tensor, w: Tensor | Packed, out: Tensor | None = None) -> Tensor:
    """dy w in float32, or in `out`, float32 or bf16: dy bf16, or float32 with any strides, w [in,
    out]."""
    return _product(dy, w, True, dy.new_empty(dy.shape[0], w.shape[1], dtype=torch.float32) if out is None else out)


def _product(x: Tensor, w: Tensor | Packed, back: bool, y: Tensor) -> Tensor:
    _cpu.tiles(x, w, None, None, y, None, None, None, None, 1.0, None, back, torch.get_num_threads())
    return y
