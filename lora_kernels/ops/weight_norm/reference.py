"""The formulas in plain PyTorch, summed in float32 (float64 for float64). Every other backend is tested against them."""

import torch

from lora_kernels.ops.gradients import dtype_of
from lora_kernels.ops.registry import implements


@implements("weight_norm_forward", "reference")
def forward(w, a, b, scale, w_squared):
    return _adapted(w, a, b, scale).square().sum(1).sqrt()                 # [out]


@implements("weight_norm_backward", "reference")
def backward(dn, n, w, a, b, scale, needs):
    c = torch.where(n > 0, dn / n, 0.0)                                    # [out]; a zero row has no direction
    dv = c[:, None] * _adapted(w, a, b, scale)                             # [out, in]
    da, db = scale * (b.to(dv.dtype).T @ dv), scale * (dv @ a.to(dv.dtype).T)
    grads = zip((da, db), (a, b), needs, strict=True)
    return tuple(g.to(dtype_of(t, need)) if need else None for g, t, need in grads)


@implements("row_norm_squared", "reference")
def row_norm_squared(w):
    return w.to(torch.promote_types(w.dtype, torch.float32)).square().sum(1)


def _adapted(w, a, b, scale):
    wide = torch.promote_types(w.dtype, torch.float32)
    return w.to(wide) + scale * (b.to(wide) @ a.to(wide))                  # [out, in]
