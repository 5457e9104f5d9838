"""Triton: many adapters over few tokens in one launch, which makes h and takes it to y; the parts
are in triton_kernels.py."""

import triton
import triton.language as tl

from lora_kernels.ops.multi_lora.triton_kernels import (
    NOBODY,
    block_of_entries,
    epilogue,
    page_rows,
    times_a,
    times_w,
)
from lora_kernels.ops.multi_lora.triton_slices import expand_slice, shrink_slice, slice_of_tile, tiles_before

# a tile's ticket: how many parts of its base product there are, and all; h; who made h ends it
OF_W, OF_H, MINE = tl.constexpr(1 << 8), tl.constexpr(1 << 16), tl.constexpr(1 << 24)
PATIENCE = tl.constexpr(64)  # looks at a ticket before a tile is left to who makes h


# multi_shrink_kernel does not call it: that way its main loop grows by 8 % on sm_90, over its
# budget (tests/gates)
@triton.jit
def part_of_h(
    batch, one, h, entries, number, block, part, SPLIT: tl.constexpr, EACH: tl.constexpr, SLOTS: tl.constexpr,
    RANKS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What a program of `multi_shrink_kernel` does, of one slice: block `number` of entries,
    `block` of ranks, `part` of x."""
    slot, begin, end = block_of_entries(batch.starts, number, batch.count, BM, SLOTS)
    if slot < batch.count:
        rank = tl.load(one.rank + slot)
        if block * BR < tl.minimum(rank, RANKS):
            positions = begin + tl.arange(0, BM).to(tl.int64)
            mask = positions < end
            entry = tl.load(batch.order + positions, mask=mask, other=0)
            ranks = block * BR + tl.arange(0, BR)
            at = page_rows(one.table, slot, ranks, rank, batch.pages)
            accumulator = times_a(
                batch, one, entry, mask, at, ranks < rank, part * SPLIT, tl.minimum(batch.k, (part + 1) * SPLIT), EACH,
                PRECISION, BM, BK, BR,
            )  # fmt: skip
            accumulator *= tl.load(one.scale + slot)
            pointers = h + (tl.cast(part, tl.int64) * entries + entry)[:, None] * RANKS + ranks[None, :]
            tl.store(pointers, accumulator, mask=mask[:, None] & (ranks < rank)[None, :])


@triton.jit
def tile_offsets(BM: tl.constexpr, BN: tl.constexpr):
    """Where the sums of a tile lie in its part of the scratch memory."""
    return tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]


@triton.jit(do_not_specialize=["m", "ahead"])
def multi_small_kernel(
    batch, slices_of_a, slices, m, ahead, SLICES: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
    SPLIT: tl.constexpr, EACH: tl.constexpr, ONE_ADAPTER: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BM_OF_A: tl.constexpr,
    BK_OF_A: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """y [m, Σ n] by way of h, in one launch; m <= BM.

    The first `ahead` programs of each slice make its h: BLOCKS of 16 ranks, `parts` of the depth,
    the rest blocks of BM_OF_A entries. The others take a tile of w each, BN of its rows and one of
    SPLITS parts of the depth; the last of them at a tile ends it, if h comes in time. Else the last
    of those that make h does: nobody waits for ever, in whatever order they run.
    Tickets: one for h of each slice, one for each tile (TILES of a slice at most), zero before and
    after."""
    program, ticket, parts = tl.program_id(0), batch.ticket, batch.parts
    from_, until = 0, 0  # the tiles that this program may end
    if program < SLICES * ahead:
        g, number = program // ahead, program % ahead
        part_of_h(
            batch, shrink_slice(slices_of_a, g, SLICES), batch.h + tl.cast(g, tl.int64) * parts * m * EACH * RANKS, m * EACH,
            number // (BLOCKS * parts), number % BLOCKS, number // BLOCKS % parts, SPLIT, EACH, SLOTS, RANKS, PRECISION,
            BM_OF_A, BK_OF_A, 16,
        )  # fmt: skip
        if tl.atomic_add(ticket + g, 1, sem="acq_rel") == ahead - 1:
            tl.atomic_xchg(ticket + g, 0, sem="relaxed")
            tiles = tiles_before(slices, g, SLICES, BN) + tl.arange(0, TILES)
            mask = tiles < tiles_before(slices, g + 1, SLICES, BN)
            mine = tl.atomic_add(ticket + SLICES + tiles, OF_H, mask=mask, sem="acq_rel")
            mine = mask & (mine >= OF_W)
            tl.store(ticket + SLICES + tiles, MINE, mask=mine)
            tl.debug_barrier()
            from_, until = tl.min(tl.where(mine, tiles, NOBODY), 0), tl.max(tl.where(mine, tiles + 1, 0), 0)
    else:
        tile, split = (program - SLICES * ahead) // SPLITS, (program - SLICES * ahead) % SPLITS
        g, column, begin = slice_of_tile(tile, slices, SLICES, BN)
        rows = tl.arange(0, BM).to(tl.int64)
        if ONE_ADAPTER:
            rows = tl.load(batch.order + rows, mask=rows < m, other=m)
        columns = tl.cast(column, tl.int64) * BN + tl.arange(0, BN)
        n = expand_slice(slices, g, SLICES).n
        accumulator = times_w(batch, begin, n, rows, columns, split, m, SPLITS, PRECISION, BM, BN, BK)
        offsets = tl.cast(tile * SPLITS + split, tl.int64) * (BM * BN) + tile_offsets(BM, BN)
        tl.store(batch.scratch + offsets, accumulator)
        if tl.atomic_add(ticket + SLICES + tile, 1, sem="acq_rel") % OF_W == SPLITS - 1:
            looks = 0
            while looks < PATIENCE:
                looks += 1
                if tl.atomic_add(ticket + SLICES + tile, 0, sem="relaxed") >= OF_H:
                    looks = PATIENCE
            if tl.atomic_add(ticket + SLICES + tile, OF_W, sem="acq_rel") >= OF_H:
                from_, until = tile, tile + 1
    for tile in tl.range(from_, until, num_stages=1):
        ends = True
        if program < SLICES * ahead:
            ends = tl.atomic_add(ticket + SLICES + tile, 0, sem="relaxed") == MINE
        if ends:
            tl.atomic_xchg(ticket + SLICES + tile, 0, sem="relaxed")
            g, column, begin = slice_of_tile(tile, slices, SLICES, BN)
            rows = tl.arange(0, BM).to(tl.int64)
            mask = rows < m
            if ONE_ADAPTER:
                rows = tl.load(batch.order + rows, mask=mask, other=m)
            columns = tl.cast(column, tl.int64) * BN + tl.arange(0, BN)
            accumulator = tl.zeros((BM, BN), tl.float32)
            for split in tl.range(0, SPLITS, num_stages=1):
                offsets = tl.cast(tile * SPLITS + split, tl.int64) * (BM * BN) + tile_offsets(BM, BN)
                accumulator += tl.load(batch.scratch + offsets)
            epilogue(
                accumulator, batch, slices, rows, mask, columns, column, g, begin, m, SLICES, EACH, ONE_ADAPTER, False, RANKS,
                PRECISION, BM, BN, BR,
            )  # fmt: skip
