"""Triton: h of every entry of the plan, then y; two launches, see triton_kernels.py."""

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.chips import chip
from lora_kernels.ops.launch import architecture, ceil, launch, power, refuse_triton, tickets
from lora_kernels.ops.multi_lora.plan import PAGE, unflatten
from lora_kernels.ops.multi_lora.triton_kernels import multi_lora_kernel, multi_shrink_kernel
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.thin import precision

FEW = 64  # entries, up to which a block of shrink has 16 of one adapter
SPLIT = 1024  # columns of x that one of its programs sums, where there are few


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
    """Fills y; without w it holds x wᵀ and the bias already. One launch for h of all sites, and one for each site."""
    if not y.numel():
        return
    sites = unflatten(slots)
    deterministic = torch.are_deterministic_algorithms_enabled()
    pages = max(s.table.shape[1] for s in sites)
    tables = tuple(s.table if s.table.shape[1] == pages else _wider(s.table, pages) for s in sites)
    hs = shrink(x, sites, tables, order, starts, ids.shape[1], deterministic)
    first = 0
    for site, table, h in zip(sites, tables, hs, strict=True):
        last = first + site.b.shape[1]
        of_w, of_bias = (None if t is None else t[first:last] for t in (w, bias))
        adapt(x, of_w, h, site, table, ids, weights, order, error, of_bias, y[:, first:last], deterministic)
        first = last


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
