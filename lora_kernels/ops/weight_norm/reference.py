"""The formulas in plain PyTorch, summed in float32 (float64 for float64). Every other backend is
tested against them."""

import torch

from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.quantised.formula import weight_of
from lora_kernels.ops.registry import implements


@implements("weight_norm_forward", "reference")
def forward(call):
    squared = _adapted(call).square().sum(1)                               # [out]
    zero = squared == 0
    # a zero row has no direction: its gradient is zero, not that of a root
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


@implements("weight_norm_backward", "reference")
def backward(call):
    dn, n, a, b, scale = call.dn, call.n, call.a, call.b, call.scale
    # [out]; a zero row has no direction, and none of its derivatives one
    c = torch.where(n > 0, dn / torch.where(n > 0, n, 1.0), 0.0)
    dv = c[:, None] * _adapted(call)                                       # [out, in]
    da, db = scale * (b.to(dv.dtype).T @ dv), scale * (dv @ a.to(dv.dtype).T)
    grads = zip((da, db), (a, b), call.needs, strict=True)
    return tuple(g.to(gradient_dtype(t, need)) if need else None for g, t, need in grads)


@implements("row_norm_squared", "reference")
def row_norm_squared(call):
    return _wide_weight(call).square().sum(1)


def _wide_weight(call):
    w = weight_of(call)
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _adapted(call):
    w = _wide_weight(call)
    a, b = call.a.to(w.dtype), call.b.to(w.dtype)
    return w + call.scale * (b @ a)                                        # [out, in]
