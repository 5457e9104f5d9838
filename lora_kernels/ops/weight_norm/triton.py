"""Triton: W is read once and B A made tile by tile in registers, so nothing cancels and ‖W‖² is of
no use.

A GPU has the arithmetic to spare beside the memory: W + s·BA takes as many products as W Aᵀ of the
factored form.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two, refuse_device
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import sound_schedule
from lora_kernels.ops.triton_partials import sum_partials
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows
from lora_kernels.ops.triton_skinny import HALVES, Side, both_sides, dot_accumulate, load_tile, outer_product, shrink
from lora_kernels.ops.weight_norm.triton_quantised import norms


class NormLayer(NamedTuple):
    """The layer of `norm_kernel`."""

    w: Any
    """[n, k]."""
    a: Any
    """[r, k]."""
    b: Any
    """[n, r]."""
    norm: Any
    """[n], float32."""
    scale: Any
    n: Any
    k: Any
    r: Any
    w0: Any
    w1: Any
    a0: Any
    a1: Any
    b0: Any
    b1: Any


@triton.jit
def norm_kernel(
    layer, MORE: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr
):
    """norm [n] = ‖w + scale · b a‖. MORE: there are more ranks than BR, and b does not stay in
    registers."""
    n, k, r = layer.n, layer.k, layer.r
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR).to(tl.int64)
    squares = tl.zeros((BN, BK), tl.float32)
    bs = load_tile(layer.b, rows, ranks, layer.b0, layer.b1, n, r)  # [BN, BR]
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        ws = load_tile(layer.w, rows, depth, layer.w0, layer.w1, n, k)  # [BN, BK]
        as_ = load_tile(layer.a, ranks, depth, layer.a0, layer.a1, r, k)  # [BR, BK]
        update = dot_accumulate(bs, as_, tl.zeros((BN, BK), tl.float32), PRECISION)
        if MORE:
            for rank in range(BR, r, BR):
                more_b = load_tile(layer.b, rows, rank + ranks, layer.b0, layer.b1, n, r)  # [BN, BR]
                more_a = load_tile(layer.a, rank + ranks, depth, layer.a0, layer.a1, r, k)  # [BR, BK]
                update = dot_accumulate(more_b, more_a, update, PRECISION)
        adapted = ws.to(tl.float32) + layer.scale * update
        squares += adapted * adapted
    # one sum over lanes at the end: in the loop the compiler would fuse its first addition with the
    # product, in each lane its own, and the lanes would hold different sums
    tl.store(layer.norm + rows, tl.sqrt_rn(tl.sum(squares, 1)), mask=rows < n)


@triton.jit
def row_norm_squared_kernel(w, squared, n, k, w0, w1, BN: tl.constexpr, BK: tl.constexpr):
    """squared [n] = ‖w‖² of each row."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    squares = tl.zeros((BN, BK), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        ws = load_tile(w, rows, depth, w0, w1, n, k).to(tl.float32)  # [BN, BK]
        squares += ws * ws
    tl.store(squared + rows, tl.sum(squares, 1), mask=rows < n)


def refusal(call):
    tensors = {"a": call.a, "b": call.b}
    return squared_refusal(call) or refuse_dtypes(**tensors) or refuse_negated(**tensors)


def squared_refusal(call):
    if call.layout:
        return Quantised(call.w, call.parts, call.layout).refusal()
    return refuse_dtypes(w=call.w) or refuse_negated(w=call.w) or refuse_device(call.w)


@implements("weight_norm_forward", "triton", refusal)
def forward(call):
    w, a, b = call.w, call.a, call.b
    if call.layout:
        (a0, a1), (b0, b1), none = a.stride(), b.stride(), dict.fromkeys(NormLayer._fields)
        of_factors = {"a": a, "b": b, "scale": float(call.scale), "r": len(a), "a0": a0, "a1": a1, "b0": b0, "b1": b1}
        return norms(Quantised(w, call.parts, call.layout), NormLayer(**none | of_factors), _precision(a))
    (n, k), r = w.shape, a.shape[0]
    norm = w.new_empty(n, dtype=torch.float32)
    t = tile("norm", w, dtype=w.dtype, factors=a.dtype, r=r)
    (w0, w1), (a0, a1), (b0, b1) = w.stride(), a.stride(), b.stride()
    layer = NormLayer(
        w=w, a=a, b=b, norm=norm, scale=float(call.scale), n=n, k=k, r=r, w0=w0, w1=w1, a0=a0, a1=a1, b0=b0, b1=b1
    )
    args = {
        "layer": layer, "MORE": r > t.ranks, "PRECISION": _precision(a), "BR": power_of_two(r, most=t.ranks), "BN": t.rows,
        "BK": t.depth,
    }  # fmt: skip
    if sound_schedule(b, [a], _precision(a), t.rows, t.warps, t.stages) != (t.warps, t.stages):
        # rows, whose products are mma.sync; of two warps b and w would not fit the registers
        args["BN"] = 32
    grid = (ceil_div(n, args["BN"]),)
    launch_triton(norm_kernel, grid, args, [norm], warps=t.warps, stages=t.stages, registers=t.registers)
    return norm


@implements("weight_norm_backward", "triton", refusal)
def backward(call):
    """With c = dn / n: dB = s·c ⊙ (W Aᵀ + s·B A Aᵀ), dA = s·((c ⊙ B)ᵀ W + s·(c ⊙ B)ᵀ B A); BA is
    not formed."""
    w, a, b, scale, needs = call.w, call.a, call.b, call.scale, call.needs
    w = dequantise_rows(Quantised(w, call.parts, call.layout)) if call.layout else w
    c = torch.where(call.n > 0, call.dn / call.n, 0.0)[:, None]
    weighted = (c * b.float()).contiguous()
    of_w = Side(w, len(a), v=a.T if needs[1] else None, h=weighted if needs[0] else None)
    both_sides([of_w], exact=True)  # W is read once for both gradients
    da = db = None
    if needs[1]:
        gram = sum_partials(shrink(a, [a], [1.0], exact=True)[0])
        of_b = sum_partials(shrink(b, [gram], [1.0], exact=True)[0])
        db = ((scale * c) * (sum_partials(of_w.p) + scale * of_b)).to(gradient_dtype(b, needs[1]))
    if needs[0]:
        # (c ⊙ B)ᵀ B, [r, r]
        small = sum_partials(outer_product(b, [weighted[None]], exact=True)[0][0])
        of_a = sum_partials(outer_product(a, [small.T.contiguous()[None]], exact=True)[0][0])
        da = (scale * (sum_partials(of_w.part).T + scale * of_a)).to(gradient_dtype(a, needs[0])).contiguous()
    return da, db


@implements("row_norm_squared", "triton", squared_refusal)
def row_norm_squared(call):
    if call.layout:
        return norms(Quantised(call.w, call.parts, call.layout), NormLayer(*[None] * len(NormLayer._fields)))
    w, (n, k) = call.w, call.w.shape
    squared = w.new_empty(n, dtype=torch.float32)
    t = tile("row_norm_squared", w, dtype=w.dtype)
    args = {"w": w, "squared": squared, "n": n, "k": k, "w0": w.stride(0), "w1": w.stride(1), "BN": t.rows, "BK": t.depth}
    launch_triton(row_norm_squared_kernel, (ceil_div(n, t.rows),), args, [squared], warps=t.warps, stages=t.stages)
    return squared


def _precision(a):
    """Of B A: 16-bit factors are exact on tensor cores; float32 ones as six products of 16 bits,
    which is as good."""
    return "half" if a.dtype in HALVES else "bf16x6"
