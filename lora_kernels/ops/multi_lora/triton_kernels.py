"""Triton: many adapters over one base, in two steps: h of each entry of the plan, every row of A
read once for a block of the adapter's tokens; then y, the base product with the adapters' products
on the same float32 sums, or of a base product that is in y already. Each step is a launch; of few
tokens one launch takes both. Work and bytes follow the sum of the ranks. What a row gets does not
depend on the others: their numbers count as zeros. (Zero times NaN is NaN: a B that is not finite,
which a pool refuses, reaches the rows of its tile.)"""

import triton
import triton.language as tl

from lora_kernels.ops.lora_linear.triton_forward import reduce_split_k, swizzled_tile
from lora_kernels.ops.triton_skinny import dot_accumulate, load_tile

PAGE = tl.constexpr(8)
NOBODY = tl.constexpr(0x7FFFFFFF)
# a tile's ticket in multi_small_kernel: how many parts of its base product there are, and
# all; h; who made h ends it
OF_W, OF_H, MINE = tl.constexpr(1 << 8), tl.constexpr(1 << 16), tl.constexpr(1 << 24)
PATIENCE = tl.constexpr(64)  # looks at a ticket before a tile is left to who makes h


@triton.jit
def page_rows(table, slot, ranks, rank, pages):
    """Where rank rows of a slot are, [ranks] int64; those there are not, at the first."""
    page = tl.load(table + tl.cast(slot, tl.int64) * pages + ranks // PAGE, mask=ranks < rank, other=0).to(tl.int64)
    return page * PAGE + ranks % PAGE


@triton.jit
def load_rows(u, at, there, columns, u0, n):
    """Rows `at` of u as the columns of a tile, [columns, rows]; 0 where `there` is not, and
    outside."""
    return tl.load(u + at[None, :] * u0 + columns[:, None], mask=there[None, :] & (columns < n)[:, None], other=0.0)


@triton.jit
def slots_of(ids, generation, rows, inside, K: tl.constexpr, i, count):
    """The slot of a row's adapter i, -1 for none, and whether its id is one that nobody has."""
    each = tl.load(ids + rows * K + i, mask=inside, other=-1)
    slot = (each & 0xFFFFFFFF).to(tl.int64)
    within = (each >= 0) & (slot < count)
    held = tl.load(generation + tl.where(within, slot, 0), mask=within, other=-1).to(tl.int64)
    known = within & (held == each >> 32)
    return tl.where(known, slot, -1).to(tl.int32), inside & (each != -1) & (known == 0)


@triton.jit
def next_slot(slot, s):
    """The lowest of these slots above s, or NOBODY."""
    return tl.min(tl.where(slot > s, slot, NOBODY), 0)


@triton.jit
def block_of_entries(starts, number, count, BM: tl.constexpr, SLOTS: tl.constexpr):
    """Blocks of BM entries, slot by slot: the slot of block `number` (`count` if there is none),
    its first position and its adapter's end."""
    each = tl.arange(0, SLOTS)
    first = tl.load(starts + each, mask=each < count, other=0)
    last = tl.load(starts + each + 1, mask=each < count, other=0)
    blocks = ((last - first + BM - 1) // BM).to(tl.int32)
    ends = tl.cumsum(blocks, 0)
    slot = tl.sum((ends <= number).to(tl.int32), 0)
    mine = each == slot
    begin = tl.sum(tl.where(mine, first + (number - (ends - blocks)) * BM, 0), 0)
    return slot, begin, tl.sum(tl.where(mine, last, 0), 0)


@triton.jit
def of_slice(us, g):
    """us[g] of pointers."""
    u = us[0]
    for i in tl.static_range(1, len(us)):
        if g == i:
            u = us[i]
    return u


@triton.jit
def number_of_slice(us, g):
    """us[g] of numbers."""
    u = tl.cast(us[0], tl.int32)
    for i in tl.static_range(1, len(us)):
        if g == i:
            u = tl.cast(us[i], tl.int32)
    return u


@triton.jit
def slice_of(tile, ns, BN: tl.constexpr):
    """Of tiles of BN columns, slice by slice: the slice of a tile, which of its tiles that is, and
    the slice's first column."""
    g, start, first, before = 0, 0, 0, 0
    for i in tl.static_range(len(ns) - 1):
        before += tl.cdiv(ns[i], BN)
        if tile >= before:
            g, start = i + 1, before
            first += ns[i]
    return g, tile - start, first


@triton.jit
def tiles_before(ns, g, BN: tl.constexpr):
    """How many tiles the slices before g have."""
    tiles = 0
    for i in tl.static_range(len(ns)):
        if i < g:
            tiles += tl.cdiv(ns[i], BN)
    return tiles


@triton.jit
def times_a(
    x, a, entry, mine, at, there, begin, end, k, x0, x1, a0, EACH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x Aᵀ of these entries and rows `at` of a over columns begin to end, [BM, BR]; 0 where `mine`
    and `there` are not."""
    sums = tl.zeros((BM, BR), tl.float32)
    for first in range(begin, end, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        where = x + (entry // EACH)[:, None] * x0 + depth[None, :] * x1
        xs = tl.load(where, mask=mine[:, None] & (depth < k)[None, :], other=0.0)  # [BM, BK]
        sums = dot_accumulate(xs, load_rows(a, at, there, depth, a0, k), sums, PRECISION)
    return sums


@triton.jit
def multi_shrink_kernel(
    x, as_, tables, ranks_of, scales, starts, order, h, entries, k, count, pages, x0, x1, a0s, SPLIT: tl.constexpr,
    EACH: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """h [slice, part, entry, RANKS] = s · x Aᵀ of the entry's adapter over columns SPLIT·part and
    on, as far as it has ranks.
    EACH: as many adapters a token."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    slot, begin, end = block_of_entries(starts, tl.program_id(0), count, BM, SLOTS)
    g, block = tl.program_id(1) // (RANKS // BR), tl.program_id(1) % (RANKS // BR)
    if slot < count:
        positions = begin + tl.arange(0, BM).to(tl.int64)
        mine = positions < end
        entry = tl.load(order + positions, mask=mine, other=0)
        rank = tl.load(of_slice(ranks_of, g) + slot)
        if block * BR < tl.minimum(rank, RANKS):
            ranks = block * BR + tl.arange(0, BR)
            at = page_rows(of_slice(tables, g), slot, ranks, rank, pages)
            sums = times_a(
                x, of_slice(as_, g), entry, mine, at, ranks < rank, tl.program_id(2) * SPLIT,
                tl.minimum(k, (tl.program_id(2) + 1) * SPLIT), k, x0, x1, number_of_slice(a0s, g), EACH, PRECISION, BM, BK, BR,
            )  # fmt: skip
            sums *= tl.load(of_slice(scales, g) + slot)
            part = tl.cast(g, tl.int64) * tl.num_programs(2) + tl.program_id(2)
            to = h + (part * entries + entry)[:, None] * RANKS + ranks[None, :]
            tl.store(to, sums, mask=mine[:, None] & (ranks < rank)[None, :])


@triton.jit
def load_h(h, entry, own, ranks, rank, parts, entries, RANKS: tl.constexpr):
    """Σ of h's parts for these entries, [entries, ranks]; 0 where a row is not its own."""
    at, mask = h + entry[:, None] * RANKS + ranks[None, :], own[:, None] & (ranks < rank)[None, :]
    sums = tl.load(at, mask=mask, other=0.0)
    for _ in tl.range(1, parts, num_stages=1):
        at += tl.cast(entries, tl.int64) * RANKS
        sums += tl.load(at, mask=mask, other=0.0)
    return sums


@triton.jit
def one_adapter(
    sums, held, h, b, table, rank_of, flags, gain, more, ids, generation, rows, inside, columns, n, b0, count, pages, parts,
    entries, RANKS: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """g ⊙ (sums + h Bᵀ) + c, each row with the adapter that it has, if it has one. sums have the
    bias `held` in them, unless None; it gets no gain."""
    slot, _ = slots_of(ids, generation, rows, inside, 1, 0, count)
    s = next_slot(slot, -1)
    while s < NOBODY:
        own = slot == s
        rank, kind = tl.load(rank_of + s), tl.load(flags + s)
        for first in tl.range(0, rank, BR, num_stages=1):
            ranks = first + tl.arange(0, BR)
            hs = load_h(h, rows, own, ranks, rank, parts, entries, RANKS)  # [BM, BR]
            # [BR, BN]
            bs = tl.trans(load_rows(b, page_rows(table, s, ranks, rank, pages), ranks < rank, columns, b0, n))
            sums = dot_accumulate(hs, bs, sums, PRECISION)
        at = tl.cast(kind >> 2, tl.int64) * n + columns
        if kind & 1:
            gains = tl.load(gain + at, mask=columns < n, other=0.0)[None, :]
            if held is not None:
                sums = tl.where(own[:, None], gains * (sums - held) + held, sums)
            else:
                sums = tl.where(own[:, None], gains * sums, sums)
        if kind & 2:
            sums += tl.where(own[:, None], tl.load(more + at, mask=columns < n, other=0.0)[None, :], 0.0)
        s = next_slot(slot, s)
    return sums


@triton.jit
def several_adapters(
    sums, held, h, b, table, rank_of, flags, gain, more, ids, weights, generation, rows, inside, columns, n, b0, count, pages,
    parts, entries, EACH: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """sums + Σ v ((g - 1) ⊙ sums + g ⊙ h Bᵀ + c) over the adapters of each row, one after the
    other."""
    added = tl.zeros((BM, BN), tl.float32)
    for i in tl.static_range(EACH):
        slot, _ = slots_of(ids, generation, rows, inside, EACH, i, count)
        v = tl.full((BM,), 1.0, tl.float32)
        if weights is not None:
            v = tl.load(weights + rows * EACH + i, mask=inside, other=0.0)
        s = next_slot(slot, -1)
        while s < NOBODY:
            own = slot == s
            rank, kind = tl.load(rank_of + s), tl.load(flags + s)
            term = tl.zeros((BM, BN), tl.float32)
            for first in tl.range(0, rank, BR, num_stages=1):
                ranks = first + tl.arange(0, BR)
                hs = load_h(h, rows * EACH + i, own, ranks, rank, parts, entries, RANKS)
                bs = tl.trans(load_rows(b, page_rows(table, s, ranks, rank, pages), ranks < rank, columns, b0, n))
                term = dot_accumulate(hs, bs, term, PRECISION)
            at = tl.cast(kind >> 2, tl.int64) * n + columns
            if kind & 1:
                gains = tl.load(gain + at, mask=columns < n, other=0.0)[None, :]
                term = gains * term + (gains - 1.0) * (sums if held is None else sums - held)
            if kind & 2:
                term += tl.load(more + at, mask=columns < n, other=0.0)[None, :]
            added += tl.where(own[:, None], v[:, None] * term, 0.0)
            s = next_slot(slot, s)
    return sums + added


@triton.jit
def report_unknown_ids(error, ids, generation, rows, inside, count, EACH: tl.constexpr):
    """Tells the host if one of these rows has an id that nobody has."""
    for i in tl.static_range(EACH):
        slot, unknown = slots_of(ids, generation, rows, inside, EACH, i, count)
        if tl.max(unknown.to(tl.int32), 0) > 0:
            tl.atomic_xchg(error, 1, sem="relaxed")


@triton.jit
def times_w(
    x, w, rows, columns, split, m, n, k, x0, x1, w0, w1, SPLITS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x wᵀ of these rows and columns over part `split` of SPLITS of the depth, [BM, BN]."""
    sums = tl.zeros((BM, BN), tl.float32)
    each = tl.cdiv(tl.cdiv(k, BK), SPLITS) * BK
    for first in range(split * each, tl.minimum(k, (split + 1) * each), BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        xs = load_tile(x, rows, depth, x0, x1, m, k)  # [BM, BK]
        ws = load_tile(w, depth, columns, w1, w0, k, n)  # [BK, BN]
        sums = dot_accumulate(xs, ws, sums, PRECISION)
    return sums


@triton.jit
def epilogue(
    sums, h, bs, tables, ranks_of, flags, gains, mores, generations, ids, weights, error, bias, y, rows, inside, columns,
    column, g, begin, m, n, count, pages, parts, y0, y1, b0s, bias0, EACH: tl.constexpr, ALONE: tl.constexpr,
    MADE: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What follows the base product of a tile of slice g: adapters, bias, y; and the report."""
    held = None
    if bias is not None:
        biases = tl.load(bias + (begin + columns) * bias0, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        if MADE:
            held = biases
    hs = h + tl.cast(g, tl.int64) * parts * m * EACH * RANKS
    if ALONE:
        sums = one_adapter(
            sums, held, hs, of_slice(bs, g), of_slice(tables, g), of_slice(ranks_of, g), of_slice(flags, g), of_slice(gains, g),
            of_slice(mores, g), ids, of_slice(generations, g), rows, inside, columns, n, number_of_slice(b0s, g), count, pages,
            parts, m, RANKS, PRECISION, BR,
        )  # fmt: skip
    else:
        sums = several_adapters(
            sums, held, hs, of_slice(bs, g), of_slice(tables, g), of_slice(ranks_of, g), of_slice(flags, g), of_slice(gains, g),
            of_slice(mores, g), ids, weights, of_slice(generations, g), rows, inside, columns, n, number_of_slice(b0s, g),
            count, pages, parts, m * EACH, EACH, RANKS, PRECISION, BM, BN, BR,
        )  # fmt: skip
    if bias is not None and not MADE:
        sums += biases
    to = y + rows[:, None] * y0 + (begin + columns)[None, :] * y1
    tl.store(to, sums.to(y.dtype.element_ty), mask=inside[:, None] & (columns < n)[None, :])
    if column == 0:
        report_unknown_ids(error, ids, of_slice(generations, g), rows, inside, count, EACH)


@triton.jit(do_not_specialize=["m"])
def multi_lora_kernel(
    x, w, h, bs, tables, ranks_of, flags, gains, mores, generations, ids, weights, order, error, bias, y, scratch, ticket, m,
    ns, k, count, pages, parts, x0, x1, w0, w1, y0, y1, b0s, bias0,
    EACH: tl.constexpr, ALONE: tl.constexpr, MADE: tl.constexpr, SPLITS: tl.constexpr, WAITS: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    SLAB: tl.constexpr,
):  # fmt: skip
    """y [m, Σ ns], slice by slice. MADE: x wᵀ, with the bias in it, stands in y already. ALONE: a
    token has one adapter of weight 1 at most; tokens then come in the order of the plan, those of
    an adapter together. Else EACH.

    SPLITS: as many programs share a tile's depth. WAITS: h is being made meanwhile."""
    tile = tl.program_id(0)
    row, column = swizzled_tile(tile, tl.cdiv(m, BM), tiles_before(ns, len(ns), BN), GROUP, SLAB)
    g, column, begin = slice_of(column, ns, BN)
    n = number_of_slice(ns, g)
    rows, columns = row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BN + tl.arange(0, BN)
    inside = rows < m
    if ALONE:
        rows = tl.load(order + rows, mask=inside, other=m)
    last = True
    sums = tl.zeros((BM, BN), tl.float32)
    if MADE:
        from_ = y + rows[:, None] * y0 + (begin + columns)[None, :] * y1
        sums = tl.load(from_, mask=inside[:, None] & (columns < n)[None, :], other=0.0).to(tl.float32)
    else:
        sums = times_w(
            x, w + tl.cast(begin, tl.int64) * w0, rows, columns, tl.program_id(1), m, n, k, x0, x1, w0, w1, SPLITS, PRECISION,
            BM, BN, BK,
        )  # fmt: skip
    if WAITS:
        tl.extra.cuda.gdc_wait()
    if SPLITS > 1:
        thin = tl.zeros((BM, BR), tl.float32)
        last, sums, thin = reduce_split_k(sums, thin, None, scratch, ticket, tile, SPLITS, BM, BN, BR)
    if last:
        epilogue(
            sums, h, bs, tables, ranks_of, flags, gains, mores, generations, ids, weights, error, bias, y, rows, inside,
            columns, column, g, begin, m, n, count, pages, parts, y0, y1, b0s, bias0, EACH, ALONE, MADE, RANKS, PRECISION, BM,
            BN, BR,
        )  # fmt: skip


# multi_shrink_kernel does not call it: that way its main loop grows by 8 % on sm_90, over its
# budget (tests/gates)
@triton.jit
def part_of_h(
    x, a, table, rank_of, scale_of, starts, order, h, entries, k, count, pages, x0, x1, a0, number, block, part,
    SPLIT: tl.constexpr, EACH: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What a program of `multi_shrink_kernel` does, of one site: block `number` of entries, `block`
    of ranks, `part` of x."""
    slot, begin, end = block_of_entries(starts, number, count, BM, SLOTS)
    if slot < count:
        rank = tl.load(rank_of + slot)
        if block * BR < tl.minimum(rank, RANKS):
            positions = begin + tl.arange(0, BM).to(tl.int64)
            mine = positions < end
            entry = tl.load(order + positions, mask=mine, other=0)
            ranks = block * BR + tl.arange(0, BR)
            at = page_rows(table, slot, ranks, rank, pages)
            sums = times_a(
                x, a, entry, mine, at, ranks < rank, part * SPLIT, tl.minimum(k, (part + 1) * SPLIT), k, x0, x1, a0, EACH,
                PRECISION, BM, BK, BR,
            )  # fmt: skip
            sums *= tl.load(scale_of + slot)
            to = h + (tl.cast(part, tl.int64) * entries + entry)[:, None] * RANKS + ranks[None, :]
            tl.store(to, sums, mask=mine[:, None] & (ranks < rank)[None, :])


@triton.jit
def at_sums(BM: tl.constexpr, BN: tl.constexpr):
    """Where the sums of a tile lie in its part of the scratch memory."""
    return tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]


@triton.jit(do_not_specialize=["m", "ahead"])
def multi_small_kernel(
    x, w, h, as_, bs, tables, ranks_of, scales, flags, gains, mores, generations, starts, ids, weights, order, error, bias, y,
    scratch, ticket, m, ns, k, count, pages, parts, x0, x1, w0, w1, y0, y1, a0s, b0s, bias0, ahead,
    BLOCKS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, EACH: tl.constexpr, ALONE: tl.constexpr,
    SLOTS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, BM_OF_A: tl.constexpr, BK_OF_A: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """y [m, Σ ns] by way of h, in one launch; m <= BM.

    The first `ahead` programs of each slice make its h: BLOCKS of 16 ranks, `parts` of the depth,
    the rest blocks of BM_OF_A entries. The others take a tile of w each, BN of its rows and one of
    SPLITS parts of the depth; the last of them at a tile ends it, if h comes in time. Else the last
    of those that make h does: nobody waits for ever, in whatever order they run.
    Tickets: one for h of each slice, one for each tile (TILES of a slice at most), zero before and
    after."""
    slices: tl.constexpr = len(ns)
    program = tl.program_id(0)
    from_, until = 0, 0  # the tiles that this program may end
    if program < slices * ahead:
        g, number = program // ahead, program % ahead
        part_of_h(
            x, of_slice(as_, g), of_slice(tables, g), of_slice(ranks_of, g), of_slice(scales, g), starts, order,
            h + tl.cast(g, tl.int64) * parts * m * EACH * RANKS, m * EACH, k, count, pages, x0, x1, number_of_slice(a0s, g),
            number // (BLOCKS * parts), number % BLOCKS, number // BLOCKS % parts, SPLIT, EACH, SLOTS, RANKS, PRECISION,
            BM_OF_A, BK_OF_A, 16,
        )  # fmt: skip
        if tl.atomic_add(ticket + g, 1, sem="acq_rel") == ahead - 1:
            tl.atomic_xchg(ticket + g, 0, sem="relaxed")
            each = tiles_before(ns, g, BN) + tl.arange(0, TILES)
            there = each < tiles_before(ns, g + 1, BN)
            mine = tl.atomic_add(ticket + slices + each, OF_H, mask=there, sem="acq_rel")
            mine = there & (mine >= OF_W)
            tl.store(ticket + slices + each, MINE, mask=mine)
            tl.debug_barrier()
            from_, until = tl.min(tl.where(mine, each, NOBODY), 0), tl.max(tl.where(mine, each + 1, 0), 0)
    else:
        tile, split = (program - slices * ahead) // SPLITS, (program - slices * ahead) % SPLITS
        g, column, begin = slice_of(tile, ns, BN)
        rows = tl.arange(0, BM).to(tl.int64)
        if ALONE:
            rows = tl.load(order + rows, mask=rows < m, other=m)
        columns = tl.cast(column, tl.int64) * BN + tl.arange(0, BN)
        sums = times_w(
            x, w + tl.cast(begin, tl.int64) * w0, rows, columns, split, m, number_of_slice(ns, g), k, x0, x1, w0, w1, SPLITS,
            PRECISION, BM, BN, BK,
        )  # fmt: skip
        tl.store(scratch + tl.cast(tile * SPLITS + split, tl.int64) * (BM * BN) + at_sums(BM, BN), sums)
        if tl.atomic_add(ticket + slices + tile, 1, sem="acq_rel") % OF_W == SPLITS - 1:
            looks = 0
            while looks < PATIENCE:
                looks += 1
                if tl.atomic_add(ticket + slices + tile, 0, sem="relaxed") >= OF_H:
                    looks = PATIENCE
            if tl.atomic_add(ticket + slices + tile, OF_W, sem="acq_rel") >= OF_H:
                from_, until = tile, tile + 1
    for tile in tl.range(from_, until, num_stages=1):
        ends = True
        if program < slices * ahead:
            ends = tl.atomic_add(ticket + slices + tile, 0, sem="relaxed") == MINE
        if ends:
            tl.atomic_xchg(ticket + slices + tile, 0, sem="relaxed")
            g, column, begin = slice_of(tile, ns, BN)
            rows = tl.arange(0, BM).to(tl.int64)
            inside = rows < m
            if ALONE:
                rows = tl.load(order + rows, mask=inside, other=m)
            columns = tl.cast(column, tl.int64) * BN + tl.arange(0, BN)
            sums = tl.zeros((BM, BN), tl.float32)
            for split in tl.range(0, SPLITS, num_stages=1):
                sums += tl.load(scratch + tl.cast(tile * SPLITS + split, tl.int64) * (BM * BN) + at_sums(BM, BN))
            epilogue(
                sums, h, bs, tables, ranks_of, flags, gains, mores, generations, ids, weights, error, bias, y, rows, inside,
                columns, column, g, begin, m, number_of_slice(ns, g), count, pages, parts, y0, y1, b0s, bias0, EACH, ALONE,
                False, RANKS, PRECISION, BM, BN, BR,
            )  # fmt: skip
