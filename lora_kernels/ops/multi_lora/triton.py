"""Triton: h of every entry of the plan, then y, of few tokens in one launch. See
triton_kernels.py and triton_small.py. Of a quantised W the numbers are made first, in the dtype of
x, and freed after the call."""

from dataclasses import replace
from functools import cache

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.launch import architecture, ceil_div, launch_triton, power_of_two, refuse_device, tile_tickets
from lora_kernels.ops.multi_lora.plan import PAGE, unflatten
from lora_kernels.ops.multi_lora.triton_kernels import multi_lora_kernel, multi_shrink_kernel
from lora_kernels.ops.multi_lora.triton_slices import Batch, ExpandSlice, ShrinkSlice
from lora_kernels.ops.multi_lora.triton_small import multi_small_kernel
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import sound_schedule
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows
from lora_kernels.ops.triton_skinny import precision, strides

# tokens that one launch takes, at most; entries, up to which a block of shrink has few, of one
# adapter
SMALL_TOKENS = 64
# at most to make h of a slice, where one launch makes it and y: of a pool for large ranks most have
# no work
PROGRAMS = 2048


def refusal(call):
    if call.layout:
        return _refuse_operands(call) or Quantised(call.w, call.parts, call.layout).refusal()
    return _refuse_operands(call, w=call.w)


def _refuse_operands(call, **more):
    tensors, sites = {"x": call.x, "bias": call.bias, **more}, unflatten(call.slots)
    for i, s in enumerate(sites):
        tensors |= {f"a of slots[{i}]": s.a, f"b of slots[{i}]": s.b}
        if s.a.stride(1) != 1 or s.b.stride(1) != 1:
            return f"a and b of slots[{i}] must have rows without gaps"
        if s.a.dtype is not sites[0].a.dtype:
            return f"a of slots[{i}] is {s.a.dtype} and of slots[0] {sites[0].a.dtype}; one launch reads both"
    return refuse_dtypes(**tensors) or refuse_negated(**tensors) or refuse_device(call.x)


def add_refusal(call):
    return _refuse_operands(call, y=call.y)


@implements("multi_lora_forward", "triton", refusal)
def forward(call):
    w = dequantise_rows(Quantised(call.w, call.parts, call.layout)) if call.layout else call.w
    y = call.x.new_empty(len(call.x), len(w))
    launch_all(call, w, y)
    return y


@implements("multi_lora_add", "triton", add_refusal)
def add_in_place(call):
    launch_all(call, None, call.y)


def launch_all(call, w, y):
    """Fills y; without w it holds x wᵀ and the bias already. One launch, or one for h and one for
    y. (On AMD one for each slice of y: with the arguments of several the compiler spills scalar
    registers.)"""
    if not y.numel():
        return
    x, ids, weights, order, starts, error, bias = (
        call.x, call.ids, call.weights, call.order, call.starts, call.error, call.bias,
    )  # fmt: skip
    sites = unflatten(call.slots)
    deterministic = torch.are_deterministic_algorithms_enabled()
    pages = max(s.table.shape[1] for s in sites)
    sites = [s if s.table.shape[1] == pages else replace(s, table=_padded_table(s.table, pages)) for s in sites]
    if w is not None and fits_one_launch(x, sites, ids.shape[1], weights, deterministic):
        launch_small(x, w, sites, ids, weights, order, starts, error, bias, y, deterministic)
    else:
        shrunk = cache(lambda: shrink(x, sites, order, starts, ids.shape[1], deterministic))
        first = 0
        for i, some in enumerate([[s] for s in sites] if torch.version.hip else [sites]):
            last = first + sum(slice_widths(some))
            of_w, of_bias = (None if t is None else t[first:last] for t in (w, bias))
            of_h, of_y = slice(i, i + len(some)), y[:, first:last]
            launch_expand(
                x, of_w, lambda of_h=of_h: shrunk()[of_h], some, ids, weights, order, error, of_bias, of_y, deterministic
            )
            first = last


def fits_one_launch(x, sites, each, weights, fixed):
    """Whether one launch makes h and y. Not on AMD, for the registers."""
    if torch.version.hip:
        return False
    most = SMALL_TOKENS if has_one_adapter(each, weights) else 16
    return len(x) <= most and programs_of_a(x, sites[0], each, tile_of_h(x, few_entries(fixed)))[0] <= PROGRAMS


def has_one_adapter(each, weights):
    """Whether a token has one adapter, whole."""
    return each == 1 and weights is None


def few_entries(fixed):
    """By how many the tile of h is chosen where there are few; the bits of `fixed` are those of
    many."""
    return SMALL_TOKENS + 1 if fixed else 1


def tile_of_h(x, entries):
    return tile("multi_shrink", x, dtype=x.dtype, entries=entries)


def programs_of_a(x, site, each, t):
    """How many programs make h of a slice in `launch_small`; of each block of entries its blocks of
    ranks and parts of the depth."""
    entries = len(x) * each
    # at most: the plan is not looked at here
    units = ceil_div(entries, t.rows) + min(len(site.rank), entries)
    blocks, parts = ceil_div(site.table.shape[1] * PAGE, t.ranks), max(1, ceil_div(x.shape[1], t.part))
    return max(1, units * blocks * parts), max(1, blocks), parts


def launch_small(x, w, sites, ids, weights, order, starts, error, bias, y, deterministic):
    """Fills y in one launch."""
    (m, k), each, count = x.shape, ids.shape[1], len(sites[0].rank)
    rows, alone = SMALL_TOKENS if deterministic else m, has_one_adapter(each, weights)
    t = tile("multi_small", x, dtype=x.dtype, m=rows, alone=alone, several=len(sites) > 1)
    bm, bn, of_h = power_of_two(rows, most=t.rows), t.columns, tile_of_h(x, few_entries(deterministic))
    ahead, blocks, parts = programs_of_a(x, sites[0], each, of_h)
    w_tiles = sum(ceil_div(n, bn) for n in slice_widths(sites))
    splits = 1 if deterministic else cost.split_k_count(w_tiles, k)
    h = x.new_empty(len(sites), parts, m * each, ranks_of_h(sites), dtype=torch.float32)
    rows = max(bm, of_h.rows)
    warps, stages = sound_schedule(x, [sites[0].a], precision(x), rows, t.warps, t.stages, narrow=not deterministic)
    scratch = x.new_empty(w_tiles * splits * bm * bn, dtype=torch.float32)
    ticket = tile_tickets(x.device, len(sites) + w_tiles)
    batch = batch_of(x, w, h, sites, ids, weights, order, starts, error, bias, y, scratch, ticket)
    args = common_args(x, batch, sites, weights, (bm, bn, t.depth, t.ranks)) | {
        "slices_of_a": tuple(map(shrink_slice, sites)), "ahead": ahead, "BLOCKS": blocks, "SPLITS": splits, "SPLIT": of_h.part,
        "SLOTS": power_of_two(count, least=16, most=1 << 20), "BM_OF_A": of_h.rows, "BK_OF_A": of_h.depth,
        "TILES": power_of_two(max(ceil_div(n, bn) for n in slice_widths(sites)), most=1 << 20),
    }  # fmt: skip
    launch_triton(
        multi_small_kernel, (len(sites) * ahead + w_tiles * splits,), args, [y, scratch, h], changes=[error, ticket],
        warps=warps, stages=stages, registers=t.registers,
    )  # fmt: skip


def launch_expand(x, w, of_h, sites, ids, weights, order, error, bias, y, deterministic):
    """Fills y; of_h gives h, which is there or on its way."""
    (m, k), made = x.shape, w is None
    rows, alone = max(m, 64) if deterministic else m, has_one_adapter(ids.shape[1], weights)
    t = tile("multi_lora", x, dtype=x.dtype, m=rows, alone=alone, made=made, several=len(sites) > 1)
    bm, bn, br = power_of_two(rows, most=t.rows), t.columns, t.ranks
    across = sum(ceil_div(n, bn) for n in slice_widths(sites))
    count = ceil_div(m, bm) * across
    splits = 1 if made or deterministic or m > 64 else cost.split_k_count(count, k)
    scratch = x.new_empty(count * splits * bm * (bn + br), dtype=torch.float32) if splits > 1 else None
    ticket = tile_tickets(x.device, count) if splits > 1 else None
    # after the tickets, which in a CUDA graph are a launch of their own: y starts while h is made
    h = of_h()
    # what stands in y already is read before the wait
    waits = not made and h.numel() > 0 and architecture(x) >= 90
    warps, stages = sound_schedule(
        x, [w], precision(x), bm, t.warps, t.stages, narrow=bm == SMALL_TOKENS and m <= SMALL_TOKENS and not deterministic
    )
    size = x.element_size()
    tile_order = cost.tile_order(
        bm * max(k, 1) * size, bn * max(k, 1) * size, bm * bn * size, across, nearest_chip(architecture(x)).l2
    )
    batch = batch_of(x, w, h, sites, ids, weights, order, None, error, bias, y, scratch, ticket)
    args = common_args(x, batch, sites, weights, (bm, bn, t.depth, br)) | {
        "ON_Y": made, "SPLITS": splits, "WAITS": waits, **dict(zip(("GROUP", "SLAB"), tile_order, strict=True)),
    }  # fmt: skip
    fills = [t for t in (None if made else y, scratch) if t is not None]
    changes = [error, *([y] if made else []), *([] if ticket is None else [ticket])]
    launch_triton(
        multi_lora_kernel, (count, splits), args, fills, changes=changes, warps=warps, stages=stages, registers=t.registers,
        early=waits,
    )  # fmt: skip


def batch_of(x, w, h, sites, ids, weights, order, starts, error, bias, y, scratch, ticket):
    """What the kernels that fill y are told beside the slices."""
    (x0, x1), (w0, w1) = (None, None) if w is None else x.stride(), strides(w)
    return Batch(
        x=None if w is None else x, w=w, h=h, ids=ids, weights=weights, order=order, starts=starts, error=error, bias=bias, y=y,
        scratch=scratch, ticket=ticket, k=x.shape[1], count=len(sites[0].rank), pages=sites[0].table.shape[1],
        parts=h.shape[1], x0=x0, x1=x1, w0=w0, w1=w1, y0=y.stride(0), y1=y.stride(1),
        bias0=None if bias is None else bias.stride(0),
    )  # fmt: skip


def common_args(x, batch, sites, weights, shape):
    """Arguments of both kernels that fill y."""
    each = batch.ids.shape[1]
    return {
        "batch": batch, "slices": tuple(map(expand_slice, sites)), "m": len(x), "SLICES": len(sites), "EACH": each,
        "ONE_ADAPTER": has_one_adapter(each, weights), "RANKS": batch.h.shape[3], "PRECISION": precision(x),
        **dict(zip(("BM", "BN", "BK", "BR"), shape, strict=True)),
    }  # fmt: skip


def shrink_slice(site):
    return ShrinkSlice(a=site.a, table=site.table, rank=site.rank, scale=site.scale, a0=site.a.stride(0))


def expand_slice(site):
    return ExpandSlice(
        b=site.b, table=site.table, rank=site.rank, flags=site.flags, gain=site.gain, bias=site.bias,
        generation=site.generation, n=site.b.shape[1], b0=site.b.stride(0),
    )  # fmt: skip


def shrink(x, sites, order, starts, each, fixed):
    """h [slices, parts, entries, ranks], float32. `fixed`: nothing depends on how many rows there
    are."""
    (m, k), count, ranks = x.shape, len(sites[0].rank), ranks_of_h(sites)
    entries = m * each
    t = tile_of_h(x, max(entries, few_entries(fixed)))
    bm, bk, br = t.rows, t.depth, t.ranks
    split = t.part if fixed or entries <= SMALL_TOKENS else max(bk, ceil_div(k, bk) * bk)
    h = x.new_empty(len(sites), max(1, ceil_div(k, split)), entries, ranks, dtype=torch.float32)
    units = ceil_div(entries, bm) + min(count, entries)  # at most: the plan is not looked at here
    batch = Batch(
        x=x, h=h, order=order, starts=starts, k=k, count=count, pages=sites[0].table.shape[1], x0=x.stride(0), x1=x.stride(1)
    )
    args = {
        "batch": batch, "slices": tuple(map(shrink_slice, sites)), "entries": entries, "SLICES": len(sites), "SPLIT": split,
        "EACH": each, "SLOTS": power_of_two(count, least=16, most=1 << 20), "RANKS": ranks, "PRECISION": precision(x),
        "BM": bm, "BK": bk, "BR": br, "EARLY": architecture(x) >= 90,
    }  # fmt: skip
    warps, stages = sound_schedule(x, [sites[0].a], precision(x), bm, t.warps, t.stages, narrow=True)
    grid = (units, len(sites) * ceil_div(ranks, br), h.shape[1])
    launch_triton(multi_shrink_kernel, grid, args, [h], warps=warps, stages=stages, registers=t.registers)
    return h


def slice_widths(sites):
    return tuple(site.b.shape[1] for site in sites)


def ranks_of_h(sites):
    return power_of_two(sites[0].table.shape[1] * PAGE, least=16, most=1 << 20)


def _padded_table(table, pages):
    """The table of a pool for smaller ranks, beside others."""
    out = table.new_zeros(len(table), pages)
    out[:, : table.shape[1]] = table
    return out
