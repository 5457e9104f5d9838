"""Triton: many adapters over one base, in two steps: h of each entry of the plan, every row of A read once for a block of the
adapter's tokens; then y, the base product with the adapters' products on the same float32 sums, or of a base product that is
in y already. Each step is a launch; of few tokens one launch takes both. Work and bytes follow the sum of the ranks. What a row
gets does not depend on the others: their numbers count as zeros. (Zero times NaN is NaN: a B that is not finite, which a pool
refuses, reaches the rows of its tile.)"""

import triton
import triton.language as tl

from lora_kernels.ops.lora_linear.triton_forward import place, together
from lora_kernels.ops.thin import load_tile, product

PAGE = tl.constexpr(8)


@triton.jit
def paged(table, slot, ranks, rank, pages):
    """Where rank rows of a slot are, [ranks] int64; those there are not, at the first."""
    page = tl.load(table + tl.cast(slot, tl.int64) * pages + ranks // PAGE, mask=ranks < rank, other=0).to(tl.int64)
    return page * PAGE + ranks % PAGE


@triton.jit
def load_rows(u, at, there, columns, u0, n):
    """Rows `at` of u as the columns of a tile, [columns, rows]; 0 where `there` is not, and outside."""
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
def unit(starts, number, count, BM: tl.constexpr, SLOTS: tl.constexpr):
    """Blocks of BM entries, slot by slot: the slot of block `number` (`count` if there is none), its first position and its
    adapter's end."""
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
def times_a(
    x, a, entry, mine, at, there, begin, end, k, x0, x1, a0, EACH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x Aᵀ of these entries and rows `at` of a over columns begin to end, [BM, BR]; 0 where `mine` and `there` are not."""
    sums = tl.zeros((BM, BR), tl.float32)
    for first in range(begin, end, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        where = x + (entry // EACH)[:, None] * x0 + depth[None, :] * x1
        xs = tl.load(where, mask=mine[:, None] & (depth < k)[None, :], other=0.0)  # [BM, BK]
        sums = product(xs, load_rows(a, at, there, depth, a0, k), sums, PRECISION)
    return sums


@triton.jit
def multi_shrink_kernel(
    x, as_, tables, rank_of, scale_of, starts, order, hs, entries, k, count, pages, x0, x1, a0s, SPLIT: tl.constexpr,
    EACH: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """hs[g] [part, entry, RANKS] = s · x Aᵀ of the entry's adapter over columns SPLIT·part and on, as far as it has ranks.
    EACH: as many adapters a token."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    slot, begin, end = unit(starts, tl.program_id(0), count, BM, SLOTS)
    part = tl.program_id(2).to(tl.int64)
    if slot < count:
        positions = begin + tl.arange(0, BM).to(tl.int64)
        mine = positions < end
        entry = tl.load(order + positions, mask=mine, other=0)
        for g in tl.static_range(len(as_)):
            block = tl.program_id(1) - g * (RANKS // BR)
            rank = tl.load(rank_of[g] + slot)
            if block >= 0 and block * BR < tl.minimum(rank, RANKS):
                ranks = block * BR + tl.arange(0, BR)
                at = paged(tables[g], slot, ranks, rank, pages)
                sums = times_a(
                    x, as_[g], entry, mine, at, ranks < rank, tl.program_id(2) * SPLIT,
                    tl.minimum(k, (tl.program_id(2) + 1) * SPLIT), k, x0, x1, a0s[g], EACH, PRECISION, BM, BK, BR,
                )  # fmt: skip
                sums *= tl.load(scale_of[g] + slot)
                to = hs[g] + (part * entries + entry)[:, None] * RANKS + ranks[None, :]
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
    """g ⊙ (sums + h Bᵀ) + c, each row with the adapter that it has, if it has one. sums have the bias `held` in them, unless
    None; it gets no gain."""
    slot, _ = slots_of(ids, generation, rows, inside, 1, 0, count)
    lowest, highest = tl.min(tl.where(slot < 0, 0x7FFFFFFF, slot), 0), tl.max(slot, 0)
    for s in tl.range(lowest, highest + 1, num_stages=1):
        own = slot == s
        if tl.max(own.to(tl.int32), 0) > 0:
            rank, kind = tl.load(rank_of + s), tl.load(flags + s)
            for first in tl.range(0, rank, BR, num_stages=1):
                ranks = first + tl.arange(0, BR)
                hs = load_h(h, rows, own, ranks, rank, parts, entries, RANKS)  # [BM, BR]
                bs = tl.trans(load_rows(b, paged(table, s, ranks, rank, pages), ranks < rank, columns, b0, n))  # [BR, BN]
                sums = product(hs, bs, sums, PRECISION)
            at = tl.cast(s, tl.int64) * n + columns
            if kind & 1:
                gains = tl.load(gain + at, mask=columns < n, other=0.0)[None, :]
                if held is not None:
                    sums = tl.where(own[:, None], gains * (sums - held) + held, sums)
                else:
                    sums = tl.where(own[:, None], gains * sums, sums)
            if kind & 2:
                sums += tl.where(own[:, None], tl.load(more + at, mask=columns < n, other=0.0)[None, :], 0.0)
    return sums


@triton.jit
def several_adapters(
    sums, held, h, b, table, rank_of, flags, gain, more, ids, weights, generation, rows, inside, columns, n, b0, count, pages,
    parts, entries, EACH: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """sums + Σ v ((g - 1) ⊙ sums + g ⊙ h Bᵀ + c) over the adapters of each row, one after the other."""
    added = tl.zeros((BM, BN), tl.float32)
    for i in tl.static_range(EACH):
        slot, _ = slots_of(ids, generation, rows, inside, EACH, i, count)
        v = tl.full((BM,), 1.0, tl.float32)
        if weights is not None:
            v = tl.load(weights + rows * EACH + i, mask=inside, other=0.0)
        lowest, highest = tl.min(tl.where(slot < 0, 0x7FFFFFFF, slot), 0), tl.max(slot, 0)
        for s in tl.range(lowest, highest + 1, num_stages=1):
            own = slot == s
            if tl.max(own.to(tl.int32), 0) > 0:
                rank, kind = tl.load(rank_of + s), tl.load(flags + s)
                term = tl.zeros((BM, BN), tl.float32)
                for first in tl.range(0, rank, BR, num_stages=1):
                    ranks = first + tl.arange(0, BR)
                    hs = load_h(h, rows * EACH + i, own, ranks, rank, parts, entries, RANKS)
                    bs = tl.trans(load_rows(b, paged(table, s, ranks, rank, pages), ranks < rank, columns, b0, n))
                    term = product(hs, bs, term, PRECISION)
                at = tl.cast(s, tl.int64) * n + columns
                if kind & 1:
                    gains = tl.load(gain + at, mask=columns < n, other=0.0)[None, :]
                    term = gains * term + (gains - 1.0) * (sums if held is None else sums - held)
                if kind & 2:
                    term += tl.load(more + at, mask=columns < n, other=0.0)[None, :]
                added += tl.where(own[:, None], v[:, None] * term, 0.0)
    return sums + added


@triton.jit
def report(error, ids, generation, rows, inside, count, EACH: tl.constexpr):
    """Tells the host if one of these rows has an id that nobody has."""
    for i in tl.static_range(EACH):
        slot, unknown = slots_of(ids, generation, rows, inside, EACH, i, count)
        if tl.max(unknown.to(tl.int32), 0) > 0:
            tl.atomic_xchg(error, 1, sem="relaxed")


@triton.jit(do_not_specialize=["m"])
def multi_lora_kernel(
    x, w, h, b, table, rank_of, flags, gain, more, generation, ids, weights, order, error, bias, y, scratch, ticket, m, n, k,
    count, pages, parts, x0, x1, w0, w1, y0, y1, b0, bias0,
    EACH: tl.constexpr, ALONE: tl.constexpr, MADE: tl.constexpr, SPLITS: tl.constexpr, WAITS: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    SLAB: tl.constexpr,
):  # fmt: skip
    """y [m, n] of one site. MADE: x wᵀ, with the bias in it, stands in y already. ALONE: a token has one adapter of weight 1 at
    most; tokens then come in the order of the plan, those of an adapter together. Else EACH.

    SPLITS: as many programs share a tile's depth. WAITS: h is being made meanwhile. What the stores need is computed there
    again: kept over the loops it would take the registers of those."""
    tile = tl.program_id(0)
    row, column = place(tile, tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP, SLAB)
    rows, columns = row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BN + tl.arange(0, BN)
    inside = rows < m
    if ALONE:
        rows = tl.load(order + rows, mask=inside, other=m)
    last = True
    sums = tl.zeros((BM, BN), tl.float32)
    if MADE:
        from_ = y + rows[:, None] * y0 + columns[None, :] * y1
        sums = tl.load(from_, mask=inside[:, None] & (columns < n)[None, :], other=0.0).to(tl.float32)
    else:
        each = tl.cdiv(tl.cdiv(k, BK), SPLITS) * BK
        begin = tl.program_id(1) * each
        for first in range(begin, tl.minimum(k, begin + each), BK):
            depth = first + tl.arange(0, BK).to(tl.int64)
            xs = load_tile(x, rows, depth, x0, x1, m, k)  # [BM, BK]
            ws = load_tile(w, depth, columns, w1, w0, k, n)  # [BK, BN]
            sums = product(xs, ws, sums, PRECISION)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    if SPLITS > 1:
        thin = tl.zeros((BM, BR), tl.float32)
        last, sums, thin = together(sums, thin, None, scratch, ticket, tile, SPLITS, BM, BN, BR)
    if last:
        held = None
        if bias is not None:
            biases = tl.load(bias + columns * bias0, mask=columns < n, other=0.0).to(tl.float32)[None, :]
            if MADE:
                held = biases
        if ALONE:
            sums = one_adapter(
                sums, held, h, b, table, rank_of, flags, gain, more, ids, generation, rows, inside, columns, n, b0, count,
                pages, parts, m, RANKS, PRECISION, BR,
            )  # fmt: skip
        else:
            sums = several_adapters(
                sums, held, h, b, table, rank_of, flags, gain, more, ids, weights, generation, rows, inside, columns, n, b0,
                count, pages, parts, m * EACH, EACH, RANKS, PRECISION, BM, BN, BR,
            )  # fmt: skip
        if bias is not None and not MADE:
            sums += biases
        to = y + rows[:, None] * y0 + columns[None, :] * y1
        tl.store(to, sums.to(y.dtype.element_ty), mask=inside[:, None] & (columns < n)[None, :])
        if column == 0:
            report(error, ids, generation, rows, inside, count, EACH)


@triton.jit
def part_of_h(
    x, a, table, rank_of, scale_of, starts, order, h, entries, k, count, pages, x0, x1, a0, number, block, part,
    SPLIT: tl.constexpr, EACH: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What a program of `multi_shrink_kernel` does, of one site: block `number` of entries, `block` of ranks, `part` of x."""
    slot, begin, end = unit(starts, number, count, BM, SLOTS)
    if slot < count:
        rank = tl.load(rank_of + slot)
        if block * BR < tl.minimum(rank, RANKS):
            positions = begin + tl.arange(0, BM).to(tl.int64)
            mine = positions < end
            entry = tl.load(order + positions, mask=mine, other=0)
            ranks = block * BR + tl.arange(0, BR)
            at = paged(table, slot, ranks, rank, pages)
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
    x, w, h, a, b, table, rank_of, scale_of, flags, gain, more, generation, starts, ids, weights, order, error, bias, y,
    scratch, ticket, m, n, k, count, pages, parts, x0, x1, w0, w1, y0, y1, a0, b0, bias0, ahead,
    BLOCKS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, EACH: tl.constexpr, ALONE: tl.constexpr,
    SLOTS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, BM_OF_A: tl.constexpr, BK_OF_A: tl.constexpr,
):  # fmt: skip
    """y [m, n] of one site by way of h, in one launch; m <= BM.

    The first `ahead` programs make h: BLOCKS of 16 ranks, `parts` of the depth, the rest blocks of BM_OF_A entries. The others
    take a tile of w each, BN of its rows and one of SPLITS parts of the depth. Nobody waits: whoever comes last to a tile ends
    it, and the last of those that make h comes to every tile. Tickets: one for h, one for each tile, zero before and after."""
    program, tiles = tl.program_id(0), tl.cdiv(n, BN)
    makes_h = program < ahead
    from_, until = 0, 0  # the tiles to which this program comes
    if makes_h:
        part_of_h(
            x, a, table, rank_of, scale_of, starts, order, h, m * EACH, k, count, pages, x0, x1, a0,
            program // (BLOCKS * parts), program % BLOCKS, program // BLOCKS % parts, SPLIT, EACH, SLOTS, RANKS, PRECISION,
            BM_OF_A, BK_OF_A, 16,
        )  # fmt: skip
        if tl.atomic_add(ticket, 1, sem="acq_rel") == ahead - 1:
            tl.atomic_xchg(ticket, 0, sem="relaxed")
            until = tiles
    else:
        tile, split = (program - ahead) // SPLITS, (program - ahead) % SPLITS
        rows = tl.arange(0, BM).to(tl.int64)
        if ALONE:
            rows = tl.load(order + rows, mask=rows < m, other=m)
        columns = tl.cast(tile, tl.int64) * BN + tl.arange(0, BN)
        sums = tl.zeros((BM, BN), tl.float32)
        each = tl.cdiv(tl.cdiv(k, BK), SPLITS) * BK
        for first in range(split * each, tl.minimum(k, (split + 1) * each), BK):
            depth = first + tl.arange(0, BK).to(tl.int64)
            xs = load_tile(x, rows, depth, x0, x1, m, k)  # [BM, BK]
            ws = load_tile(w, depth, columns, w1, w0, k, n)  # [BK, BN]
            sums = product(xs, ws, sums, PRECISION)
        tl.store(scratch + tl.cast(program - ahead, tl.int64) * (BM * BN) + at_sums(BM, BN), sums)
        if tl.atomic_add(ticket + 1 + tile, 1, sem="acq_rel") == SPLITS:
            from_, until = tile, tile + 1
    for tile in tl.range(from_, until, num_stages=1):
        last = True
        if makes_h:
            last = tl.atomic_add(ticket + 1 + tile, 1, sem="acq_rel") == SPLITS
        if last:
            tl.atomic_xchg(ticket + 1 + tile, 0, sem="relaxed")
            rows = tl.arange(0, BM).to(tl.int64)
            inside = rows < m
            if ALONE:
                rows = tl.load(order + rows, mask=inside, other=m)
            columns = tl.cast(tile, tl.int64) * BN + tl.arange(0, BN)
            sums = tl.zeros((BM, BN), tl.float32)
            for split in tl.range(0, SPLITS, num_stages=1):
                sums += tl.load(scratch + tl.cast(tile * SPLITS + split, tl.int64) * (BM * BN) + at_sums(BM, BN))
            if ALONE:
                sums = one_adapter(
                    sums, None, h, b, table, rank_of, flags, gain, more, ids, generation, rows, inside, columns, n, b0, count,
                    pages, parts, m, RANKS, PRECISION, BR,
                )  # fmt: skip
            else:
                sums = several_adapters(
                    sums, None, h, b, table, rank_of, flags, gain, more, ids, weights, generation, rows, inside, columns, n,
                    b0, count, pages, parts, m * EACH, EACH, RANKS, PRECISION, BM, BN, BR,
                )  # fmt: skip
            if bias is not None:
                sums += tl.load(bias + columns * bias0, mask=columns < n, other=0.0).to(tl.float32)[None, :]
            to = y + rows[:, None] * y0 + columns[None, :] * y1
            tl.store(to, sums.to(y.dtype.element_ty), mask=inside[:, None] & (columns < n)[None, :])
            if tile == 0:
                report(error, ids, generation, rows, inside, count, EACH)
