"""The formula in plain PyTorch, one adapter after the other, summed in float32 (float64 for
float64)."""

import torch

from lora_kernels.ops.multi_lora.plan import adapter_in_slot, members_of, unflatten
from lora_kernels.ops.quantised.formula import weight_of
from lora_kernels.ops.registry import implements


@implements("multi_lora_forward", "reference")
def forward(call):
    x, wide = call.x, torch.promote_types(call.x.dtype, torch.float32)
    return _adapted(call, x.to(wide) @ weight_of(call).to(wide).T).to(x.dtype)


@implements("multi_lora_add", "reference")
def add_in_place(call):
    y, bias, wide = call.y, call.bias, torch.promote_types(call.x.dtype, torch.float32)
    y.copy_(_adapted(call, y.to(wide) if bias is None else y.to(wide) - bias.to(wide)))


def _adapted(call, z):
    """Of the base z = x wᵀ, [tokens, out]."""
    x, bias, y, first = call.x.to(z.dtype), call.bias, z.clone(), 0
    for s in unflatten(call.slots):
        last = first + s.b.shape[1]
        for members, slot, v in members_of(s, call.ids, call.weights, call.error):
            of = adapter_in_slot(s, slot, z.dtype)
            share = x[members] @ of.a.T @ of.b                              # [members, out]
            if of.gain is not None:
                share = (of.gain - 1) * z[members, first:last] + of.gain * share
            share = share if of.bias is None else share + of.bias
            y[members, first:last] += share if v is None else v[:, None].to(z.dtype) * share
        first = last
    return y if bias is None else y + bias.to(z.dtype)
