"""Triton: h of every entry of the plan, then y of each slice; of few tokens both in one launch. See triton_kernels.py."""

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.chips import chip
from lora_kernels.ops.launch import architecture, ceil, launch, power, refuse_triton, tickets
from lora_kernels.ops.multi_lora.plan import PAGE, unflatten
from lora_kernels.ops.multi_lora.triton_kernels import multi_lora_kernel, multi_shrink_kernel, multi_small_kernel
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.thin import precision

FEW = 64  # tokens that one launch takes, at most; entries, up to which a block of shrink has 16 of one adapter
SPLIT = 1024  # columns of x that one of its programs sums, where there are few
PROGRAMS = 2048  # at most to make h, where one launch makes it and y: of a pool for large ranks most have nothing to do


def refusal(x, w, slots, ids, weights, order, starts, error, bias):
    tensors = {"x": x, "w": w, "bias": bias}
    for i, s in enumerate(unflatten(slots)):
        tensors |= {f"a of slots[{i}]": s.a, f"b of slots[{i}]": s.b}
        if s.a.stride(1) != 1 or s.b.stride(1) != 1:
            return f"a and b of slots[{i}] must have rows without gaps"
    return refuse_dtypes(**tensors) or refuse_negated(**tensors) or refuse_triton(x)


def add_refusal(y, x, slots, *rest):
    return refusal(x, None, slots, *rest) or refuse_dtypes(y=y) or refuse_negated(y=y)


@implements("multi_lora_forward", "triton", refusal)
def forward(x, w, slots, ids, weights, order, starts, error, bias):
    y = x.new_empty(len(x), len(w))
    run(x, w, slots, ids, weights, order, starts, error, bias, y)
    return y


@implements("multi_lora_add", "triton", add_refusal)
def add(y, x, slots, ids, weights, order, starts, error, bias):
    run(x, None, slots, ids, weights, order, starts, error, bias, y)


def run(x, w, slots, ids, weights, order, starts, error, bias, y):
    """Fills y; without w it holds x wᵀ and the bias already. One launch for each site, and one more for h of all sites unless
    `at_once`."""
    if not y.numel():
        return
    sites = unflatten(slots)
    deterministic = torch.are_deterministic_algorithms_enabled()
    pages = max(s.table.shape[1] for s in sites)
    tables = tuple(s.table if s.table.shape[1] == pages else _wider(s.table, pages) for s in sites)
    one = w is not None and at_once(x, sites[0], pages, ids.shape[1], weights, deterministic)
    hs = [None] * len(sites) if one else shrink(x, sites, tables, order, starts, ids.shape[1], deterministic)
    first = 0
    for site, table, h in zip(sites, tables, hs, strict=True):
        last = first + site.b.shape[1]
        of_w, of_bias = (None if t is None else t[first:last] for t in (w, bias))
        if one:
            small(x, of_w, site, table, ids, weights, order, starts, error, of_bias, y[:, first:last], deterministic)
        else:
            adapt(x, of_w, h, site, table, ids, weights, order, error, of_bias, y[:, first:last], deterministic)
        first = last


def at_once(x, site, pages, each, weights, fixed):
    """Whether one launch makes h and y. Not on AMD: there the compiler spills scalar registers."""
    if torch.version.hip:
        return False
    rows = tiles(x, FEW if fixed else len(x), each == 1 and weights is None, False)[0]
    return len(x) <= min(rows, FEW) and programs_of_a(x, site, pages, each, fixed)[0] <= PROGRAMS


def programs_of_a(x, site, pages, each, fixed):
    """How many programs make h of one site in `small`; blocks of ranks and parts of the depth, of each block of entries."""
    entries = len(x) * each
    units = ceil(entries, 64 if fixed else 16) + min(len(site.rank), entries)  # at most: the plan is not looked at here
    blocks, parts = ceil(pages * PAGE, 16), max(1, ceil(x.shape[1], SPLIT))
    return units * blocks * parts, blocks, parts


def small(x, w, site, table, ids, weights, order, starts, error, bias, y, deterministic):
    """Fills y of one site in one launch."""
    (m, k), each, count, n = x.shape, ids.shape[1], len(site.rank), y.shape[1]
    alone, pages = each == 1 and weights is None, table.shape[1]
    bm, bn, bk, br, warps, stages = small_tiles(x, FEW if deterministic else m, alone)
    ahead, blocks, parts = programs_of_a(x, site, pages, each, deterministic)
    w_tiles = ceil(n, bn)
    splits = 1 if deterministic else cost.splits(w_tiles, k)
    ranks = power(pages * PAGE, least=16, most=1 << 20)
    h = x.new_empty(parts, m * each, ranks, dtype=torch.float32)
    scratch, ticket = x.new_empty(w_tiles * splits * bm * bn, dtype=torch.float32), tickets(x.device, 1 + w_tiles)
    args = {
        "x": x, "w": w, "h": h, "a": site.a, "b": site.b, "table": table, "rank_of": site.rank, "scale_of": site.scale,
        "flags": site.flags, "gain": site.gain, "more": site.bias, "generation": site.generation, "starts": starts, "ids": ids,
        "weights": weights, "order": order, "error": error, "bias": bias, "y": y, "scratch": scratch, "ticket": ticket, "m": m,
        "n": n, "k": k, "count": count, "pages": pages, "parts": parts, "x0": x.stride(0), "x1": x.stride(1),
        "w0": w.stride(0), "w1": w.stride(1), "y0": y.stride(0), "y1": y.stride(1), "a0": site.a.stride(0),
        "b0": site.b.stride(0), "bias0": 0 if bias is None else bias.stride(0), "ahead": ahead, "BLOCKS": blocks,
        "SPLITS": splits, "SPLIT": SPLIT, "EACH": each, "ALONE": alone, "SLOTS": power(count, least=16, most=1 << 20),
        "RANKS": ranks, "PRECISION": precision(x), "BM": bm, "BN": bn, "BK": bk, "BR": br,
        "BM_OF_A": 64 if deterministic else 16, "BK_OF_A": 32 if x.dtype is torch.float32 else 64,
    }  # fmt: skip
    launch(
        multi_small_kernel, (ahead + w_tiles * splits,), args, [y, scratch, h], changes=[error, ticket], warps=warps,
        stages=stages,
    )  # fmt: skip


def small_tiles(x, m, alone):
    """As `tiles`, for `small`: with these ptxas does not spill there (tests/gates)."""
    rows, bn, bk, br, warps, stages = tiles(x, m, alone, False)
    arch, kind = architecture(x), x.dtype
    if kind is torch.float32 and (rows == 64 or not alone):
        warps = warps if arch < 100 else 4 if alone else 8
    elif kind is torch.float16 and rows == 16 and alone and arch in (80, 120):
        br, warps = 32 if arch == 120 else 16, 4
    elif rows == 16 and alone:
        warps = 8 if kind is torch.bfloat16 and arch == 120 else 2
    elif rows == 32 and kind is not torch.float32 and 90 <= arch < 120:
        br, warps = 16, 8
    return rows, bn, bk, br, warps, stages


def adapt(x, w, h, site, table, ids, weights, order, error, bias, y, deterministic):
    (m, k), each, n = x.shape, ids.shape[1], y.shape[1]
    alone, made = each == 1 and weights is None, w is None
    bm, bn, bk, br, warps, stages = tiles(x, max(m, 64) if deterministic else m, alone, made)
    count = ceil(m, bm) * ceil(n, bn)
    splits = 1 if made or deterministic or m > 64 else cost.splits(count, k)
    scratch = x.new_empty(count * splits * bm * (bn + br), dtype=torch.float32) if splits > 1 else None
    ticket = tickets(x.device, count) if splits > 1 else None
    waits = not made and architecture(x) >= 90  # what stands in y already is read before the wait
    size = x.element_size()
    tile_order = cost.order(bm * k * size, bn * k * size, bm * bn * size, ceil(n, bn), chip(architecture(x)).l2)
    args = {
        "x": None if made else x, "w": w, "h": h, "b": site.b, "table": table, "rank_of": site.rank, "flags": site.flags,
        "gain": site.gain, "more": site.bias, "generation": site.generation, "ids": ids, "weights": weights, "order": order,
        "error": error, "bias": bias, "y": y, "scratch": scratch, "ticket": ticket, "m": m, "n": n, "k": k,
        "count": len(site.rank), "pages": table.shape[1], "parts": len(h), "x0": x.stride(0), "x1": x.stride(1),
        "w0": 0 if made else w.stride(0), "w1": 0 if made else w.stride(1), "y0": y.stride(0), "y1": y.stride(1),
        "b0": site.b.stride(0), "bias0": 0 if bias is None else bias.stride(0), "EACH": each, "ALONE": alone, "MADE": made,
        "SPLITS": splits, "WAITS": waits, "RANKS": h.shape[2], "PRECISION": precision(x), "BM": bm, "BN": bn, "BK": bk,
        "BR": br, **dict(zip(("GROUP", "SLAB"), tile_order, strict=True)),
    }  # fmt: skip
    fills = [t for t in (None if made else y, scratch) if t is not None]
    changes = [error, *([y] if made else []), *([] if ticket is None else [ticket])]
    launch(multi_lora_kernel, (count, splits), args, fills, changes=changes, warps=warps, stages=stages, early=waits)


def shrink(x, sites, tables, order, starts, each, fixed):
    """h [parts, entries, ranks] of each site, float32. `fixed`: nothing depends on how many rows there are."""
    (m, k), count, pages = x.shape, len(sites[0].rank), tables[0].shape[1]
    entries, ranks, wide = m * each, power(pages * PAGE, least=16, most=1 << 20), x.dtype is torch.float32
    bm, br, bk = 64 if fixed or entries > FEW else 16, 16, 32 if wide else 64
    split = SPLIT if fixed or entries <= FEW else max(bk, ceil(k, bk) * bk)
    hs = tuple(x.new_empty(max(1, ceil(k, split)), entries, ranks, dtype=torch.float32) for _ in sites)
    units = ceil(entries, bm) + min(count, entries)  # at most: the plan is not looked at here
    args = {
        "x": x, "as_": tuple(s.a for s in sites), "tables": tables, "rank_of": tuple(s.rank for s in sites),
        "scale_of": tuple(s.scale for s in sites), "starts": starts, "order": order, "hs": hs, "entries": entries, "k": k,
        "count": count, "pages": pages, "x0": x.stride(0), "x1": x.stride(1), "a0s": tuple(s.a.stride(0) for s in sites),
        "SPLIT": split, "EACH": each, "SLOTS": power(count, least=16, most=1 << 20), "RANKS": ranks, "PRECISION": precision(x),
        "BM": bm, "BK": bk, "BR": br, "EARLY": architecture(x) >= 90,
    }  # fmt: skip
    launch(multi_shrink_kernel, (units, len(sites) * ceil(ranks, br), len(hs[0])), args, hs, stages=3)
    return hs


def tiles(x, m, alone, made):
    """The tile of y, the depth of a step, ranks of a step, warps and stages. Where ptxas spills a few registers to fit more
    blocks on a multiprocessor, another number of warps or ranks keeps it from that (tests/gates)."""
    arch, few = architecture(x), power(m, most=64)
    if x.dtype is torch.float32:
        if m <= 32:
            return few, 64, 16, 16, 8 if arch in (90, 120) else 4, 3
        return 64, 32 if arch // 10 == 10 else 64, 16, 16, 4 if 80 < arch < 120 else 8, 3
    if made and alone:
        return few, 64, 64, 32, (4 if m <= 16 else 8) if arch == 80 else 8 if m <= 16 else 2, 3
    if not alone:
        return 16, 64, 64, 16, 4, 2 if arch // 10 == 10 else 3
    if m <= 16:
        return 16, 64, 64, 16, 4 if arch >= 100 else 8, 3
    if m <= 64:
        return few, 64, 64, 32, 4, 3
    if x.dtype is torch.float16:  # h bᵀ is three products there
        return 64, 64, 64, 16, 4, 3
    return 128, 128, 64, 16, 8, 2 if torch.version.hip or arch // 10 == 10 else 3


def _wider(table, pages):
    """The table of a pool for smaller ranks, beside others."""
    out = table.new_zeros(len(table), pages)
    out[:, : table.shape[1]] = table
    return out
