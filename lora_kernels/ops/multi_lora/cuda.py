"""CUDA C++ in 16 bits. Up to 64 tokens, each with one adapter or none: one launch, csrc/multi_lora/cuda.cu. Else, where Triton
does not run, the library's GEMM, and for each slice two launches of csrc/multi_lora/cuda_any.cu, which take every rank and
layout; then y is rounded twice, as it is where a base product is there already."""

import torch

from lora_kernels.ops.alone import refuse_beside_triton
from lora_kernels.ops.chips import chip
from lora_kernels.ops.cuda_shared import shared_of_gemm
from lora_kernels.ops.launch import KINDS, architecture, ceil, launch_cuda, multiprocessors, refuse_cuda, tickets, vector
from lora_kernels.ops.lora_linear.cuda_thin import matrix
from lora_kernels.ops.multi_lora.plan import PAGE, unflatten
from lora_kernels.ops.parts import shared_part
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated, refuse_rows
from lora_kernels.ops.registry import implements
from lora_kernels.ops.tables.tiles import compiled

SMALL, ANY = (f"multi_lora/{name}.cu" for name in ("cuda", "cuda_any"))
TOKENS, SLICES = 64, 3  # of one launch, as in the source
FEW = 64  # entries, up to which the depth of h is shared
NO_SLICE = (*[None] * 9, *[0] * 5)


def refusal(call):
    reason = refuse_small(call)
    return refuse_operands(call, w=call.w) or (reason and refuse_beside_triton(reason))


def add_refusal(call):
    return refuse_operands(call, y=call.y) or refuse_beside_triton("they add to a product that is there, too")


def refuse_operands(call, **more):
    x, bias, slots = call.x, call.bias, call.slots
    if x.dtype not in KINDS:
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
        adapt(call, y, False)
        return y
    t, pages = compiled("multi_lora_small.cu", m=m), max(s.table.shape[1] for s in sites)
    tokens = t.columns
    tiles_of_a, w_tiles = ceil(pages * PAGE, t.rows), sum(ceil(s.b.shape[1], t.rows) for s in sites)
    adapters, at_once = min(m, sites[0].rank.shape[0]), 2 * chip(architecture(x), multiprocessors(x)).multiprocessors
    of_a = len(sites) * adapters * ceil(k, t.part)  # if none has more than 64 ranks
    w_part = shared_part(x, k, t.depth, w_tiles, min(of_a, at_once), 8 * tokens)
    # the parts of A end before those of W, or one block would end all tiles. In the deterministic mode they are Triton's
    a_part = t.part if torch.are_deterministic_algorithms_enabled() else min(t.part, max(256, w_part // 128 * 64))
    a_parts = ceil(k, a_part)
    a_blocks = min(m * tiles_of_a * a_parts, max(1, at_once // len(sites)))
    w_blocks, ranks = w_tiles * ceil(k, w_part), t.rows * tiles_of_a
    h = x.new_empty(a_parts, len(sites), m, ranks, dtype=torch.float32)
    scratch, ticket = x.new_empty(w_blocks * t.rows * tokens, dtype=torch.float32), tickets(x.device, SLICES + w_tiles)
    fields, first = [], 0
    for s in sites:
        n, pages = s.b.shape[1], s.table.shape[1]
        fields += [s.a, s.b, s.table, s.rank, s.generation, s.scale, s.flags, s.gain, s.bias]
        fields += [n, first, pages, s.a.stride(0), s.b.stride(0)]
        first += n
    args = (
        x, w, y, call.ids, call.order, error, h, scratch, ticket, *vector(call.bias), m, k, len(sites[0].rank), len(sites),
        ranks, x.stride(0), w.stride(0), y.stride(0), a_blocks, a_part, w_part, *fields, *NO_SLICE * (SLICES - len(sites)),
    )  # fmt: skip
    grid, kernel = (len(sites) * a_blocks + w_blocks,), f"multi_lora_small_{KINDS[x.dtype]}_{tokens}"
    launch_cuda(SMALL, kernel, grid, t.threads, args, [y, h, scratch], shared_of_gemm(t), changes=[ticket, error])
    return y


@implements("multi_lora_add", "cuda", add_refusal)
def add(call):
    if call.y.numel():
        adapt(call, call.y, True)


def adapt(call, y, holds):
    """What the adapters and the bias make of y = x wᵀ, in place; `holds`: the bias is in it."""
    x, ids, order, bias = call.x, call.ids, call.order, call.bias
    (m, k), each, first, kind = x.shape, ids.shape[1], 0, KINDS[x.dtype]
    of_h, t = compiled("multi_lora_shrink.cu"), compiled("multi_lora_expand.cu")
    parts = max(1, ceil(k, of_h.part)) if m * each <= FEW else 1  # of many there are blocks enough
    part = of_h.part if parts > 1 else of_h.depth * max(1, ceil(k, of_h.depth))
    for s in unflatten(call.slots):
        (count, pages), n = s.table.shape, s.b.shape[1]
        ranks = of_h.ranks * max(1, ceil(pages * PAGE, of_h.ranks))
        h = x.new_empty(parts, m * each, ranks, dtype=torch.float32)
        args = (
            x, *matrix(s.a), s.table, s.rank, s.scale, ids, order, call.starts, h, m * each, each, k, count, pages, ranks,
            *x.stride(), part,
        )  # fmt: skip
        grid = (m * each, min(ranks // of_h.ranks, 4), parts)
        launch_cuda(ANY, f"multi_lora_shrink_{kind}", grid, of_h.threads, args, [h], 0)
        of_y, of_bias = y[:, first : first + n], None if bias is None else bias[first : first + n]
        args = (
            h, of_y, *matrix(s.b), s.table, s.rank, s.flags, s.generation, s.gain, s.bias, ids, order if each == 1 else None,
            call.weights, call.error, *vector(of_bias), m, n, each, count, pages, ranks, parts, *of_y.stride(), int(holds),
        )  # fmt: skip
        grid = (ceil(m, t.rows), ceil(n, t.columns))
        launch_cuda(ANY, f"multi_lora_expand_{kind}", grid, t.threads, args, [], 0, changes=[of_y, call.error])
        first += n
