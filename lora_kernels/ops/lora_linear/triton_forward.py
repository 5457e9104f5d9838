"""Triton: y = gain ⊙ (x Wᵀ + h Bᵀ) + bias for layers that share x. Where h comes from is a choice:

h [parts, m, r] is made by a launch before (two launches), or in this one from the tiles of x that
it reads (one pass). The adapter's product is taken after the loop over the depth, on the same
float32 sums, so y is rounded once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_kernels.ops.triton_dropout import dropout_mask
from lora_kernels.ops.triton_skinny import dot_accumulate, load_sum, load_tile


class ForwardInput(NamedTuple):
    """What the layers of `forward_kernel` share."""

    x: Any
    """[m, k]."""
    scratch: Any
    """Where the programs that share a tile leave their sums, and `ticket`, which counts them."""
    ticket: Any
    k: Any
    x0: Any
    x1: Any
    parts: Any
    """Of each h."""


class ForwardLayer(NamedTuple):
    """One layer of `forward_kernel`; None for what there is not."""

    w: Any
    """[n, k]."""
    a: Any
    """[r, k], where h is made here."""
    h: Any
    """[parts, m, r], where it was made before."""
    b: Any
    """[n, r]."""
    bias: Any
    gain: Any
    y: Any
    z: Any
    """[m, n], for y before gain and bias."""
    whole: Any
    """[m, r], for the sum of h's parts."""
    drop: Any
    """A `Dropout`."""
    scale: Any
    n: Any
    r: Any
    w0: Any
    w1: Any
    a0: Any
    a1: Any
    b0: Any
    b1: Any


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
    shared, layer, map_x, map_w, row, column, rows, columns, begin, end, m,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x wᵀ [BM, BN] over columns `begin` to `end` of x [m, k], and beside it: with `a` drop(x) aᵀ
    [BM, BR], else, where there is a seed, what drop(x) leaves out of x wᵀ. Where there are maps, x
    and w are loaded through them."""
    accumulator, dropped = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    h, ranks = tl.zeros((BM, BR), tl.float32), tl.arange(0, BR).to(tl.int64)
    for first in range(begin, end, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        if map_x is not None:
            xs = map_x.load([row * BM, first])  # [BM, BK]
            ws = map_w.load([column * BN, first]).T  # [BK, BN]
        else:
            xs = load_tile(shared.x, rows, depth, shared.x0, shared.x1, m, shared.k)  # [BM, BK]
            ws = load_tile(layer.w, depth, columns, layer.w1, layer.w0, shared.k, layer.n)  # [BK, BN]
        if layer.a is not None:
            accumulator = dot_accumulate(xs, ws, accumulator, PRECISION)
            dropped_xs = xs
            if layer.drop is not None:
                dropped_xs = tl.where(dropout_mask(layer.drop, rows, first, BM, BK), xs, 0.0)
            as_ = load_tile(layer.a, depth, ranks, layer.a1, layer.a0, shared.k, layer.r)  # [BK, BR]
            h = dot_accumulate(dropped_xs, as_, h, PRECISION)
        elif layer.drop is not None:
            keep = dropout_mask(layer.drop, rows, first, BM, BK)
            accumulator = dot_accumulate(tl.where(keep, xs, 0.0), ws, accumulator, PRECISION)
            dropped = dot_accumulate(tl.where(keep, 0.0, xs), ws, dropped, PRECISION)
        else:
            accumulator = dot_accumulate(xs, ws, accumulator, PRECISION)
    return accumulator, dropped, h


@triton.jit
def epilogue(
    accumulator, dropped, h, layer, parts, rows, columns, column, m,
    PRECISION: tl.constexpr, BR: tl.constexpr, RANK_STAGES: tl.constexpr,
):  # fmt: skip
    """What follows the loop: the adapter, z, the gain, the bias; y = gain ⊙ z + bias, z =
    accumulator + h bᵀ."""
    n, r = layer.n, layer.r
    if layer.a is not None:
        ranks = tl.arange(0, BR).to(tl.int64)
        h *= layer.scale if layer.drop is None else layer.scale * layer.drop.inverse
        accumulator = dot_accumulate(h, load_tile(layer.b, ranks, columns, layer.b1, layer.b0, r, n), accumulator, PRECISION)
        if layer.whole is not None and column == 0:
            pointers = layer.whole + rows[:, None] * r + ranks[None, :]
            tl.store(pointers, h, mask=(rows < m)[:, None] & (ranks < r)[None, :])
    else:
        if layer.drop is not None:  # what is kept counts `inverse` times in drop(x)
            dropped += (1.0 - layer.drop.inverse) * accumulator
            accumulator *= layer.drop.inverse
        accumulator = add_adapter(
            layer.h, layer.b, accumulator, rows, columns, m, n, r, parts, layer.b0, layer.b1, PRECISION, BR, RANK_STAGES
        )
        if layer.whole is not None and column == 0:
            store_sum(layer.h, layer.whole, rows, parts, m, r, BR)
    offsets, mask = rows[:, None] * n + columns[None, :], (rows < m)[:, None] & (columns < n)[None, :]
    if layer.z is not None:
        tl.store(layer.z + offsets, accumulator.to(layer.z.dtype.element_ty), mask=mask)
    if layer.gain is not None:
        accumulator *= tl.load(layer.gain + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if layer.a is None and layer.drop is not None:
        accumulator += dropped
    if layer.bias is not None:
        accumulator += tl.load(layer.bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(layer.y + offsets, accumulator.to(layer.y.dtype.element_ty), mask=mask)


@triton.jit
def reduce_split_k(
    accumulator, h, a, scratch, ticket, tile, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    """Whether this program is the last of its tile to come, and then the sums over all of them, in
    their order.

    The ticket counts who came; it is zero before and after, so that no launch has to clear it.
    """
    size: tl.constexpr = BM * (BN + BR)
    split = scratch + (tl.cast(tile, tl.int64) * SPLITS + tl.program_id(1)) * size
    offsets = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    offsets_of_h = BM * BN + tl.arange(0, BM)[:, None] * BR + tl.arange(0, BR)[None, :]
    tl.store(split + offsets, accumulator)
    if a is not None:
        tl.store(split + offsets_of_h, h)
    last_block = tl.atomic_add(ticket + tile, 1, sem="acq_rel") == SPLITS - 1
    if last_block:
        accumulator, h = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BR), tl.float32)
        for i in range(SPLITS):
            other = scratch + (tl.cast(tile, tl.int64) * SPLITS + i) * size
            accumulator += tl.load(other + offsets)
            if a is not None:
                h += tl.load(other + offsets_of_h)
        tl.atomic_xchg(ticket + tile, 0, sem="relaxed")
    return last_block, accumulator, h


@triton.jit(do_not_specialize=["m"])
def forward_kernel(
    shared, layers, map_x, map_w0, map_w1, map_w2, m, LAYERS: tl.constexpr, SPLITS: tl.constexpr, WAITS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    SLAB: tl.constexpr, RANK_STAGES: tl.constexpr,
):  # fmt: skip
    """y = gain ⊙ z + bias, z = x wᵀ + h bᵀ, for each `ForwardLayer`; h was made before, or is made
    here with a.

    With dropout and no a the base is dropped, too: gain ⊙ z + (x - drop(x)) wᵀ + bias. SPLITS: as
    many programs share a tile's depth. WAITS: h is being made meanwhile. The maps: of x and of each
    w (ops/triton_tma.py).
    """
    maps = (map_w0, map_w1, map_w2)
    down, across = tl.cdiv(m, BM), 0
    for g in tl.static_range(LAYERS):
        across += tl.cdiv(layers[g].n, BN)
    tile = tl.program_id(0)
    row, column = swizzled_tile(tile, down, across, GROUP, SLAB)
    rows = row.to(tl.int64) * BM + tl.arange(0, BM)
    for g in tl.static_range(LAYERS):
        blocks = tl.cdiv(layers[g].n, BN)
        if column >= 0 and column < blocks:
            columns = column.to(tl.int64) * BN + tl.arange(0, BN)
            last_block = True
            depth = tl.cdiv(tl.cdiv(shared.k, BK), SPLITS) * BK
            begin = tl.program_id(1) * depth
            accumulator, dropped, h = mainloop(
                shared, layers[g], map_x, None if map_x is None else maps[g], row, column, rows, columns, begin,
                min(shared.k, begin + depth), m, PRECISION, BM, BN, BK, BR,
            )  # fmt: skip
            if WAITS:
                tl.extra.cuda.gdc_wait()
            if SPLITS > 1:
                last_block, accumulator, h = reduce_split_k(
                    accumulator, h, layers[g].a, shared.scratch, shared.ticket, tile, SPLITS, BM, BN, BR
                )
            if last_block:
                epilogue(
                    accumulator, dropped, h, layers[g], shared.parts, rows, columns, column, m, PRECISION, BR, RANK_STAGES
                )
        column -= blocks
