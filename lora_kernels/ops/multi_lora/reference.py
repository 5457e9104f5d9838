"""The formula in plain PyTorch, one adapter after the other, summed in float32 (float64 for float64)."""

import torch

from lora_kernels.ops.multi_lora.plan import members_of, taken, unflatten
from lora_kernels.ops.registry import implements


@implements("multi_lora_forward", "reference")
def forward(x, w, slots, ids, weights, order, starts, error, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) @ w.to(wide).T                                          # [tokens, out]
    return _adapted(z, x.to(wide), slots, ids, weights, error, bias).to(x.dtype)


@implements("multi_lora_add", "reference")
def add(y, x, slots, ids, weights, order, starts, error, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    z = y.to(wide) if bias is None else y.to(wide) - bias.to(wide)
    y.copy_(_adapted(z, x.to(wide), slots, ids, weights, error, bias))


def _adapted(z, x, slots, ids, weights, error, bias):
    y, first = z.clone(), 0
    for s in unflatten(slots):
        last = first + s.b.shape[1]
        for members, slot, v in members_of(s, ids, weights, error):
            of = taken(s, slot, z.dtype)
            share = x[members] @ of.a.T @ of.b                              # [members, out]
            if of.gain is not None:
                share = (of.gain - 1) * z[members, first:last] + of.gain * share
            share = share if of.bias is None else share + of.bias
            y[members, first:last] += share if v is None else v[:, None].to(z.dtype) * share
        first = last
    return y if bias is None else y + bias.to(z.dtype)
