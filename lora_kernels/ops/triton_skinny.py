"""What the Triton kernels share: tiles, products, and products of a big matrix with thin ones.

Sums are float32 in a fixed order; there are no atomics on them. Offsets are 64 bits. What several
programs add to is kept in parts, which whoever reads them adds up in their order. Kernels take
tuples where several layers share a tensor.
"""

import torch
import triton
import triton.language as tl

from lora_kernels.ops.cuda_split_k import part_of_rows
from lora_kernels.ops.dropout import inverse_keep_rate
from lora_kernels.ops.launch import architecture, ceil_div, launch_triton, power_of_two
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import sound_schedule
from lora_kernels.ops.triton_dropout import dropout_args, dropout_mask

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


@triton.jit(do_not_specialize=["m"])
def shrink_kernel(
    u, vs, outs, dropped, lows, highs, limits, scales, m, k, rs, u0, u1, v0s, v1s, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """outs[g] [part, m, r_g] = scale · drop(u) v_gᵀ over columns SPLIT·part and on; u [m, k] is
    read once for all v_g [r_g, k]. dropped[g] [m, k]: u where the mask keeps it.

    EARLY: what comes next may start meanwhile, and waits before it reads.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    part = tl.program_id(2).to(tl.int64)
    sums = ()
    for _ in tl.static_range(len(vs)):
        sums = sums + (tl.zeros((BM, BR), tl.float32),)
    for first in range(tl.program_id(2) * SPLIT, min(k, (tl.program_id(2) + 1) * SPLIT), BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        us = load_tile(u, rows, depth, u0, u1, m, k)  # [BM, BK]
        added = ()
        for g in tl.static_range(len(vs)):
            v = load_tile(vs[g], depth, ranks, v1s[g], v0s[g], k, rs[g])  # [BK, BR]
            mine = us
            if lows[g] is not None:
                mine = tl.where(dropout_mask(lows[g], highs[g], rows, first, limits[g], BM, BK), us, 0.0)
            if dropped[g] is not None:
                inside = ((rows < m) & (tl.program_id(1) == 0))[:, None] & (depth < k)[None, :]
                tl.store(dropped[g] + rows[:, None] * k + depth[None, :], mine, mask=inside)
            added = added + (dot_accumulate(mine, v, sums[g], PRECISION),)
        sums = added
    for g in tl.static_range(len(vs)):
        at = outs[g] + (part * m + rows)[:, None] * rs[g] + ranks[None, :]
        tl.store(at, scales[g] * sums[g], mask=(rows < m)[:, None] & (ranks < rs[g])[None, :])


@triton.jit
def one_side(
    u, v, gain, h, times, p, part, of_u, of_uv, scaled, less, scale, column, m, n, r, u0, u1, v0, v1, t0, t1,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program of `both_sides_kernel`: u [m, n], v [n, r], h [m, r]; from row ROWS·program_id(2)
    and column BN·column on."""
    columns = tl.cast(column, tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    z, first_ranks = tl.program_id(2).to(tl.int64), tl.program_id(0) == 0
    if gain is not None:
        gains = tl.load(gain + columns, mask=columns < n, other=0.0).to(tl.float32)
    if p is not None:
        vs = load_tile(v, columns, ranks, v0, v1, n, r)  # [BN, BR]
        if gain is not None:  # on the thin side, where its digits cost little
            vs = vs.to(tl.float32) * gains[:, None]
    sums, sum_u, sum_uv = tl.zeros((BN, BR), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for first in range(0, ROWS, BM):
        rows = z * ROWS + first + tl.arange(0, BM)
        us = load_tile(u, rows, columns, u0, u1, m, n)  # [BM, BN]
        if p is not None:
            # [BM, BR]
            ps = scale * dot_accumulate(us, vs, tl.zeros((BM, BR), tl.float32), PRECISION)
            at = p + (tl.cast(column, tl.int64) * m + rows)[:, None] * r + ranks[None, :]
            tl.store(at, ps, mask=(rows < m)[:, None] & (ranks < r)[None, :])
        if scaled is not None:
            mine = (us.to(tl.float32) * (gains - less)[None, :]).to(us.dtype)
            inside = ((rows < m) & first_ranks)[:, None] & (columns < n)[None, :]
            tl.store(scaled + rows[:, None] * n + columns[None, :], mine, mask=inside)
        if of_u is not None:
            sum_u += tl.sum(us.to(tl.float32), 0)
        if of_uv is not None:
            ts = load_tile(times, rows, columns, t0, t1, m, n)  # [BM, BN]
            # a product that goes straight into a sum is fused with its first addition, in each lane
            # its own: lanes would differ
            sum_uv += tl.sum(tl.where((rows < m)[:, None], us.to(tl.float32) * ts.to(tl.float32), 0.0), 0)
        if part is not None:
            hs = load_tile(h, rows, ranks, r, 1, m, r)  # [BM, BR]
            sums = dot_accumulate(tl.trans(us), hs, sums, PRECISION)
    if part is not None:
        at = part + (z * n + columns)[:, None] * r + ranks[None, :]
        tl.store(at, sums, mask=(columns < n)[:, None] & (ranks < r)[None, :])
    if of_u is not None:
        tl.store(of_u + z * n + columns, sum_u, mask=(columns < n) & first_ranks)
    if of_uv is not None:
        tl.store(of_uv + z * n + columns, sum_uv, mask=(columns < n) & first_ranks)


@triton.jit(do_not_specialize=["m"])
def both_sides_kernel(
    us, vs, gains, hs, times, ps, parts, of_us, of_uvs, scaleds, lesses, scales, m, ns, rs, u0s, u1s, v0s, v1s, t0s, t1s,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Of each u_g [m, n_g], read once: p [column block, m, r] = scale · u (gain ⊙ v) in parts; part
    [z, n, r] = uᵀ h over rows ROWS·z and on. Over those rows also the sums of u and of u ⊙ times,
    [z, n]. scaled [m, n] = u ⊙ (gain - less). What is None is left out."""
    column = tl.program_id(1)
    for g in tl.static_range(len(us)):
        blocks = tl.cdiv(ns[g], BN)
        if column >= 0 and column < blocks and tl.program_id(0) * BR < rs[g]:
            one_side(
                us[g], vs[g], gains[g], hs[g], times[g], ps[g], parts[g], of_us[g], of_uvs[g], scaleds[g], lesses[g], scales[g],
                column, m, ns[g], rs[g], u0s[g], u1s[g], v0s[g], v1s[g], t0s[g], t1s[g], ROWS, PRECISION, BM, BN, BR,
            )  # fmt: skip
        column -= blocks


@triton.jit(do_not_specialize=["m"])
def outer_kernel(
    u, ps, wholes, parts, lows, highs, limits, counts, m, n, rs, u0, u1,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """parts[g] [z, r_g, n] = (drop(u)ᵀ p_g)ᵀ over rows ROWS·z and on, p_g the sum of ps[g]
    [counts[g], m, r_g], which goes to wholes[g] [m, r_g]; u [m, n] is read once."""
    ranks = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    columns = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    z = tl.program_id(2).to(tl.int64)
    sums = ()
    for _ in tl.static_range(len(ps)):
        sums = sums + (tl.zeros((BN, BR), tl.float32),)
    for first in range(0, ROWS, BM):
        rows = z * ROWS + first + tl.arange(0, BM)
        us = load_tile(u, rows, columns, u0, u1, m, n)  # [BM, BN]
        added = ()
        for g in tl.static_range(len(ps)):
            p = load_sum(ps[g], rows, ranks, counts[g], m, rs[g])  # [BM, BR]
            if wholes[g] is not None:
                at = wholes[g] + rows[:, None] * rs[g] + ranks[None, :]
                tl.store(at, p, mask=((rows < m) & (tl.program_id(1) == 0))[:, None] & (ranks < rs[g])[None, :])
            mine = us
            if lows[g] is not None:
                mine = tl.where(dropout_mask(lows[g], highs[g], rows, tl.program_id(1) * BN, limits[g], BM, BN), us, 0.0)
            added = added + (dot_accumulate(tl.trans(mine), p, sums[g], PRECISION),)
        sums = added
    for g in tl.static_range(len(ps)):
        at = parts[g] + (z * rs[g] + ranks)[None, :] * n + columns[:, None]
        tl.store(at, sums[g], mask=(columns < n)[:, None] & (ranks < rs[g])[None, :])


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


def strides(name, tensors):
    """The arguments `u0s` and `u1s` for tensors called u, where there is one."""
    return {f"{name}{i}s": tuple(0 if t is None else t.stride(i) for t in tensors) for i in (0, 1)}


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
    dropped = tuple(dropped or [None] * len(vs))
    args = {
        "u": u, "vs": tuple(vs), "outs": outs, "dropped": dropped, **dropout_args(drops), "m": m, "k": k, "rs": tuple(ranks),
        "u0": u.stride(0), "u1": u.stride(1), **strides("v", vs), "SPLIT": split, "PRECISION": product_precision(u, exact),
        "BM": bm, "BK": t.depth, "BR": br,
        "scales": tuple(float(s) * inverse_keep_rate(*drop) for s, drop in zip(scales, drops, strict=True)),
        "EARLY": early and architecture(u) >= 90,
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
    fields = {name: tuple(getattr(s, one) for s in sides) for name, one in (
        ("us", "u"), ("vs", "v"), ("gains", "gain"), ("hs", "h"), ("times", "times"), ("ps", "p"), ("parts", "part"),
        ("of_us", "of_u"), ("of_uvs", "of_uv"), ("scaleds", "scaled"), ("lesses", "less"), ("scales", "scale"), ("rs", "r"),
    )}  # fmt: skip
    args = {
        **fields,
        "m": m,
        "ns": tuple(ns),
        "ROWS": rows,
        "PRECISION": product_precision(first, exact),
        "BM": bm,
        "BN": bn,
        "BR": br,
    }
    for name, one in (("u", "us"), ("v", "vs"), ("t", "times")):
        args |= strides(name, fields[one])
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
    args = {
        "u": u, "ps": tuple(ps), "wholes": wholes, "parts": parts, **dropout_args(drops or [(0.0, None)] * len(ps)),
        "counts": tuple(map(len, ps)), "m": m, "n": n, "rs": tuple(ranks), "u0": u.stride(0), "u1": u.stride(1),
        "ROWS": rows, "PRECISION": product_precision(u, exact), "BM": bm, "BN": bn, "BR": br,
    }  # fmt: skip
    made = [t for t in (*parts, *wholes) if t is not None]
    warps, stages = sound_schedule(u, ps, product_precision(u, exact), bn, t.warps, t.stages, changed=drawing)
    grid = (ceil_div(max(ranks), br), ceil_div(n, bn), ceil_div(m, rows))
    launch_triton(outer_kernel, grid, args, made, warps=warps, stages=stages, registers=t.registers)
    return parts, wholes
