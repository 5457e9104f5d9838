"""The formula in plain PyTorch, one expert after the other, summed in float32 (float64 for
float64)."""

import torch

from lora_kernels.ops.expert_lora_linear.call import gathered, segments_of
from lora_kernels.ops.gradients import gradient_dtype, laid_out_as
from lora_kernels.ops.lora_linear.call import Needs
from lora_kernels.ops.quantised.formula import experts_weight_of
from lora_kernels.ops.registry import implements


@implements("expert_lora_linear_forward", "reference")
def forward(call):
    call = _dequantised(call)
    x, tokens = gathered(call), call.tokens
    ys, hs, zs, last = [], [], [], 0
    for e, first, last in segments_of(call.offsets, tokens):
        w, a, b, bias, gain = _of_expert(call, e)
        rows = x[first:last].to(w.dtype)
        h = None if b is None else call.scale * (rows @ a.T)  # [tokens of e, r]
        z = rows @ w.T if b is None else rows @ w.T + h @ b.T  # [tokens of e, out]
        y = z if gain is None else z * gain
        ys.append(y if bias is None else y + bias)
        hs.append(h)
        zs.append(z)
    y, z = _all_rows(ys, tokens, call.n_out, x), _all_rows(zs, tokens, call.n_out, x)
    h = _all_rows(hs, tokens, call.b.shape[2], x) if call.keep_h else None
    return y.to(x.dtype), h, z.to(x.dtype) if call.keep_z else None


@implements("expert_lora_linear_backward", "reference")
def backward(call):
    call, needs = _dequantised(call), Needs(*call.needs)
    x = gathered(call)
    dxs, found = [], {name: {} for name in ("a", "b", "bias", "gain")}
    for e, first, last in segments_of(call.offsets, len(x)):
        w, a, b, _, gain = _of_expert(call, e)
        rows, dy = x[first:last].to(w.dtype), call.dy[first:last].to(w.dtype)
        dz = dy if gain is None else dy * gain
        dx, z = dz @ w, rows @ w.T
        if b is not None:
            h, p = call.scale * (rows @ a.T), call.scale * (dz @ b)  # [tokens of e, r]
            dx, z = dx + p @ a, z + h @ b.T
            found["a"][e], found["b"][e] = p.T @ rows, dz.T @ h
        dxs.append(dx)
        found["bias"][e], found["gain"][e] = dy.sum(0), (dy * z).sum(0)
    dx = _all_rows(dxs, len(x), x.shape[1], x) if needs.x else None
    if dx is not None and call.index is not None:
        dx = dx.new_zeros(call.x.shape).index_add(0, call.index, dx)
    dx = None if dx is None else dx.to(x.dtype)
    like = zip((call.a, call.b, call.bias, call.gain), found.values(), needs[1:], strict=True)
    return dx, *(_all_experts(of, t, need) if need else None for t, of, need in like)


def _dequantised(call):
    """The same call with W as a tensor."""
    return call._replace(w=experts_weight_of(call, len(call.offsets)), parts=None, layout=None)


def _of_expert(call, e):
    """W [out, in], a, b, bias and gain of one expert in the dtype of the sums."""
    wide = torch.promote_types(call.x.dtype, torch.float32)
    w = call.w[e].T if call.transposed else call.w[e]
    return w.to(wide), *(None if t is None else t[e].to(wide) for t in (call.a, call.b, call.bias, call.gain))


def _all_rows(pieces, tokens, columns, x):
    """Those of the experts one after another, then zeros for the rows of none."""
    wide = torch.promote_types(x.dtype, torch.float32)
    left = tokens - sum(map(len, pieces))
    return torch.cat([*pieces, x.new_zeros(left, columns, dtype=wide)])


def _all_experts(of, t, need):
    """The gradient of t, which lies as t does; zeros for experts without tokens."""
    dtype = gradient_dtype(t, need)
    zero = t.new_zeros(t.shape[1:], dtype=dtype)
    return laid_out_as(torch.stack([of[e].to(dtype) if e in of else zero for e in range(len(t))]), t)
