"""Triton: y = gain ⊙ (x Wᵀ + h Bᵀ) + bias for layers that share x. Where h comes from is a choice:

h [parts, m, r] is made by a launch before (two launches), or in this one from the tiles of x that
it reads (one pass). The adapter's product is taken after the loop over the depth, on the same
float32 sums, so y is rounded once.
"""

import triton
import triton.language as tl

from lora_kernels.ops.triton_dropout import dropout_mask
from lora_kernels.ops.triton_skinny import dot_accumulate, load_sum, load_tile


@triton.jit
def swizzled_tile(tile, down, across, GROUP: tl.constexpr, SLAB: tl.constexpr):
    """The row and the column of a tile, swizzled as ops/cost.py's `tile_order` chose: GROUP rows of
    tiles run side by side and share W in the cache. SLAB: so many columns of tiles at a time, 0 for
    all."""
    first = 0
    if SLAB > 0:
        first = tile // (SLAB * down) * SLAB
        tile %= SLAB * down
        across = min(across - first, SLAB)
    group, inside = tile // (GROUP * across), tile % (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    return group * GROUP + inside % height, first + inside // height


@triton.jit
def add_adapter(
    h, b, sums, rows, columns, m, n, r, parts, b0, b1, PRECISION: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr
):
    """sums + h bᵀ, h [parts, m, r] in float32, b [n, r]. STAGES: of the loop, None for those of the
    launch."""
    for first in tl.range(0, r, BR, num_stages=STAGES):
        ranks = first + tl.arange(0, BR).to(tl.int64)
        hs = load_sum(h, rows, ranks, parts, m, r)  # [BM, BR]
        sums = dot_accumulate(hs, load_tile(b, ranks, columns, b1, b0, r, n), sums, PRECISION)
    return sums


@triton.jit
def store_sum(h, whole, rows, parts, m, r, BR: tl.constexpr):
    """whole [m, r] = Σ h [parts, m, r]."""
    for first in range(0, r, BR):
        ranks = first + tl.arange(0, BR).to(tl.int64)
        at = whole + rows[:, None] * r + ranks[None, :]
        tl.store(at, load_sum(h, rows, ranks, parts, m, r), mask=(rows < m)[:, None] & (ranks < r)[None, :])


@triton.jit
def mainloop(
    x, w, a, map_x, map_w, row, column, rows, columns, begin, end, low, high, limit, m, n, k, r, x0, x1, w0, w1, a0, a1,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x wᵀ [BM, BN] over columns `begin` to `end` of x [m, k], and beside it: with `a` drop(x) aᵀ
    [BM, BR], else, where there is a seed, what drop(x) leaves out of x wᵀ. Where there are maps, x
    and w are loaded through them."""
    sums, dropped, thin = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BR), tl.float32)
    ranks = tl.arange(0, BR).to(tl.int64)
    for first in range(begin, end, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        if map_x is not None:
            xs = map_x.load([row * BM, first])  # [BM, BK]
            ws = map_w.load([column * BN, first]).T  # [BK, BN]
        else:
            xs = load_tile(x, rows, depth, x0, x1, m, k)  # [BM, BK]
            ws = load_tile(w, depth, columns, w1, w0, k, n)  # [BK, BN]
        if a is not None:
            sums = dot_accumulate(xs, ws, sums, PRECISION)
            mine = xs
            if low is not None:
                mine = tl.where(dropout_mask(low, high, rows, first, limit, BM, BK), xs, 0.0)
            thin = dot_accumulate(mine, load_tile(a, depth, ranks, a1, a0, k, r), thin, PRECISION)
        elif low is not None:
            keep = dropout_mask(low, high, rows, first, limit, BM, BK)
            sums = dot_accumulate(tl.where(keep, xs, 0.0), ws, sums, PRECISION)
            dropped = dot_accumulate(tl.where(keep, 0.0, xs), ws, dropped, PRECISION)
        else:
            sums = dot_accumulate(xs, ws, sums, PRECISION)
    return sums, dropped, thin


@triton.jit
def epilogue(
    sums, dropped, thin, a, h, b, bias, gain, y, z, whole, low, inverse, scale, rows, columns, column, m, n, r, parts, b0, b1,
    PRECISION: tl.constexpr, BR: tl.constexpr, RANK_STAGES: tl.constexpr,
):  # fmt: skip
    """What follows the loop: the adapter, z, the gain, the bias; y = gain ⊙ z + bias, z = sums + h
    bᵀ."""
    if a is not None:
        ranks = tl.arange(0, BR).to(tl.int64)
        thin *= scale * inverse
        sums = dot_accumulate(thin, load_tile(b, ranks, columns, b1, b0, r, n), sums, PRECISION)
        if whole is not None and column == 0:
            tl.store(whole + rows[:, None] * r + ranks[None, :], thin, mask=(rows < m)[:, None] & (ranks < r)[None, :])
    else:
        if low is not None:  # what is kept counts `inverse` times in drop(x)
            dropped += (1.0 - inverse) * sums
            sums *= inverse
        sums = add_adapter(h, b, sums, rows, columns, m, n, r, parts, b0, b1, PRECISION, BR, RANK_STAGES)
        if whole is not None and column == 0:
            store_sum(h, whole, rows, parts, m, r, BR)
    at, inside = rows[:, None] * n + columns[None, :], (rows < m)[:, None] & (columns < n)[None, :]
    if z is not None:
        tl.store(z + at, sums.to(z.dtype.element_ty), mask=inside)
    if gain is not None:
        sums *= tl.load(gain + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if a is None and low is not None:
        sums += dropped
    if bias is not None:
        sums += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def reduce_split_k(
    sums, thin, a, scratch, ticket, tile, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    """Whether this program is the last of its tile to come, and then the sums over all of them, in
    their order.

    The ticket counts who came; it is zero before and after, so that no launch has to clear it.
    """
    size: tl.constexpr = BM * (BN + BR)
    mine = scratch + (tl.cast(tile, tl.int64) * SPLITS + tl.program_id(1)) * size
    at_sums = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    at_thin = BM * BN + tl.arange(0, BM)[:, None] * BR + tl.arange(0, BR)[None, :]
    tl.store(mine + at_sums, sums)
    if a is not None:
        tl.store(mine + at_thin, thin)
    last = tl.atomic_add(ticket + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        sums, thin = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BR), tl.float32)
        for split in range(SPLITS):
            other = scratch + (tl.cast(tile, tl.int64) * SPLITS + split) * size
            sums += tl.load(other + at_sums)
            if a is not None:
                thin += tl.load(other + at_thin)
        tl.atomic_xchg(ticket + tile, 0, sem="relaxed")
    return last, sums, thin


@triton.jit(do_not_specialize=["m"])
def forward_kernel(
    x, ws, as_, hs, bs, biases, gains, ys, zs, wholes, scratch, ticket, map_x, map_w0, map_w1, map_w2, lows, highs, limits,
    inverses, scales, m, ns, k, rs, parts, x0, x1, w0s, w1s, a0s, a1s, b0s, b1s,
    SPLITS: tl.constexpr, WAITS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    SLAB: tl.constexpr, RANK_STAGES: tl.constexpr,
):  # fmt: skip
    """ys[g] = gain ⊙ z + bias, z = x wᵀ + h bᵀ, for each layer; h is in hs[g], or made here with
    as_[g].

    With a seed and no as_[g] the base is dropped, too: gain ⊙ z + (x - drop(x)) wᵀ + bias. SPLITS:
    as many programs share a tile's depth. WAITS: h is being made meanwhile. The maps: of x and of
    each w (ops/triton_tma.py).
    """
    maps = (map_w0, map_w1, map_w2)
    down, across = tl.cdiv(m, BM), 0
    for g in tl.static_range(len(ws)):
        across += tl.cdiv(ns[g], BN)
    tile = tl.program_id(0)
    row, column = swizzled_tile(tile, down, across, GROUP, SLAB)
    rows = row.to(tl.int64) * BM + tl.arange(0, BM)
    for g in tl.static_range(len(ws)):
        blocks = tl.cdiv(ns[g], BN)
        if column >= 0 and column < blocks:
            columns = column.to(tl.int64) * BN + tl.arange(0, BN)
            last = True
            each = tl.cdiv(tl.cdiv(k, BK), SPLITS) * BK
            begin = tl.program_id(1) * each
            sums, dropped, thin = mainloop(
                x, ws[g], as_[g], map_x, None if map_x is None else maps[g], row, column, rows, columns, begin,
                min(k, begin + each), lows[g], highs[g], limits[g], m, ns[g], k, rs[g], x0, x1, w0s[g], w1s[g], a0s[g], a1s[g],
                PRECISION, BM, BN, BK, BR,
            )  # fmt: skip
            if WAITS:
                tl.extra.cuda.gdc_wait()
            if SPLITS > 1:
                last, sums, thin = reduce_split_k(sums, thin, as_[g], scratch, ticket, tile, SPLITS, BM, BN, BR)
            if last:
                epilogue(
                    sums, dropped, thin, as_[g], hs[g], bs[g], biases[g], gains[g], ys[g], zs[g], wholes[g], lows[g],
                    inverses[g], scales[g], rows, columns, column, m, ns[g], rs[g], parts, b0s[g], b1s[g], PRECISION, BR,
                    RANK_STAGES,
                )  # fmt: skip
        column -= blocks
