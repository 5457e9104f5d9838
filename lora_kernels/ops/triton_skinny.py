"""What the Triton kernels share: tiles, products, and products of a big matrix with thin ones.

Sums are float32 in a fixed order; there are no atomics on them. Offsets are 64 bits. What several
programs add to is kept in parts, which whoever reads them adds up in their order. Kernels take
a named tuple for each of the layers that share a tensor.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_kernels.ops.cuda_split_k import part_of_rows
from lora_kernels.ops.dropout import inverse_keep_rate
from lora_kernels.ops.launch import architecture, ceil_div, launch_triton, power_of_two
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import sound_schedule
from lora_kernels.ops.triton_dropout import dropout_fields, dropout_mask

HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def load_tile(u, rows, columns, u0, u1, m, n):
    """u [rows, columns] of u [m, n], 0 outside."""
    return tl.load(u + rows[:, None] * u0 + columns[None, :] * u1, mask=(rows < m)[:, None] & (columns < n)[None, :], other=0.0)


@triton.jit
def load_sum(part, rows, ranks, parts, m, r):
    """Σ part [parts, m, r] in the order of the parts, [rows, ranks]."""
    sums = load_tile(part, rows, ranks, r, 1, m, r)
    for _ in tl.range(1, parts, num_stages=1):
        part += tl.cast(m, tl.int64) * r
        sums += load_tile(part, rows, ranks, r, 1, m, r)
    return sums


@triton.jit
def dot_accumulate(u, v, sums, PRECISION: tl.constexpr):
    """sums + u v. "half": 16-bit tensor cores, where a float32 operand counts with its first 16
    digits."""
    if PRECISION != "half":
        # step by step, so that errors add up over the steps and not over all of the depth; an
        # addition would be folded back
        step = tl.dot(u.to(tl.float32), v.to(tl.float32), input_precision=PRECISION)
        return tl.fma(step, tl.full(step.shape, 1.0, tl.float32), sums)
    elif u.dtype == v.dtype and u.dtype != tl.float32:
        return tl.dot(u, v, sums)
    elif u.dtype == tl.bfloat16 and v.dtype == tl.float32:
        return tl.dot(u, bf16_remainder(v), tl.dot(u, v.to(tl.bfloat16), sums))
    elif u.dtype == tl.float32 and v.dtype == tl.bfloat16:
        return tl.dot(bf16_remainder(u), v, tl.dot(u.to(tl.bfloat16), v, sums))
    else:  # float16 has too few exponents for a rest
        return tl.dot(u.to(tl.float32), v.to(tl.float32), sums, input_precision="bf16x3")


@triton.jit
def bf16_remainder(v):
    """What bfloat16 leaves of float32; nothing of an infinity."""
    high = v.to(tl.bfloat16).to(tl.float32)
    return tl.where(tl.abs(high) == float("inf"), 0.0, v - high).to(tl.bfloat16)


class ShrinkLayer(NamedTuple):
    """One layer of `shrink_kernel`."""

    v: Any
    """[r, k]."""
    out: Any
    """[parts, m, r], float32."""
    dropped: Any
    """[m, k] for u where the mask keeps it, or None."""
    drop: Any
    """A `Dropout`, or None."""
    scale: Any
    r: Any
    v0: Any
    v1: Any


@triton.jit(do_not_specialize=["m"])
def shrink_kernel(
    u, m, k, u0, u1, layers, LAYERS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [part, m, r] = scale · drop(u) vᵀ over columns SPLIT·part and on of each `ShrinkLayer`; u
    [m, k] is read once for all.

    EARLY: what comes next may start meanwhile, and waits before it reads.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    part = tl.program_id(2).to(tl.int64)
    accumulators = ()
    for _ in tl.static_range(LAYERS):
        accumulators = accumulators + (tl.zeros((BM, BR), tl.float32),)
    for first in range(tl.program_id(2) * SPLIT, min(k, (tl.program_id(2) + 1) * SPLIT), BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        us = load_tile(u, rows, depth, u0, u1, m, k)  # [BM, BK]
        added = ()
        for g in tl.static_range(LAYERS):
            layer = layers[g]
            v = load_tile(layer.v, depth, ranks, layer.v1, layer.v0, k, layer.r)  # [BK, BR]
            dropped_us = us
            if layer.drop is not None:
                dropped_us = tl.where(dropout_mask(layer.drop, rows, first, BM, BK), us, 0.0)
            if layer.dropped is not None:
                mask = ((rows < m) & (tl.program_id(1) == 0))[:, None] & (depth < k)[None, :]
                tl.store(layer.dropped + rows[:, None] * k + depth[None, :], dropped_us, mask=mask)
            added = added + (dot_accumulate(dropped_us, v, accumulators[g], PRECISION),)
        accumulators = added
    for g in tl.static_range(LAYERS):
        r = layers[g].r
        pointers = layers[g].out + (part * m + rows)[:, None] * r + ranks[None, :]
        tl.store(pointers, layers[g].scale * accumulators[g], mask=(rows < m)[:, None] & (ranks < r)[None, :])


class SideTensors(NamedTuple):
    """A `Side` as `both_sides_kernel` takes it."""

    u: Any
    v: Any
    gain: Any
    h: Any
    times: Any
    p: Any
    part: Any
    of_u: Any
    of_uv: Any
    scaled: Any
    less: Any
    scale: Any
    n: Any
    r: Any
    u0: Any
    u1: Any
    v0: Any
    v1: Any
    t0: Any
    t1: Any


@triton.jit
def one_side(
    side, column, m, ROWS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    """One program of `both_sides_kernel`: u [m, n], v [n, r], h [m, r]; from row ROWS·program_id(2)
    and column BN·column on."""
    n, r = side.n, side.r
    columns = tl.cast(column, tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    z, first_ranks = tl.program_id(2).to(tl.int64), tl.program_id(0) == 0
    if side.gain is not None:
        gains = tl.load(side.gain + columns, mask=columns < n, other=0.0).to(tl.float32)
    if side.p is not None:
        vs = load_tile(side.v, columns, ranks, side.v0, side.v1, n, r)  # [BN, BR]
        if side.gain is not None:  # on the thin side, where its digits cost little
            vs = vs.to(tl.float32) * gains[:, None]
    accumulator, sum_u, sum_uv = tl.zeros((BN, BR), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for first in range(0, ROWS, BM):
        rows = z * ROWS + first + tl.arange(0, BM)
        us = load_tile(side.u, rows, columns, side.u0, side.u1, m, n)  # [BM, BN]
        if side.p is not None:
            # [BM, BR]
            ps = side.scale * dot_accumulate(us, vs, tl.zeros((BM, BR), tl.float32), PRECISION)
            pointers = side.p + (tl.cast(column, tl.int64) * m + rows)[:, None] * r + ranks[None, :]
            tl.store(pointers, ps, mask=(rows < m)[:, None] & (ranks < r)[None, :])
        if side.scaled is not None:
            scaled = (us.to(tl.float32) * (gains - side.less)[None, :]).to(us.dtype)
            mask = ((rows < m) & first_ranks)[:, None] & (columns < n)[None, :]
            tl.store(side.scaled + rows[:, None] * n + columns[None, :], scaled, mask=mask)
        if side.of_u is not None:
            sum_u += tl.sum(us.to(tl.float32), 0)
        if side.of_uv is not None:
            ts = load_tile(side.times, rows, columns, side.t0, side.t1, m, n)  # [BM, BN]
            # a product that goes straight into a sum is fused with its first addition, in each lane
            # its own: lanes would differ
            sum_uv += tl.sum(tl.where((rows < m)[:, None], us.to(tl.float32) * ts.to(tl.float32), 0.0), 0)
        if side.part is not None:
            hs = load_tile(side.h, rows, ranks, r, 1, m, r)  # [BM, BR]
            accumulator = dot_accumulate(tl.trans(us), hs, accumulator, PRECISION)
    if side.part is not None:
        pointers = side.part + (z * n + columns)[:, None] * r + ranks[None, :]
        tl.store(pointers, accumulator, mask=(columns < n)[:, None] & (ranks < r)[None, :])
    if side.of_u is not None:
        tl.store(side.of_u + z * n + columns, sum_u, mask=(columns < n) & first_ranks)
    if side.of_uv is not None:
        tl.store(side.of_uv + z * n + columns, sum_uv, mask=(columns < n) & first_ranks)


@triton.jit(do_not_specialize=["m"])
def both_sides_kernel(
    sides, m, SIDES: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Reads the u [m, n] of each `SideTensors` once. p [column block, m, r] = scale · u (gain ⊙ v)
    in parts; part [z, n, r] = uᵀ h over rows ROWS·z and on. Over those rows also the sums of u and
    of u ⊙ times, [z, n]. scaled [m, n] = u ⊙ (gain - less). What is None is left out."""
    column = tl.program_id(1)
    for g in tl.static_range(SIDES):
        blocks = tl.cdiv(sides[g].n, BN)
        if column >= 0 and column < blocks and tl.program_id(0) * BR < sides[g].r:
            one_side(sides[g], column, m, ROWS, PRECISION, BM, BN, BR)
        column -= blocks


class OuterLayer(NamedTuple):
    """One layer of `outer_kernel`."""

    p: Any
    """[parts, m, r], float32."""
    whole: Any
    """[m, r] for the sum of p's parts, or None."""
    out: Any
    """[row block, r, n], float32."""
    drop: Any
    """A `Dropout`, or None."""
    parts: Any
    r: Any


@triton.jit(do_not_specialize=["m"])
def outer_kernel(
    u, layers, m, n, u0, u1, LAYERS: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out [z, r, n] = (drop(u)ᵀ p)ᵀ over rows ROWS·z and on of each `OuterLayer`, p summed over its
    parts; u [m, n] is read once."""
    ranks = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    columns = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    z = tl.program_id(2).to(tl.int64)
    accumulators = ()
    for _ in tl.static_range(LAYERS):
        accumulators = accumulators + (tl.zeros((BN, BR), tl.float32),)
    for first in range(0, ROWS, BM):
        rows = z * ROWS + first + tl.arange(0, BM)
        us = load_tile(u, rows, columns, u0, u1, m, n)  # [BM, BN]
        added = ()
        for g in tl.static_range(LAYERS):
            layer = layers[g]
            p = load_sum(layer.p, rows, ranks, layer.parts, m, layer.r)  # [BM, BR]
            if layer.whole is not None:
                pointers = layer.whole + rows[:, None] * layer.r + ranks[None, :]
                tl.store(pointers, p, mask=((rows < m) & (tl.program_id(1) == 0))[:, None] & (ranks < layer.r)[None, :])
            dropped_us = us
            if layer.drop is not None:
                dropped_us = tl.where(dropout_mask(layer.drop, rows, tl.program_id(1) * BN, BM, BN), us, 0.0)
            added = added + (dot_accumulate(tl.trans(dropped_us), p, accumulators[g], PRECISION),)
        accumulators = added
    for g in tl.static_range(LAYERS):
        r = layers[g].r
        pointers = layers[g].out + (z * r + ranks)[None, :] * n + columns[:, None]
        tl.store(pointers, accumulators[g], mask=(columns < n)[:, None] & (ranks < r)[None, :])


def precision(t):
    """How products with t are taken: the tensor cores' own for 16 bits; else float32 unless torch
    is told TF32 will do."""
    if t.dtype in HALVES:
        return "half"
    return "tf32" if t.is_cuda and _takes_tf32() else "ieee"


def _takes_tf32():
    """Whether torch is told so, by either of its interfaces: to read the older raises where the
    newer was used."""
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    return chosen == "tf32" if chosen != "none" else torch.backends.cuda.matmul.allow_tf32


def strides(t):
    """Both of a matrix; None where there is none."""
    return (None, None) if t is None else t.stride()


def product_precision(u, exact):
    return "ieee" if exact and u.dtype is torch.float32 else precision(u)


def shrink(u, vs, scales, drops=None, *, dropped=None, exact=False, early=False, fixed=True):
    """For each v [r, k] the parts of scale · drop(u) vᵀ, [parts, m, r] in float32, with u [m, k];
    `exact`: never TF32.

    `dropped`: for each v a tensor [m, k] that gets u where the mask keeps it, or None.

    `fixed`: how k is split depends on k and r alone, so that a row's sum does not depend on how
    many rows there are.
    """
    (m, k), ranks = u.shape, [len(v) for v in vs]
    drops = drops or [(0.0, None)] * len(vs)
    drawing, keeps = any(seed is not None for _, seed in drops), any(t is not None for t in dropped or ())
    t = tile("shrink", u, dtype=u.dtype, m=m, k=k, r=max(ranks), layers=len(vs), drawing=drawing, keeps=keeps)
    bm = t.rows if fixed else power_of_two(m, most=t.rows)
    br, split = power_of_two(max(ranks), most=max(16, t.ranks // power_of_two(len(vs), least=1))), t.part
    while not fixed and split < k and ceil_div(m, bm) * ceil_div(k, 2 * split) >= 96:
        split *= 2  # there are programs enough, and each part is written and read
    parts = max(1, ceil_div(k, split))
    warps, stages = sound_schedule(u, vs, product_precision(u, exact), bm, t.warps, t.stages, changed=drawing, narrow=True)
    outs = tuple(u.new_empty(parts, m, r, dtype=torch.float32) for r in ranks)
    dropped = dropped or [None] * len(vs)
    layers = tuple(
        ShrinkLayer(v, out, kept, dropout_fields(*drop), float(scale) * inverse_keep_rate(*drop), len(v), *v.stride())
        for v, out, kept, drop, scale in zip(vs, outs, dropped, drops, scales, strict=True)
    )
    args = {
        "u": u, "layers": layers, "m": m, "k": k, "u0": u.stride(0), "u1": u.stride(1), "LAYERS": len(layers), "SPLIT": split,
        "PRECISION": product_precision(u, exact), "BM": bm, "BK": t.depth, "BR": br, "EARLY": early and architecture(u) >= 90,
    }  # fmt: skip
    makes = [*outs, *(t for t in dropped if t is not None)]
    launch_triton(
        shrink_kernel, (ceil_div(m, bm), ceil_div(max(ranks), br), parts), args, makes, warps=warps, stages=stages,
        registers=t.registers,
    )  # fmt: skip
    return outs


class Side:
    """What `both_sides` makes of one u [m, n]: p if v [n, r] is there, part if h [m, r] is, of_u
    and of_uv if asked, and into `scaled` [m, n], if that is there, u ⊙ (gain - less)."""

    def __init__(self, u, r, *, v=None, gain=None, h=None, times=None, scale=1.0, sums=False, scaled=None, less=0.0):
        self.u, self.r, self.v, self.gain, self.h, self.times, self.scale, self.sums = u, r, v, gain, h, times, scale, sums
        self.scaled, self.less = scaled, float(less)
        self.p = self.part = self.of_u = self.of_uv = None

    def tensors(self):
        """As the kernel takes it."""
        (u0, u1), (v0, v1), (t0, t1) = self.u.stride(), strides(self.v), strides(self.times)
        return SideTensors(
            u=self.u, v=self.v, gain=self.gain, h=self.h, times=self.times, p=self.p, part=self.part, of_u=self.of_u,
            of_uv=self.of_uv, scaled=self.scaled, less=self.less, scale=self.scale, n=self.u.shape[1], r=self.r, u0=u0, u1=u1,
            v0=v0, v1=v1, t0=t0, t1=t1,
        )  # fmt: skip


def both_sides(sides, *, exact=False):
    """Reads each u once and fills the sides: p [parts, m, r] = scale · u (gain ⊙ v) and part
    [parts, n, r] = uᵀ h. The sums of u's columns are of_u [parts, n], those of u ⊙ times of_uv."""
    first = sides[0].u
    m, ns = len(first), [side.u.shape[1] for side in sides]
    # more than one product a tile, or sums beside them
    heavy = any(s.gain is not None or s.times is not None or (s.v is not None and s.v.dtype is torch.float32) for s in sides)
    r = max(s.r for s in sides)
    t = tile("both_sides", first, dtype=first.dtype, m=m, n=sum(ns), r=r, layers=len(sides), heavy=heavy)
    bn, br, bm = power_of_two(max(ns), most=t.columns), power_of_two(r, most=t.ranks), power_of_two(m, most=t.rows)
    blocks = [ceil_div(n, bn) for n in ns]
    rows = part_of_rows(m, sum(blocks), t.part)
    parts = ceil_div(m, rows)
    for side, n, count in zip(sides, ns, blocks, strict=True):
        new = lambda *shape: side.u.new_empty(shape, dtype=torch.float32)  # noqa: B023, E731
        side.p = None if side.v is None else new(count, m, side.r) if n else new(1, m, side.r).zero_()
        side.part = None if side.h is None else new(parts, n, side.r)
        side.of_u = new(parts, n) if side.sums else None
        side.of_uv = None if side.times is None else new(parts, n)
    args = {
        "sides": tuple(side.tensors() for side in sides), "m": m, "SIDES": len(sides), "ROWS": rows,
        "PRECISION": product_precision(first, exact), "BM": bm, "BN": bn, "BR": br,
    }  # fmt: skip
    made = [t for s, n in zip(sides, ns, strict=True) if n for t in (s.p, s.part, s.of_u, s.of_uv, s.scaled) if t is not None]
    warps, stages = sound_schedule(first, [s.h for s in sides], product_precision(first, exact), bn, t.warps, t.stages)
    grid = (ceil_div(r, br), sum(blocks), parts)
    launch_triton(both_sides_kernel, grid, args, made, warps=warps, stages=stages, registers=t.registers)


def outer_product(u, ps, drops=None, *, keep=False, exact=False):
    """For each p [count, m, r], whose parts are added up, the parts of pᵀ drop(u), [parts, r, n]
    without drop's factor, with u [m, n]; and with `keep` the sums of p [m, r]."""
    (m, n), ranks = u.shape, [p.shape[2] for p in ps]
    drawing, share = any(seed is not None for _, seed in drops or []), power_of_two(len(ps), least=1)
    t = tile("outer", u, dtype=u.dtype, m=m, n=n, r=max(ranks), layers=len(ps), drawing=drawing)
    # sums of all layers are held at once; of float32 tiles there are registers enough
    br, most = power_of_two(max(ranks), most=max(16, t.ranks // share)), t.columns // (1 if u.dtype is torch.float32 else share)
    bn, bm = power_of_two(n, most=most), power_of_two(m, most=t.rows)
    rows = part_of_rows(m, ceil_div(n, bn), t.part)
    parts = tuple(u.new_empty(ceil_div(m, rows), r, n, dtype=torch.float32) for r in ranks)
    wholes = tuple(p.new_empty(p.shape[1:]) if keep else None for p in ps)
    layers = tuple(
        OuterLayer(p, whole, part, dropout_fields(*drop), len(p), r)
        for p, whole, part, drop, r in zip(ps, wholes, parts, drops or [(0.0, None)] * len(ps), ranks, strict=True)
    )
    args = {
        "u": u, "layers": layers, "m": m, "n": n, "u0": u.stride(0), "u1": u.stride(1), "LAYERS": len(layers), "ROWS": rows,
        "PRECISION": product_precision(u, exact), "BM": bm, "BN": bn, "BR": br,
    }  # fmt: skip
    made = [t for t in (*parts, *wholes) if t is not None]
    warps, stages = sound_schedule(u, ps, product_precision(u, exact), bn, t.warps, t.stages, changed=drawing)
    grid = (ceil_div(max(ranks), br), ceil_div(n, bn), ceil_div(m, rows))
    launch_triton(outer_kernel, grid, args, made, warps=warps, stages=stages, registers=t.registers)
    return parts, wholes
