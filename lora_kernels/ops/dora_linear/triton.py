"""Triton: base, adapter, norm, gain and bias from one read of W, for few rows; else weight_norm and
lora_linear."""

import torch
import triton
import triton.language as tl

from lora_kernels.ops.dora_linear.two_ops import norm_then_linear
from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two, refuse_device
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import sound_schedule
from lora_kernels.ops.triton_skinny import HALVES, dot_accumulate, load_tile, precision


@triton.jit(do_not_specialize=["m"])
def dora_kernel(
    x, w, a, b, bias, magnitude, y, norm, scale, m, n, k, r, x0, x1, w0, w1, a0, a1, b0, b1,
    PRECISION: tl.constexpr, OF_B_A: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """norm [n] = ‖w + scale · b a‖, y [m, n] = magnitude / norm ⊙ (x wᵀ + scale · x aᵀ bᵀ) + bias;
    m to BM, r to BR.

    Each tile of w serves the product and the norm, each tile of a h and the norm.
    """
    rows, ranks = tl.arange(0, BM).to(tl.int64), tl.arange(0, BR).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    bs = load_tile(b, ranks, columns, b1, b0, r, n)  # [BR, BN]
    sums, thin, squares = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BR), tl.float32), tl.zeros((BK, BN), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        xs = load_tile(x, rows, depth, x0, x1, m, k)  # [BM, BK]
        ws = load_tile(w, depth, columns, w1, w0, k, n)  # [BK, BN]
        as_ = load_tile(a, depth, ranks, a1, a0, k, r)  # [BK, BR]
        sums = dot_accumulate(xs, ws, sums, PRECISION)
        thin = dot_accumulate(xs, as_, thin, PRECISION)
        adapted = ws.to(tl.float32) + scale * dot_accumulate(as_, bs, tl.zeros((BK, BN), tl.float32), OF_B_A)
        squares += adapted * adapted
    sums = dot_accumulate(scale * thin, bs, sums, PRECISION)
    norms = tl.sqrt_rn(tl.sum(squares, 0))  # [BN]
    tl.store(norm + columns, norms, mask=columns < n)
    known = tl.load(magnitude + columns, mask=columns < n, other=0.0).to(tl.float32)
    sums *= tl.where(norms == 0.0, 1.0, tl.div_rn(known, tl.where(norms == 0.0, 1.0, norms)))[None, :]
    if bias is not None:
        sums += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(y + rows[:, None] * n + columns[None, :], sums.to(y.dtype.element_ty), mask=inside)


def refusal(call):
    tensors = {"x": call.x, "w": call.w, "a": call.a, "b": call.b, "bias": call.bias, "magnitude": call.magnitude}
    return refuse_dtypes(**tensors) or refuse_negated(**tensors) or refuse_device(call.x)


@implements("dora_linear", "triton", refusal)
def forward(call):
    x, w, a, b, bias = call.x, call.w, call.a, call.b, call.bias
    (m, k), (n, r) = x.shape, b.shape
    t = tile("dora", x, dtype=x.dtype, factors=a.dtype)
    if m > t.rows or r > t.ranks or m == 0:
        return norm_then_linear(call)
    y, norm = x.new_empty(m, n), w.new_empty(n, dtype=torch.float32)
    bm = power_of_two(m, most=t.rows)
    args = {
        "x": x, "w": w, "a": a, "b": b, "bias": None if bias is None else bias.contiguous(),
        "magnitude": call.magnitude.contiguous(), "y": y, "norm": norm, "scale": call.scale, "m": m, "n": n, "k": k, "r": r,
        "x0": x.stride(0), "x1": x.stride(1), "w0": w.stride(0), "w1": w.stride(1), "a0": a.stride(0), "a1": a.stride(1),
        "b0": b.stride(0), "b1": b.stride(1), "PRECISION": precision(x), "OF_B_A": "half" if a.dtype in HALVES else "bf16x6",
        "BM": bm, "BN": t.columns, "BK": t.depth, "BR": power_of_two(r, most=t.ranks),
    }  # fmt: skip
    # rows of x, and of Aᵀ in B A
    warps, stages = sound_schedule(x, [a], precision(x), max(bm, t.depth), t.warps, t.stages, narrow=True)
    launch_triton(dora_kernel, (ceil_div(n, t.columns),), args, [y, norm], warps=warps, stages=stages, registers=t.registers)
    return y, norm
