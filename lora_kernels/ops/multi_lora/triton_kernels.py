"""Triton: many adapters over one base, in two steps: h of each entry of the plan, every row of A
read once for a block of the adapter's tokens; then y, the base product with the adapters' products
on the same float32 accumulator, or of a base product that is in y already. Each step is a launch;
of few tokens one launch takes both (triton_small.py). Work and bytes follow the sum of the ranks.
What a row gets does not depend on the others: their numbers count as zeros. (Zero times NaN is NaN:
a B that is not finite, which a pool refuses, reaches the rows of its tile.)"""

import triton
import triton.language as tl

from lora_kernels.ops.lora_linear.triton_forward import reduce_split_k, swizzled_tile
from lora_kernels.ops.multi_lora.triton_slices import expand_slice, shrink_slice, slice_of_tile, tiles_before
from lora_kernels.ops.triton_skinny import dot_accumulate, load_tile

PAGE = tl.constexpr(8)
NOBODY = tl.constexpr(0x7FFFFFFF)
# what the flags of an adapter say, beside its row in the gains and biases from bit 2 on
HAS_GAIN, HAS_BIAS = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def page_rows(table, slot, ranks, rank, pages):
    """Where rank rows of a slot are, [ranks] int64; those there are not, at the first."""
    page = tl.load(table + tl.cast(slot, tl.int64) * pages + ranks // PAGE, mask=ranks < rank, other=0).to(tl.int64)
    return page * PAGE + ranks % PAGE


@triton.jit
def load_rows(u, at, row_mask, columns, u0, n):
    """Rows `at` of u as the columns of a tile, [columns, rows]; 0 where the mask is and
    outside."""
    return tl.load(u + at[None, :] * u0 + columns[:, None], mask=row_mask[None, :] & (columns < n)[:, None], other=0.0)


@triton.jit
def slots_of(ids, generation, rows, mask, K: tl.constexpr, i, count):
    """The slot of a row's adapter i, -1 for none, and whether its id is one that nobody has."""
    id = tl.load(ids + rows * K + i, mask=mask, other=-1)
    slot = (id & 0xFFFFFFFF).to(tl.int64)
    within = (id >= 0) & (slot < count)
    current = tl.load(generation + tl.where(within, slot, 0), mask=within, other=-1).to(tl.int64)
    known = within & (current == id >> 32)
    return tl.where(known, slot, -1).to(tl.int32), mask & (id != -1) & (known == 0)


@triton.jit
def next_slot(slot, s):
    """The lowest of these slots above s, or NOBODY."""
    return tl.min(tl.where(slot > s, slot, NOBODY), 0)


@triton.jit
def block_of_entries(starts, number, count, BM: tl.constexpr, SLOTS: tl.constexpr):
    """Blocks of BM entries, slot by slot: the slot of block `number` (`count` if there is none),
    its first position and its adapter's end."""
    slots = tl.arange(0, SLOTS)
    first = tl.load(starts + slots, mask=slots < count, other=0)
    last = tl.load(starts + slots + 1, mask=slots < count, other=0)
    blocks = ((last - first + BM - 1) // BM).to(tl.int32)
    ends = tl.cumsum(blocks, 0)
    slot = tl.sum((ends <= number).to(tl.int32), 0)
    mask = slots == slot
    begin = tl.sum(tl.where(mask, first + (number - (ends - blocks)) * BM, 0), 0)
    return slot, begin, tl.sum(tl.where(mask, last, 0), 0)


@triton.jit
def times_a(
    batch, one, entry, entry_mask, at, rank_mask, begin, end, EACH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x Aᵀ of these entries and rows `at` of A over columns begin to end, [BM, BR]; 0 where the
    masks are."""
    accumulator = tl.zeros((BM, BR), tl.float32)
    for first in range(begin, end, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        pointers = batch.x + (entry // EACH)[:, None] * batch.x0 + depth[None, :] * batch.x1
        xs = tl.load(pointers, mask=entry_mask[:, None] & (depth < batch.k)[None, :], other=0.0)  # [BM, BK]
        as_ = load_rows(one.a, at, rank_mask, depth, one.a0, batch.k)  # [BK, BR]
        accumulator = dot_accumulate(xs, as_, accumulator, PRECISION)
    return accumulator


@triton.jit
def multi_shrink_kernel(
    batch, slices, entries, SLICES: tl.constexpr, SPLIT: tl.constexpr, EACH: tl.constexpr, SLOTS: tl.constexpr,
    RANKS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """h [slice, part, entry, RANKS] = s · x Aᵀ of the entry's adapter over columns SPLIT·part and
    on, as far as it has ranks.
    EACH: as many adapters a token."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    slot, begin, end = block_of_entries(batch.starts, tl.program_id(0), batch.count, BM, SLOTS)
    g, block = tl.program_id(1) // (RANKS // BR), tl.program_id(1) % (RANKS // BR)
    if slot < batch.count:
        one = shrink_slice(slices, g, SLICES)
        positions = begin + tl.arange(0, BM).to(tl.int64)
        mask = positions < end
        entry = tl.load(batch.order + positions, mask=mask, other=0)
        rank = tl.load(one.rank + slot)
        if block * BR < tl.minimum(rank, RANKS):
            ranks = block * BR + tl.arange(0, BR)
            at = page_rows(one.table, slot, ranks, rank, batch.pages)
            accumulator = times_a(
                batch, one, entry, mask, at, ranks < rank, tl.program_id(2) * SPLIT,
                tl.minimum(batch.k, (tl.program_id(2) + 1) * SPLIT), EACH, PRECISION, BM, BK, BR,
            )  # fmt: skip
            accumulator *= tl.load(one.scale + slot)
            part = tl.cast(g, tl.int64) * tl.num_programs(2) + tl.program_id(2)
            pointers = batch.h + (part * entries + entry)[:, None] * RANKS + ranks[None, :]
            tl.store(pointers, accumulator, mask=mask[:, None] & (ranks < rank)[None, :])


@triton.jit
def load_h(h, entry, row_mask, ranks, rank, parts, entries, RANKS: tl.constexpr):
    """Σ of h's parts for these entries, [entries, ranks]; 0 where the mask is."""
    pointers, mask = h + entry[:, None] * RANKS + ranks[None, :], row_mask[:, None] & (ranks < rank)[None, :]
    accumulator = tl.load(pointers, mask=mask, other=0.0)
    for _ in tl.range(1, parts, num_stages=1):
        pointers += tl.cast(entries, tl.int64) * RANKS
        accumulator += tl.load(pointers, mask=mask, other=0.0)
    return accumulator


@triton.jit
def one_adapter(
    accumulator, bias, h, batch, one, rows, mask, columns, m, RANKS: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr
):
    """g ⊙ (accumulator + h Bᵀ) + c, each row with the adapter that it has, if it has one. The
    accumulator has `bias` in it, unless None; it gets no gain."""
    slot, _ = slots_of(batch.ids, one.generation, rows, mask, 1, 0, batch.count)
    s = next_slot(slot, -1)
    while s < NOBODY:
        row_mask = slot == s
        rank, flags = tl.load(one.rank + s), tl.load(one.flags + s)
        for first in tl.range(0, rank, BR, num_stages=1):
            ranks = first + tl.arange(0, BR)
            hs = load_h(h, rows, row_mask, ranks, rank, batch.parts, m, RANKS)  # [BM, BR]
            at = page_rows(one.table, s, ranks, rank, batch.pages)
            bs = tl.trans(load_rows(one.b, at, ranks < rank, columns, one.b0, one.n))  # [BR, BN]
            accumulator = dot_accumulate(hs, bs, accumulator, PRECISION)
        offsets = tl.cast(flags >> 2, tl.int64) * one.n + columns
        if flags & HAS_GAIN:
            gains = tl.load(one.gain + offsets, mask=columns < one.n, other=0.0)[None, :]
            if bias is not None:
                accumulator = tl.where(row_mask[:, None], gains * (accumulator - bias) + bias, accumulator)
            else:
                accumulator = tl.where(row_mask[:, None], gains * accumulator, accumulator)
        if flags & HAS_BIAS:
            biases = tl.load(one.bias + offsets, mask=columns < one.n, other=0.0)[None, :]
            accumulator += tl.where(row_mask[:, None], biases, 0.0)
        s = next_slot(slot, s)
    return accumulator


@triton.jit
def several_adapters(
    accumulator, bias, h, batch, one, rows, mask, columns, m, EACH: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """accumulator + Σ v ((g - 1) ⊙ accumulator + g ⊙ h Bᵀ + c) over the adapters of each row, one
    after the other; `bias` as in `one_adapter`."""
    added = tl.zeros((BM, BN), tl.float32)
    for i in tl.static_range(EACH):
        slot, _ = slots_of(batch.ids, one.generation, rows, mask, EACH, i, batch.count)
        v = tl.full((BM,), 1.0, tl.float32)
        if batch.weights is not None:
            v = tl.load(batch.weights + rows * EACH + i, mask=mask, other=0.0)
        s = next_slot(slot, -1)
        while s < NOBODY:
            row_mask = slot == s
            rank, flags = tl.load(one.rank + s), tl.load(one.flags + s)
            term = tl.zeros((BM, BN), tl.float32)
            for first in tl.range(0, rank, BR, num_stages=1):
                ranks = first + tl.arange(0, BR)
                hs = load_h(h, rows * EACH + i, row_mask, ranks, rank, batch.parts, m * EACH, RANKS)  # [BM, BR]
                at = page_rows(one.table, s, ranks, rank, batch.pages)
                bs = tl.trans(load_rows(one.b, at, ranks < rank, columns, one.b0, one.n))  # [BR, BN]
                term = dot_accumulate(hs, bs, term, PRECISION)
            offsets = tl.cast(flags >> 2, tl.int64) * one.n + columns
            if flags & HAS_GAIN:
                gains = tl.load(one.gain + offsets, mask=columns < one.n, other=0.0)[None, :]
                term = gains * term + (gains - 1.0) * (accumulator if bias is None else accumulator - bias)
            if flags & HAS_BIAS:
                term += tl.load(one.bias + offsets, mask=columns < one.n, other=0.0)[None, :]
            added += tl.where(row_mask[:, None], v[:, None] * term, 0.0)
            s = next_slot(slot, s)
    return accumulator + added


@triton.jit
def report_unknown_ids(error, ids, generation, rows, mask, count, EACH: tl.constexpr):
    """Tells the host if one of these rows has an id that nobody has."""
    for i in tl.static_range(EACH):
        slot, unknown = slots_of(ids, generation, rows, mask, EACH, i, count)
        if tl.max(unknown.to(tl.int32), 0) > 0:
            tl.atomic_xchg(error, 1, sem="relaxed")


@triton.jit
def times_w(
    batch, begin, n, rows, columns, split, m, SPLITS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x wᵀ of these rows, and these columns of the n from `begin` on, over part `split` of SPLITS
    of the depth, [BM, BN]."""
    k, w = batch.k, batch.w + tl.cast(begin, tl.int64) * batch.w0
    accumulator = tl.zeros((BM, BN), tl.float32)
    depth_of_split = tl.cdiv(tl.cdiv(k, BK), SPLITS) * BK
    for first in range(split * depth_of_split, tl.minimum(k, (split + 1) * depth_of_split), BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        xs = load_tile(batch.x, rows, depth, batch.x0, batch.x1, m, k)  # [BM, BK]
        ws = load_tile(w, depth, columns, batch.w1, batch.w0, k, n)  # [BK, BN]
        accumulator = dot_accumulate(xs, ws, accumulator, PRECISION)
    return accumulator


@triton.jit
def epilogue(
    accumulator, batch, slices, rows, mask, columns, column, g, begin, m,
    SLICES: tl.constexpr, EACH: tl.constexpr, ONE_ADAPTER: tl.constexpr, ON_Y: tl.constexpr, RANKS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What follows the base product of a tile of slice g: adapters, bias, y; and the report."""
    one = expand_slice(slices, g, SLICES)
    held_bias = None
    if batch.bias is not None:
        pointers = batch.bias + (begin + columns) * batch.bias0
        biases = tl.load(pointers, mask=columns < one.n, other=0.0).to(tl.float32)[None, :]
        if ON_Y:
            held_bias = biases
    h = batch.h + tl.cast(g, tl.int64) * batch.parts * m * EACH * RANKS
    if ONE_ADAPTER:
        accumulator = one_adapter(accumulator, held_bias, h, batch, one, rows, mask, columns, m, RANKS, PRECISION, BR)
    else:
        accumulator = several_adapters(
            accumulator, held_bias, h, batch, one, rows, mask, columns, m, EACH, RANKS, PRECISION, BM, BN, BR
        )
    if batch.bias is not None and not ON_Y:
        accumulator += biases
    pointers = batch.y + rows[:, None] * batch.y0 + (begin + columns)[None, :] * batch.y1
    tl.store(pointers, accumulator.to(batch.y.dtype.element_ty), mask=mask[:, None] & (columns < one.n)[None, :])
    if column == 0:
        report_unknown_ids(batch.error, batch.ids, one.generation, rows, mask, batch.count, EACH)


@triton.jit(do_not_specialize=["m"])
def multi_lora_kernel(
    batch, slices, m, SLICES: tl.constexpr, EACH: tl.constexpr, ONE_ADAPTER: tl.constexpr, ON_Y: tl.constexpr,
    SPLITS: tl.constexpr, WAITS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """y [m, Σ n], slice by slice. ON_Y: x wᵀ, with the bias in it, stands in y already.
    ONE_ADAPTER: a token has one adapter of weight 1 at most; tokens then come in the order of the
    plan, those of an adapter together. Else EACH.

    SPLITS: as many programs share a tile's depth. WAITS: h is being made meanwhile."""
    tile = tl.program_id(0)
    row, column = swizzled_tile(tile, tl.cdiv(m, BM), tiles_before(slices, SLICES, SLICES, BN), GROUP, SLAB)
    g, column, begin = slice_of_tile(column, slices, SLICES, BN)
    n = expand_slice(slices, g, SLICES).n
    rows, columns = row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BN + tl.arange(0, BN)
    mask = rows < m
    if ONE_ADAPTER:
        rows = tl.load(batch.order + rows, mask=mask, other=m)
    last_block = True
    accumulator = tl.zeros((BM, BN), tl.float32)
    if ON_Y:
        pointers = batch.y + rows[:, None] * batch.y0 + (begin + columns)[None, :] * batch.y1
        accumulator = tl.load(pointers, mask=mask[:, None] & (columns < n)[None, :], other=0.0).to(tl.float32)
    else:
        accumulator = times_w(batch, begin, n, rows, columns, tl.program_id(1), m, SPLITS, PRECISION, BM, BN, BK)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    if SPLITS > 1:
        h = tl.zeros((BM, BR), tl.float32)
        last_block, accumulator, h = reduce_split_k(
            accumulator, h, None, batch.scratch, batch.ticket, tile, SPLITS, BM, BN, BR
        )
    if last_block:
        epilogue(
            accumulator, batch, slices, rows, mask, columns, column, g, begin, m, SLICES, EACH, ONE_ADAPTER, ON_Y, RANKS,
            PRECISION, BM, BN, BR,
        )  # fmt: skip
