"""Formula (1) of `QuantisedWeight` in plain PyTorch, for the references of every op."""

import torch

from lora_kernels.ops.quantised.weight import HALVES, LOW_FIRST, NIBBLES, QuantisedWeight


def weight_of(call):
    """W of an op's arguments as a tensor, quantised or not."""
    return dequantised(QuantisedWeight.of_fields(call.w, call.parts, call.layout)) if call.layout else call.w


def experts_weight_of(call, experts):
    """The same of all experts, whose W is three-dimensional."""
    return dequantised(QuantisedWeight.of_fields(call.w, call.parts, call.layout, experts)) if call.layout else call.w


def dequantised(w):
    """W of a QuantisedWeight in its shape and dtype."""
    flat, numbers = w.codes.reshape(-1), w.numel()
    if w.kind == NIBBLES:
        high, low = flat >> 4, flat & 15
        pair = (low, high) if w.order == LOW_FIRST else (high, low)
        flat = w.table[torch.stack(pair, 0 if w.order == HALVES else 1).reshape(-1)[:numbers].long()]
    scales = w.scales.float()
    if w.outer is not None:
        outer = w.outer.repeat_interleave(min(w.outer_block, scales.numel()))[: scales.numel()]
        scales = w.outer_table[w.scales.reshape(-1).long()] * outer + w.offset
    value = flat.float()
    if w.zeros is not None:
        value = value - spread(w, w.zeros)
        value = value.to(w.dtype).float() if w.zero_rounded else value
    return (value * spread(w, scales)).to(w.dtype).view(w.shape)


def spread(w, of_blocks):
    """A number of each block for each number of W."""
    if not w.block_rows:
        return of_blocks.reshape(-1).repeat_interleave(min(w.block, w.numel()))[: w.numel()]
    *experts, n_out, n_in = w.shape
    tiles = of_blocks.reshape(*experts, -(-n_out // w.block_rows), -(-n_in // w.block))
    across = tiles.repeat_interleave(min(w.block, n_in), -1)[..., :n_in]
    return across.repeat_interleave(min(w.block_rows, n_out), -2)[..., :n_out, :].reshape(-1)
