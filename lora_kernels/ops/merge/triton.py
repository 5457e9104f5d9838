"""Triton: one program makes one tile of the result; it reads that tile of W and no other, so W may
be changed in place."""

import triton
import triton.language as tl

from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two, refuse_device
from lora_kernels.ops.merge.both_ops import implements_merge
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import sound_schedule
from lora_kernels.ops.triton_skinny import HALVES, dot_accumulate


@triton.jit
def merge_kernel(
    w, a, b, gain, out, scale, n, k, r, w0, w1, a0, a1, b0, b1, g0, o0, o1,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out [n, k] = gain ⊙ (w + scale · b a), which may be w; b [n, r], a [r, k], gain [n]."""
    # along the rows first: neighbours in time are neighbours in memory
    across = tl.cdiv(k, BK)
    rows = (tl.program_id(0) // across).to(tl.int64) * BN + tl.arange(0, BN)
    depth = (tl.program_id(0) % across).to(tl.int64) * BK + tl.arange(0, BK)
    ranks = tl.arange(0, BR).to(tl.int64)
    inside = (rows < n)[:, None] & (depth < k)[None, :]
    ws = tl.load(w + rows[:, None] * w0 + depth[None, :] * w1, mask=inside, other=0.0)  # [BN, BK]
    update = tl.zeros((BN, BK), tl.float32)
    for first in range(0, r, BR):
        rank = first + ranks
        within = rank < r
        at_b, at_a = b + rows[:, None] * b0 + rank[None, :] * b1, a + rank[:, None] * a0 + depth[None, :] * a1
        bs = tl.load(at_b, mask=(rows < n)[:, None] & within[None, :], other=0.0)  # [BN, BR]
        as_ = tl.load(at_a, mask=within[:, None] & (depth < k)[None, :], other=0.0)  # [BR, BK]
        update = dot_accumulate(bs, as_, update, PRECISION)
    merged = ws.to(tl.float32) + scale * update
    if gain is not None:
        # [BN]
        merged *= tl.load(gain + rows * g0, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    tl.store(out + rows[:, None] * o0 + depth[None, :] * o1, merged.to(out.dtype.element_ty), mask=inside)


def refusal(call):
    found = {"w": call.w, "a": call.a, "b": call.b, "gain": call.gain, "out": getattr(call, "out", None)}
    return refuse_dtypes(**found) or refuse_negated(**found) or refuse_device(call.w)


@implements_merge("triton", refusal)
def merge(call, out):
    w, a, b, gain, in_place = call.w, call.a, call.b, call.gain, out.data_ptr() == call.w.data_ptr() != 0
    (n, k), r = w.shape, a.shape[0]
    half = a.dtype in HALVES
    t = tile("merge", w, dtype=w.dtype, factors=a.dtype, r=r)
    args = {
        "w": w, "a": a, "b": b, "gain": gain, "out": out, "scale": float(call.scale), "n": n, "k": k, "r": r, "w0": w.stride(0),
        "w1": w.stride(1), "a0": a.stride(0), "a1": a.stride(1), "b0": b.stride(0), "b1": b.stride(1),
        "g0": 0 if gain is None else gain.stride(0), "o0": out.stride(0), "o1": out.stride(1),
        # 16-bit factors are exact on tensor cores; float32 ones as six products of 16 bits, which
        # is as good
        "PRECISION": "half" if half else "bf16x6", "BN": t.rows, "BK": t.columns, "BR": power_of_two(r, most=t.ranks),
    }  # fmt: skip
    grid, (makes, changes) = (ceil_div(n, t.rows) * ceil_div(k, t.columns),), ([], [out]) if in_place else ([out], [])
    # other blocks, not stages, hide the wait for W: most calls take one step over the ranks
    warps, stages = sound_schedule(b, [a], args["PRECISION"], t.rows, t.warps, t.stages)
    launch_triton(merge_kernel, grid, args, makes, changes=changes, warps=warps, stages=stages, registers=t.registers)
