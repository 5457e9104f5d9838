"""Formula (1) of `QuantisedWeight` in plain PyTorch, for the references of every op."""

import torch

from lora_kernels.ops.quantised.weight import NIBBLES


def dequantised(w):
    """W of a QuantisedWeight, [out, in] in its dtype."""
    flat, numbers = w.codes.reshape(-1), w.numel()
    if w.kind == NIBBLES:
        flat = w.table[torch.stack((flat >> 4, flat & 15), 1).reshape(-1)[:numbers].long()]
    scales = w.scales
    if w.outer is not None:
        outer = w.outer.repeat_interleave(w.outer_block)[: scales.numel()]
        scales = w.outer_table[scales.reshape(-1).long()] * outer + w.offset
    product = flat.float() * scales.reshape(-1).repeat_interleave(w.block)[:numbers]
    return product.to(w.dtype).view(w.shape)
