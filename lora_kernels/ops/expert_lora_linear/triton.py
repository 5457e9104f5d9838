"""Triton: h, then y, in two launches for all experts, or of few tokens in one; backward P and dx,
dA, and dB with the sums over the tokens, in four. Their number does not grow with that of the
experts. Codes of the experts with tokens become numbers before, in one launch more, and stay for
the time of a call."""

import torch

from lora_kernels.ops.expert_lora_linear.call import summed
from lora_kernels.ops.expert_lora_linear.triton_kernels import (
    OuterLayer,
    ProductLayer,
    Tokens,
    expert_outer_kernel,
    expert_product_kernel,
)
from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two, refuse_device
from lora_kernels.ops.lora_linear.call import Needs
from lora_kernels.ops.lora_linear.triton_fields import tall
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import sound_schedule
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows
from lora_kernels.ops.triton_skinny import precision, strides

MOST = 1024  # experts: each program looks at all offsets
FEW, THIN = 16, 32  # tokens of an expert and ranks whose h and y are one launch: A is then small beside W


def refusal(call):
    if call.layout and (reason := Quantised(call.w, call.parts, call.layout).refusal()):
        return reason
    names = ("x", "a", "b", "bias", "gain") if call.layout else ("x", "w", "a", "b", "bias", "gain")
    tensors, experts = {name: getattr(call, name) for name in names}, len(call.offsets)
    many = f"w has {experts} experts; the kernel looks at {MOST} at most" if experts > MOST else None
    return refuse_dtypes(**tensors) or refuse_negated(**tensors) or many or refuse_device(call.x)


def backward_refusal(call):
    return refusal(call) or refuse_negated(dy=call.dy)


@implements("expert_lora_linear_forward", "triton", refusal)
def forward(call):
    x, m, index, h = call.x, call.tokens, call.index, None
    y = x.new_empty(m, call.n_out)
    z = torch.empty_like(y) if call.keep_z else None
    one_pass = call.b is not None and _in_one_pass(call)
    if call.b is not None and (call.keep_h or not one_pass):
        h = x.new_empty(m, call.b.shape[2], dtype=torch.float32)
    scale = float(call.scale)
    if call.b is not None and not one_pass:
        _product(call, x, call.a, h, index=index, scale=scale)
    w = _weight(call)
    how = {"a": call.a, "scale": scale} if one_pass else {}
    ends = {"gain": call.gain, "bias": call.bias, "z": z}
    _product(call, x, w.mT if call.transposed else w, y, index=index, h=h, b=call.b, **ends, **how)
    return y, h if call.keep_h else None, z


@implements("expert_lora_linear_backward", "triton", backward_refusal)
def backward(call):
    dy, x, needs = call.dy, call.x, Needs(*call.needs)
    dx = x.new_empty(len(dy), x.shape[1]) if needs.x else None
    like = zip((call.a, call.b, call.bias, call.gain), needs[1:], strict=True)
    da, db, dbias, dgain = (torch.empty_like(t, dtype=gradient_dtype(t, need)) if need else None for t, need in like)
    p = None
    if call.b is not None and (needs.x or needs.a):
        p = x.new_empty(len(dy), call.b.shape[2], dtype=torch.float32)
        _product(call, dy, call.b.mT, p, scaled=call.gain, scale=float(call.scale))
    if needs.x:
        w = _weight(call)
        _product(call, dy, w if call.transposed else w.mT, dx, h=p, b=None if call.a is None else call.a.mT, scaled=call.gain)
    if needs.a:
        _outer(call, x, p, da, index=call.index)
    if needs.b or needs.bias or needs.gain:
        sums = [dy.new_empty(len(call.offsets), dy.shape[1], dtype=torch.float32) if need else None for need in needs[3:]]
        v = call.z if needs.gain else None
        if needs.gain and v is None:  # whether y divided by gain gives it back is not known here
            v = forward(call.products())[0]
        p, out = (call.h, db.mT) if db is not None else (None, None)
        _outer(call, dy, p, out, gain=call.gain, v=v, of_u=sums[0], of_uv=sums[1])
        for whole, part in zip((dbias, dgain), sums, strict=True):
            if whole is not None:
                whole.copy_(part)
    return summed(dx, call), da, db, dbias, dgain


def _weight(call):
    """W of all experts as numbers, which those without tokens do not get of codes."""
    if not call.layout:
        return call.w
    w, experts = dequantise_rows(Quantised(call.w, call.parts, call.layout), offsets=call.offsets), len(call.offsets)
    return w.view(experts, w.shape[0] // max(experts, 1), w.shape[1])


def _in_one_pass(call):
    """Not in the deterministic mode, where all numbers of tokens have one form."""
    few = ceil_div(call.tokens, len(call.offsets)) <= FEW and call.b.shape[2] <= THIN
    return few and not torch.are_deterministic_algorithms_enabled()


def _product(call, x, w, y, *, index=None, a=None, h=None, b=None, gain=None, bias=None, scaled=None, z=None, scale=1.0):
    """y [m, n] of `expert_product_kernel`: x [m, k] or the rows of an index, w [experts, n, k], a
    [experts, r, k], b [experts, n, r]."""
    m, (experts, n, k) = len(y), w.shape
    t = tile("expert_product", x, dtype=x.dtype, m=tall(ceil_div(m, experts)), scaled=scaled is not None)
    r = 0 if b is None else b.shape[2]
    bn, taken = power_of_two(n, most=t.columns), precision(x)
    warps, stages = sound_schedule(x, [w, a], taken, t.rows, t.warps, t.stages, changed=scaled is not None)
    tiles = ceil_div(m, t.rows) + min(experts + 1, m)
    (x0, x1), (w_step, w0, w1) = x.stride(), w.stride()
    (a_step, a0, a1), (b_step, b0, b1) = ((0, 0, 0) if each is None else each.stride() for each in (a, b))
    rows = [None if v is None else v.contiguous() for v in (scaled, gain, bias)]
    layer = ProductLayer(
        x=x, w=w, a=a, h=None if b is None else h, b=b, scaled=rows[0], gain=rows[1], bias=rows[2], y=y, z=z, scale=scale, n=n,
        k=k, r=r, x0=x0, x1=x1, w_step=w_step, w0=w0, w1=w1, a_step=a_step, a0=a0, a1=a1, b_step=b_step, b0=b0, b1=b1,
    )  # fmt: skip
    args = {
        "tokens": _tokens(call, x, index), "layer": layer, "m": m, "tiles": tiles, "PRECISION": taken,
        "E": power_of_two(experts + 1, least=2, most=2 * MOST), "BM": t.rows, "BN": bn, "BK": t.depth,
        "BR": power_of_two(r, most=t.ranks if a is None else THIN),
    }  # fmt: skip
    grid = (tiles * ceil_div(n, bn),) if m else (0,)
    makes = [made for made in (y, z, None if a is None else h) if made is not None]
    launch_triton(expert_product_kernel, grid, args, makes, warps=warps, stages=stages, registers=t.registers)


def _outer(call, u, p, out, *, index=None, gain=None, v=None, of_u=None, of_uv=None):
    """What `expert_outer_kernel` makes: out [experts, r, n]."""
    n, m, experts, r = u.shape[1], len(call.dy), len(call.offsets), 1 if p is None else p.shape[1]
    t = tile("expert_outer", u, dtype=u.dtype, heavy=of_uv is not None)
    bn, br, taken = power_of_two(n, most=t.columns), power_of_two(r, most=t.ranks), precision(u)
    warps, stages = sound_schedule(u, [p], taken, bn, t.warps, t.stages)
    (u0, u1), (v0, v1), (step, out0, out1) = u.stride(), strides(v), (0, 0, 0) if out is None else out.stride()
    layer = OuterLayer(
        u=u, v=v, p=p, gain=None if gain is None else gain.contiguous(), out=out, of_u=of_u, of_uv=of_uv, n=n, r=r, u0=u0,
        u1=u1, v0=v0, v1=v1, out_step=step, out0=out0, out1=out1,
    )  # fmt: skip
    args = {
        "tokens": _tokens(call, u, index), "layer": layer, "m": m, "PRECISION": taken, "BM": t.rows, "BN": bn, "BR": br,
    }  # fmt: skip
    grid = (ceil_div(n, bn), ceil_div(r, br), experts)
    makes = [made for made in (out, of_u, of_uv) if made is not None]
    launch_triton(expert_outer_kernel, grid, args, makes, warps=warps, stages=stages, registers=t.registers)


def _tokens(call, x, index):
    """Whose rows are those of x, by the index if there is one."""
    rows = (None, None) if index is None else (index.contiguous(), len(x))
    return Tokens(call.offsets.contiguous(), len(call.offsets), *rows)
