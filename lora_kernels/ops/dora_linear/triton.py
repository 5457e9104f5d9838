"""Triton: base, adapter, norm, gain and bias from one read of W, for few rows; else weight_norm and
lora_linear."""

from typing import Any, NamedTuple

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


class DoRALayer(NamedTuple):
    """The layer of `dora_kernel`."""

    x: Any
    """[m, k]."""
    w: Any
    """[n, k]."""
    a: Any
    """[r, k]."""
    b: Any
    """[n, r]."""
    bias: Any
    """[n], or None."""
    magnitude: Any
    """[n]."""
    y: Any
    """[m, n]."""
    norm: Any
    """[n], float32."""
    scale: Any
    n: Any
    k: Any
    r: Any
    x0: Any
    x1: Any
    w0: Any
    w1: Any
    a0: Any
    a1: Any
    b0: Any
    b1: Any


@triton.jit(do_not_specialize=["m"])
def dora_kernel(
    layer, m, PRECISION: tl.constexpr, OF_B_A: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """norm = ‖w + scale · b a‖, y = magnitude / norm ⊙ (x wᵀ + scale · x aᵀ bᵀ) + bias; m to BM, r
    to BR.

    Each tile of w serves the product and the norm, each tile of a h and the norm.
    """
    n, k, r = layer.n, layer.k, layer.r
    rows, ranks = tl.arange(0, BM).to(tl.int64), tl.arange(0, BR).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    bs = load_tile(layer.b, ranks, columns, layer.b1, layer.b0, r, n)  # [BR, BN]
    accumulator, squares = tl.zeros((BM, BN), tl.float32), tl.zeros((BK, BN), tl.float32)
    h = tl.zeros((BM, BR), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        xs = load_tile(layer.x, rows, depth, layer.x0, layer.x1, m, k)  # [BM, BK]
        ws = load_tile(layer.w, depth, columns, layer.w1, layer.w0, k, n)  # [BK, BN]
        as_ = load_tile(layer.a, depth, ranks, layer.a1, layer.a0, k, r)  # [BK, BR]
        accumulator = dot_accumulate(xs, ws, accumulator, PRECISION)
        h = dot_accumulate(xs, as_, h, PRECISION)
        adapted = ws.to(tl.float32) + layer.scale * dot_accumulate(as_, bs, tl.zeros((BK, BN), tl.float32), OF_B_A)
        squares += adapted * adapted
    accumulator = dot_accumulate(layer.scale * h, bs, accumulator, PRECISION)
    norms = tl.sqrt_rn(tl.sum(squares, 0))  # [BN]
    tl.store(layer.norm + columns, norms, mask=columns < n)
    magnitudes = tl.load(layer.magnitude + columns, mask=columns < n, other=0.0).to(tl.float32)
    accumulator *= tl.where(norms == 0.0, 1.0, tl.div_rn(magnitudes, tl.where(norms == 0.0, 1.0, norms)))[None, :]
    if layer.bias is not None:
        accumulator += tl.load(layer.bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(layer.y + rows[:, None] * n + columns[None, :], accumulator.to(layer.y.dtype.element_ty), mask=mask)


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
    (x0, x1), (w0, w1), (a0, a1), (b0, b1) = x.stride(), w.stride(), a.stride(), b.stride()
    layer = DoRALayer(
        x=x, w=w, a=a, b=b, bias=None if bias is None else bias.contiguous(), magnitude=call.magnitude.contiguous(), y=y,
        norm=norm, scale=call.scale, n=n, k=k, r=r, x0=x0, x1=x1, w0=w0, w1=w1, a0=a0, a1=a1, b0=b0, b1=b1,
    )  # fmt: skip
    args = {
        "layer": layer, "m": m, "PRECISION": precision(x), "OF_B_A": "half" if a.dtype in HALVES else "bf16x6", "BM": bm,
        "BN": t.columns, "BK": t.depth, "BR": power_of_two(r, most=t.ranks),
    }  # fmt: skip
    # rows of x, and of Aᵀ in B A
    warps, stages = sound_schedule(x, [a], precision(x), max(bm, t.depth), t.warps, t.stages, narrow=True)
    launch_triton(dora_kernel, (ceil_div(n, t.columns),), args, [y, norm], warps=warps, stages=stages, registers=t.registers)
    return y, norm
