"""Triton: the norms of `triton_norms`, and their gradients."""

import torch
import triton
import triton.language as tl

from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.launch import ceil_div, launch_triton, refuse_device
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_norms import norms, norms_of_codes, squares_of_codes
from lora_kernels.ops.triton_partials import sum_partials
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows
from lora_kernels.ops.triton_skinny import Side, both_sides, load_tile, outer_product, shrink


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
    if call.layout:
        return norms_of_codes(Quantised(call.w, call.parts, call.layout), call.a, call.b, call.scale)
    return norms(call.w, call.a, call.b, call.scale)


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
        return squares_of_codes(Quantised(call.w, call.parts, call.layout))
    w, (n, k) = call.w, call.w.shape
    squared = w.new_empty(n, dtype=torch.float32)
    t = tile("row_norm_squared", w, dtype=w.dtype)
    args = {"w": w, "squared": squared, "n": n, "k": k, "w0": w.stride(0), "w1": w.stride(1), "BN": t.rows, "BK": t.depth}
    launch_triton(row_norm_squared_kernel, (ceil_div(n, t.rows),), args, [squared], warps=t.warps, stages=t.stages)
    return squared
