"""The formula in plain PyTorch, summed in float32 (float64 for float64). Every other backend is
tested against it."""

import torch

from lora_kernels.ops.dropout import mask
from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.lora_linear.call import Needs
from lora_kernels.ops.lora_linear.loop import backward_each, forward_each
from lora_kernels.ops.quantised.formula import weight_of
from lora_kernels.ops.registry import implements


@implements("lora_linear_forward", "reference")
def forward(call):
    dtype, gain, bias = call.x.dtype, call.gain, call.bias
    x, w, a, b = _in_sum_dtype(call.x, _plain_weight(call), call.a, call.b)
    x_dropped = x * _dropout_factor(call)
    h = call.scale * (x_dropped @ a.T)                                # [tokens, r]
    z = (x_dropped if call.drop_base else x) @ w.T + h @ b.T          # [tokens, out]
    y = z if gain is None else z * gain.to(z.dtype)
    if call.drop_base:
        y = y + (x - x_dropped) @ w.T
    if bias is not None:
        y = y + bias.to(z.dtype)
    return y.to(dtype), h if call.keep_h else None, z.to(dtype) if call.keep_z else None


@implements("lora_linear_backward", "reference")
def backward(call):
    dx, *others = gradients(call)
    return None if dx is None else dx.to(call.x.dtype), *others


def gradients(call):
    """dx in the dtype of the sums, the others as they are wanted; h is computed where it is not
    given."""
    gain, needs = call.gain, Needs(*call.needs)
    dy, x, w, a, b = _in_sum_dtype(call.dy, call.x, _plain_weight(call), call.a, call.b)
    keep = _dropout_factor(call)
    h = call.scale * ((x * keep) @ a.T) if call.h is None else call.h
    dz = dy if gain is None else dy * gain.to(dy.dtype)               # [tokens, out]
    p = call.scale * (dz @ b)                                         # [tokens, r]
    if call.drop_base:
        dx = dy @ w + keep * ((dz - dy) @ w + p @ a)
    else:
        dx = dz @ w + keep * (p @ a)
    z = (x * keep if call.drop_base else x) @ w.T + h @ b.T
    da, db = p.T @ (x * keep), dz.T @ h
    dbias, dgain = dy.sum(0), (dy * z).sum(0)
    grads = zip((da, db, dbias, dgain), (call.a, call.b, call.bias, gain), needs[1:], strict=True)
    return dx if needs.x else None, *(g.to(gradient_dtype(t, need)) if need else None for g, t, need in grads)


@implements("lora_linear_group_forward", "reference")
def group_forward(call):
    return forward_each(forward, call)


@implements("lora_linear_group_backward", "reference")
def group_backward(call):
    return backward_each(gradients, call, torch.add)


def _in_sum_dtype(x, *others):
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(t.to(wide) for t in (x, *others))


def _plain_weight(call):
    wide = torch.promote_types(call.x.dtype, torch.float32)
    return weight_of(call) if call.w_scale is None else call.w.to(wide) * call.w_scale.to(wide)[:, None]


def _dropout_factor(call):
    x, wide = call.x, torch.promote_types(call.x.dtype, torch.float32)
    return mask(call.seed, call.dropout, *x.shape, wide, x.device) if call.dropout > 0 else x.new_ones((), dtype=wide)
