"""The formula in plain PyTorch, summed in float32 (float64 for float64). Every other backend is tested against it."""

import torch

from lora_kernels.ops.dropout import mask
from lora_kernels.ops.gradients import dtype_of
from lora_kernels.ops.lora_linear.loop import backward_each, forward_each
from lora_kernels.ops.registry import implements


@implements("lora_linear_forward", "reference")
def forward(x, w, a, b, scale, bias, gain, dropout, seed, drop_base, keep, keep_z, w_scale=None):
    x_wide, w_wide, a_wide, b_wide = _widen(x, w, a, b)
    w_wide = w_wide if w_scale is None else w_wide * w_scale.to(w_wide.dtype)[:, None]
    x_dropped = x_wide * _keep(x, dropout, seed)
    h = scale * (x_dropped @ a_wide.T)                                     # [tokens, r]
    z = (x_dropped if drop_base else x_wide) @ w_wide.T + h @ b_wide.T     # [tokens, out]
    y = z if gain is None else z * gain.to(z.dtype)
    if drop_base:
        y = y + (x_wide - x_dropped) @ w_wide.T
    if bias is not None:
        y = y + bias.to(z.dtype)
    return y.to(x.dtype), h if keep else None, z.to(x.dtype) if keep_z else None


@implements("lora_linear_backward", "reference")
def backward(dy, x, *args):
    dx, *others = gradients(dy, x, *args)
    return None if dx is None else dx.to(x.dtype), *others


def gradients(dy, x, w, a, b, scale, bias, gain, dropout, seed, drop_base, h, y, z, needs, w_scale=None):
    """dx in the dtype of the sums, the others as they are wanted."""
    dy_wide, x_wide, w_wide, a_wide, b_wide = _widen(dy, x, w, a, b)
    w_wide = w_wide if w_scale is None else w_wide * w_scale.to(w_wide.dtype)[:, None]
    keep = _keep(x, dropout, seed)
    dz = dy_wide if gain is None else dy_wide * gain.to(dy_wide.dtype)      # [tokens, out]
    p = scale * (dz @ b_wide)                                              # [tokens, r]
    if drop_base:
        dx = dy_wide @ w_wide + keep * ((dz - dy_wide) @ w_wide + p @ a_wide)
    else:
        dx = dz @ w_wide + keep * (p @ a_wide)
    z_wide = (x_wide * keep if drop_base else x_wide) @ w_wide.T + h @ b_wide.T
    da, db = p.T @ (x_wide * keep), dz.T @ h
    dbias, dgain = dy_wide.sum(0), (dy_wide * z_wide).sum(0)
    grads = zip((da, db, dbias, dgain), (a, b, bias, gain), needs[1:], strict=True)
    return dx if needs[0] else None, *(g.to(dtype_of(t, need)) if need else None for g, t, need in grads)


@implements("lora_linear_group_forward", "reference")
def group_forward(*args):
    return forward_each(forward, *args)


@implements("lora_linear_group_backward", "reference")
def group_backward(*args):
    return backward_each(gradients, *args)


def _widen(x, *others):
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(t.to(wide) for t in (x, *others))


def _keep(x, dropout, seed):
    wide = torch.promote_types(x.dtype, torch.float32)
    return mask(seed, dropout, *x.shape, wide, x.device) if dropout > 0 else x.new_ones((), dtype=wide)
