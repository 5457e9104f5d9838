"""Triton: one program makes one tile of the result; it reads that tile of W and no other, so W may
be changed in place."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two, refuse_device
from lora_kernels.ops.merge.both_ops import implements_merge
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import sound_schedule
from lora_kernels.ops.triton_skinny import HALVES, dot_accumulate


class MergedLayer(NamedTuple):
    """The layer of `merge_kernel`."""

    w: Any
    """[n, k]."""
    a: Any
    """[r, k]."""
    b: Any
    """[n, r]."""
    gain: Any
    """[n], or None."""
    out: Any
    """[n, k]."""
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
    g0: Any
    o0: Any
    o1: Any


@triton.jit
def merge_kernel(layer, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """out = gain ⊙ (w + scale · b a), which may be w."""
    n, k, r = layer.n, layer.k, layer.r
    # along the rows first: neighbours in time are neighbours in memory
    across = tl.cdiv(k, BK)
    rows = (tl.program_id(0) // across).to(tl.int64) * BN + tl.arange(0, BN)
    depth = (tl.program_id(0) % across).to(tl.int64) * BK + tl.arange(0, BK)
    ranks = tl.arange(0, BR).to(tl.int64)
    mask = (rows < n)[:, None] & (depth < k)[None, :]
    ws = tl.load(layer.w + rows[:, None] * layer.w0 + depth[None, :] * layer.w1, mask=mask, other=0.0)  # [BN, BK]
    update = tl.zeros((BN, BK), tl.float32)
    for first in range(0, r, BR):
        rank = first + ranks
        rank_mask = rank < r
        at_b = layer.b + rows[:, None] * layer.b0 + rank[None, :] * layer.b1
        at_a = layer.a + rank[:, None] * layer.a0 + depth[None, :] * layer.a1
        bs = tl.load(at_b, mask=(rows < n)[:, None] & rank_mask[None, :], other=0.0)  # [BN, BR]
        as_ = tl.load(at_a, mask=rank_mask[:, None] & (depth < k)[None, :], other=0.0)  # [BR, BK]
        update = dot_accumulate(bs, as_, update, PRECISION)
    merged = ws.to(tl.float32) + layer.scale * update
    if layer.gain is not None:
        # [BN]
        merged *= tl.load(layer.gain + rows * layer.g0, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    pointers = layer.out + rows[:, None] * layer.o0 + depth[None, :] * layer.o1
    tl.store(pointers, merged.to(layer.out.dtype.element_ty), mask=mask)


def refusal(call):
    found = {"w": call.w, "a": call.a, "b": call.b, "gain": call.gain, "out": getattr(call, "out", None)}
    return refuse_dtypes(**found) or refuse_negated(**found) or refuse_device(call.w)


@implements_merge("triton", refusal)
def merge(call, out):
    w, a, b, gain, in_place = call.w, call.a, call.b, call.gain, out.data_ptr() == call.w.data_ptr() != 0
    (n, k), r = w.shape, a.shape[0]
    t = tile("merge", w, dtype=w.dtype, factors=a.dtype, r=r)
    (w0, w1), (a0, a1), (b0, b1), (o0, o1) = w.stride(), a.stride(), b.stride(), out.stride()
    layer = MergedLayer(
        w=w, a=a, b=b, gain=gain, out=out, scale=float(call.scale), n=n, k=k, r=r, w0=w0, w1=w1, a0=a0, a1=a1, b0=b0, b1=b1,
        g0=0 if gain is None else gain.stride(0), o0=o0, o1=o1,
    )  # fmt: skip
    # 16-bit factors are exact on tensor cores; float32 ones as six products of 16 bits, which is as
    # good
    args = {
        "layer": layer, "PRECISION": "half" if a.dtype in HALVES else "bf16x6", "BN": t.rows, "BK": t.columns,
        "BR": power_of_two(r, most=t.ranks),
    }  # fmt: skip
    grid, (makes, changes) = (ceil_div(n, t.rows) * ceil_div(k, t.columns),), ([], [out]) if in_place else ([out], [])
    # other blocks, not stages, hide the wait for W: most calls take one step over the ranks
    warps, stages = sound_schedule(b, [a], args["PRECISION"], t.rows, t.warps, t.stages)
    launch_triton(merge_kernel, grid, args, makes, changes=changes, warps=warps, stages=stages, registers=t.registers)
