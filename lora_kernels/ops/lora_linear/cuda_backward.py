"""CUDA C++: the backward of layers that share x.

B1 reads dy once, for P = s·(dy ⊙ gain) B, dB, the sums of dy and, where dx wants it, dy ⊙ gain; B3
reads x once for dA; then dx by the library's GEMM, in the deterministic mode by
csrc/lora_linear/cuda_dx.cu, with W in int8 by cuda_dx_small.cu, or where that is the choice by
cuda_specialised.py; and what is left to add up.
"""

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.cuda_shared_memory import shared_of_dx_small, shared_of_gemm
from lora_kernels.ops.cuda_split_k import split_k_part
from lora_kernels.ops.dropout import inverse_keep_rate
from lora_kernels.ops.gradients import empty_gradient
from lora_kernels.ops.launch import architecture, ceil_div, launch_cuda, tile_tickets, vector_fields
from lora_kernels.ops.lora_linear import cuda_specialised, library
from lora_kernels.ops.lora_linear.cuda_skinny import (
    both_sides,
    dropout_fields,
    expand,
    gradient_of_zero_gain,
    in_pieces,
    outer_product,
    reduce_partials,
)
from lora_kernels.ops.tables.tiles import compiled

DX, DX_SMALL = (f"lora_linear/cuda_{name}.cu" for name in ("dx", "dx_small"))


def backward(x, dys, layers, hs, ys, zs, needs, w_scale=None, specialised=False):
    """dx, and da, db, dbias, dgain of each layer, as far as they are wanted: `needs` has a `Needs`
    of each."""
    needs_dx = needs[0].x
    own = needs_dx and w_scale is None and (specialised or len(layers) > 1 or not takes_dx(dys[0], layers[0]))
    ps, scaled, grads = [], [], []
    for dy, layer, h, y, z, need in zip(dys, layers, hs, ys, zs, needs, strict=True):
        times = (y if z is None else z) if need.gain else None
        less = (1 if layer.drop_base else 0) if own and layer.gain is not None else None
        p, of_h, of_u, of_uv, times_gain = both_sides(
            dy, layer.b if need.x or need.a else None, h if need.b else None, times, layer.gain, layer.scale, need.bias,
            layer.r, less,
        )  # fmt: skip
        da, db, dbias, dgain = (
            empty_gradient(t, wanted) if wanted else None
            for t, wanted in zip((layer.a, layer.b, layer.bias, layer.gain), need[1:], strict=True)
        )
        jobs = []
        if da is not None:
            of_x, whole = outer_product(x, p, layer.drop, needs_dx and len(p) > 1)
            p = p if whole is None else whole[None]
            jobs.append((of_x, da, None, None, *layer.a.shape, inverse_keep_rate(*layer.drop)))
        if db is not None:
            jobs.append((of_h, db, layer.gain, None, *layer.b.shape, 1.0))
        if dbias is not None:
            jobs.append((of_u, dbias, None, None, len(layer.b), 1, 1.0))
        if dgain is not None:
            jobs.append((of_uv, dgain, None, layer.gain if z is None else None, len(layer.b), 1, 1.0))
        reduce_partials(jobs)
        if dgain is not None and z is None:
            gradient_of_zero_gain(dy, x, layer.w, layer.b, h, layer.gain, w_scale, dgain)
        ps.append(p)
        scaled.append(times_gain)
        grads.append((da, db, dbias, dgain))
    if not needs_dx:
        return None, grads
    if own:
        dx = x.new_empty(x.shape)
        if specialised:
            (layer,), left = layers, dys[0] if scaled[0] is None else scaled[0]
            cuda_specialised.input_gradient(left, layer.w, layer.a, ps[0], layer.drop, dx)
        else:
            library.input_gradient(expand, dys, scaled, layers, ps, dx)
        return dx, grads
    (dy,), (layer,), (p,) = dys, layers, ps
    if w_scale is None:
        return input_gradient(dy, layer.w, layer.a, p, layer.gain, layer.drop), grads
    return input_gradient_small(dy, layer.w, layer.a, p, layer.gain, w_scale), grads


def takes_dx(dy, layer):
    """Whether dx is to be made by a kernel of ours, whose bits in a row do not depend on other
    rows, and it takes this."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and dy.dtype is layer.a.dtype is torch.bfloat16
        and not layer.drop_base
        and layer.w.numel() > 0
        and in_pieces(dy, layer.w, layer.a)
    )


def input_gradient(dy, w, a, p, gain, drop):
    """(dy ⊙ gain) w + drop(p a)."""
    (m, n), k, r = dy.shape, w.shape[1], len(a)
    dx, t = dy.new_empty(m, k), compiled("lora_linear_dx.cu")
    panels = (each * max(n, 1) * 2 for each in (t.rows, t.columns))
    group, slab = cost.tile_order(*panels, t.rows * t.columns * 2, ceil_div(k, t.columns), nearest_chip(architecture(dy)).l2)
    args = {
        "dy": dy, "w": w, "a": a, "p": p, "dx": dx, **vector_fields("gain", gain), **dropout_fields(drop), "m": m, "n": n,
        "k": k, "r": r, "parts": len(p), "dy_row": dy.stride(0), "w_row": w.stride(0), "a_row": a.stride(0), "group": group,
        "slab": slab, "inverse": inverse_keep_rate(*drop),
    }  # fmt: skip
    kernel = f"lora_linear_dx{'' if gain is None else '_gain'}{'' if drop[1] is None else '_drop'}"
    launch_cuda(DX, kernel, (ceil_div(m, t.rows) * ceil_div(k, t.columns),), t.threads, args, [dx], shared_of_gemm(t))
    return dx


def input_gradient_small(dy, w, a, p, gain, w_scale):
    """(dy ⊙ gain ⊙ w_scale) w + p a for up to 64 rows and w of int8."""
    (m, n), k, r = dy.shape, w.shape[1], len(a)
    t = compiled("lora_linear_dx_small.cu", m=m)
    tiles = ceil_div(k, t.columns)
    part = split_k_part(dy, n, t.depth, tiles, 0, 16 * t.rows)
    blocks = tiles, ceil_div(n, part)
    dx, scratch = dy.new_empty(m, k), dy.new_empty(tiles * blocks[1] * t.columns * t.rows, dtype=torch.float32)
    ticket = tile_tickets(dy.device, tiles)
    args = {
        "dy": dy, "w": w, "a": a, "p": p, "dx": dx, "scratch": scratch, "tickets": ticket, **vector_fields("gain", gain),
        **vector_fields("w_scale", w_scale), "m": m, "n": n, "k": k, "r": r, "parts": len(p), "dy_row": dy.stride(0),
        "w_row": w.stride(0), "a_row": a.stride(0), "part": part,
    }  # fmt: skip
    kernel, shared = f"lora_linear_dx_small_{t.rows}", shared_of_dx_small(t)
    launch_cuda(DX_SMALL, kernel, blocks, t.threads, args, [dx, scratch], shared, changes=[ticket])
    return dx
