"""CUDA C++ in 16 bits. Up to 64 tokens, each with one adapter or none: one launch,
csrc/multi_lora/cuda.cu. Else, where Triton does not run, the library's GEMM, and for each slice two
launches of csrc/multi_lora/cuda_any.cu, which take every rank and layout; then y is rounded twice,
as it is where a base product is there already."""

import torch

from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.cuda_alone import refuse_beside_triton
from lora_kernels.ops.cuda_shared_memory import shared_of_gemm
from lora_kernels.ops.cuda_split_k import split_k_part
from lora_kernels.ops.launch import (
    KERNEL_SUFFIX,
    architecture,
    ceil_div,
    launch_cuda,
    multiprocessors,
    refuse_cuda,
    tile_tickets,
    vector_fields,
)
from lora_kernels.ops.lora_linear.cuda_skinny import matrix_fields
from lora_kernels.ops.multi_lora.plan import PAGE, unflatten
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated, refuse_quantised, refuse_rows
from lora_kernels.ops.registry import implements
from lora_kernels.ops.tables.tiles import compiled

SMALL, ANY = (f"multi_lora/{name}.cu" for name in ("cuda", "cuda_any"))
TOKENS, SLICES = 64, 3  # of one launch, as in the source
SPLIT_K_ENTRIES = 64  # entries, up to which the depth of h is shared


def refusal(call):
    if call.layout:
        return refuse_quantised(call)
    reason = refuse_small(call)
    return refuse_operands(call, w=call.w) or (reason and refuse_beside_triton(reason))


def add_refusal(call):
    return refuse_operands(call, y=call.y) or refuse_beside_triton("they add to a product that is there, too")


def refuse_operands(call, **more):
    x, bias, slots = call.x, call.bias, call.slots
    if x.dtype not in KERNEL_SUFFIX:
        return f"x is {x.dtype}; the kernels read bfloat16 or float16"
    factors = {f"{name} of slots[{i}]": getattr(s, name) for i, s in enumerate(unflatten(slots)) for name in "ab"}
    return refuse_dtypes(bias=bias, **factors) or refuse_negated(x=x, bias=bias, **more, **factors) or refuse_cuda(x, ANY)


def refuse_small(call):
    """Why one launch cannot do it."""
    x, w, ids, sites, (m, k) = call.x, call.w, call.ids, unflatten(call.slots), call.x.shape
    if any(s.a.dtype is not x.dtype for s in sites):
        return f"x is {x.dtype} and a {sites[0].a.dtype}; one launch reads the same for both"
    if m > TOKENS or len(sites) > SLICES:
        return f"x has {m} rows and w {len(sites)} slices; one launch takes up to {TOKENS} and {SLICES}"
    if ids.shape[1] != 1 or call.weights is not None:
        return f"tokens have {ids.shape[1]} adapters, or weights; one launch takes one of weight 1 for each, or none"
    if k == 0 or k % 8 or any(s.b.shape[1] % 8 for s in sites):
        return f"w is {list(w.shape)}, in slices of {[s.b.shape[1] for s in sites]}; one launch needs multiples of 8"
    factors = {f"{name} of slots[{i}]": getattr(s, name) for i, s in enumerate(sites) for name in "ab"}
    return refuse_rows(x=x, w=w, **factors)


@implements("multi_lora_forward", "cuda", refusal)
def forward(call):
    x, w, error, sites, (m, k) = call.x, call.w, call.error, unflatten(call.slots), call.x.shape
    y = x.new_empty(m, len(w))
    if not y.numel():
        return y
    if refuse_small(call):
        torch.mm(x, w.detach().T, out=y)
        apply_adapters(call, y, False)
        return y
    t, pages = compiled("multi_lora_small.cu", m=m), max(s.table.shape[1] for s in sites)
    tokens = t.columns
    tiles_of_a, w_tiles = ceil_div(pages * PAGE, t.rows), sum(ceil_div(s.b.shape[1], t.rows) for s in sites)
    adapters, at_once = min(m, sites[0].rank.shape[0]), 2 * nearest_chip(architecture(x), multiprocessors(x)).multiprocessors
    of_a = len(sites) * adapters * ceil_div(k, t.part)  # if none has more than 64 ranks
    w_part = split_k_part(x, k, t.depth, w_tiles, min(of_a, at_once), 8 * tokens)
    # the parts of A end before those of W, or one block would end all tiles. In the deterministic
    # mode they are Triton's
    a_part = t.part if torch.are_deterministic_algorithms_enabled() else min(t.part, max(256, w_part // 128 * 64))
    a_parts = ceil_div(k, a_part)
    a_blocks = min(m * tiles_of_a * a_parts, max(1, at_once // len(sites)))
    w_blocks, ranks = w_tiles * ceil_div(k, w_part), t.rows * tiles_of_a
    h = x.new_empty(a_parts, len(sites), m, ranks, dtype=torch.float32)
    scratch, ticket = x.new_empty(w_blocks * t.rows * tokens, dtype=torch.float32), tile_tickets(x.device, SLICES + w_tiles)
    args = {
        "x": x, "w": w, "y": y, "ids": call.ids, "order": call.order, "error": error, "h": h, "scratch": scratch,
        "tickets": ticket, **vector_fields("bias", call.bias), "m": m, "k": k, "count": len(sites[0].rank),
        "slices": len(sites), "ranks": ranks, "x_row": x.stride(0), "w_row": w.stride(0), "y_row": y.stride(0),
        "a_blocks": a_blocks, "a_part": a_part, "w_part": w_part,
    }  # fmt: skip
    first = 0
    for i in range(SLICES):
        args |= {f"slice[{i}].{name}": value for name, value in _slice(sites[i] if i < len(sites) else None, first).items()}
        first += sites[i].b.shape[1] if i < len(sites) else 0
    grid, kernel = (len(sites) * a_blocks + w_blocks,), f"multi_lora_small_{KERNEL_SUFFIX[x.dtype]}_{tokens}"
    launch_cuda(SMALL, kernel, grid, t.threads, args, [y, h, scratch], shared_of_gemm(t), changes=[ticket, error])
    return y


def _slice(site, first):
    """The fields of a `MultiLoRASlice`; without a site of none."""
    s, n = site, 0 if site is None else site.b.shape[1]
    names = {"a": "a", "b": "b", "table": "table", "rank": "rank", "generation": "generation", "scale": "scale"}
    names |= {"flags": "flags", "gain": "gain", "more": "bias"}
    pages, a_row, b_row = (0, 0, 0) if s is None else (s.table.shape[1], s.a.stride(0), s.b.stride(0))
    return {
        **{field: None if s is None else getattr(s, name) for field, name in names.items()}, "n": n,
        "first": 0 if s is None else first, "pages": pages, "a_row": a_row, "b_row": b_row,
    }  # fmt: skip


@implements("multi_lora_add", "cuda", add_refusal)
def add_in_place(call):
    if call.y.numel():
        apply_adapters(call, call.y, True)


def apply_adapters(call, y, holds):
    """What the adapters and the bias make of y = x wᵀ, in place; `holds`: the bias is in it."""
    x, ids, order, bias = call.x, call.ids, call.order, call.bias
    (m, k), each, first, suffix = x.shape, ids.shape[1], 0, KERNEL_SUFFIX[x.dtype]
    of_h, t = compiled("multi_lora_shrink.cu"), compiled("multi_lora_expand.cu")
    # of many there are blocks enough
    parts = max(1, ceil_div(k, of_h.part)) if m * each <= SPLIT_K_ENTRIES else 1
    part = of_h.part if parts > 1 else of_h.depth * max(1, ceil_div(k, of_h.depth))
    for s in unflatten(call.slots):
        (count, pages), n = s.table.shape, s.b.shape[1]
        ranks = of_h.ranks * max(1, ceil_div(pages * PAGE, of_h.ranks))
        h = x.new_empty(parts, m * each, ranks, dtype=torch.float32)
        args = {
            "x": x, **matrix_fields("a", s.a), "table": s.table, "rank": s.rank, "scale": s.scale, "ids": ids, "order": order,
            "starts": call.starts, "h": h, "entries": m * each, "each": each, "k": k, "count": count, "pages": pages,
            "ranks": ranks, "x_row": x.stride(0), "x_column": x.stride(1), "part": part,
        }  # fmt: skip
        grid = (m * each, min(ranks // of_h.ranks, 4), parts)
        launch_cuda(ANY, f"multi_lora_shrink_{suffix}", grid, of_h.threads, args, [h], 0)
        of_y, of_bias = y[:, first : first + n], None if bias is None else bias[first : first + n]
        args = {
            "h": h, "y": of_y, **matrix_fields("b", s.b), "table": s.table, "rank": s.rank, "flags": s.flags,
            "generation": s.generation, "gain": s.gain, "more": s.bias, "ids": ids, "order": order if each == 1 else None,
            "weights": call.weights, "error": call.error, **vector_fields("bias", of_bias), "m": m, "n": n, "each": each,
            "count": count, "pages": pages, "ranks": ranks, "parts": parts, "y_row": of_y.stride(0),
            "y_column": of_y.stride(1), "holds": int(holds),
        }  # fmt: skip
        grid = (ceil_div(m, t.rows), ceil_div(n, t.columns))
        launch_cuda(ANY, f"multi_lora_expand_{suffix}", grid, t.threads, args, [], 0, changes=[of_y, call.error])
        first += n
