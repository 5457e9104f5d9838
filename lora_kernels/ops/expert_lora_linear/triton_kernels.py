"""Triton: products of each segment of tokens with its expert's weights. Which expert a tile of
tokens belongs to is found in the kernel, from the offsets, so the host never reads them.

The adapter's product follows the loop over the depth, on the same float32 sums, so y is rounded
once. Of few tokens h is summed in that loop, too: each block of columns reads A again, which the
cache holds, and a launch less waits. Sums over an expert's tokens are one program's, in their
order: there are no atomics.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_kernels.ops.triton_skinny import dot_accumulate, load_tile


class Tokens(NamedTuple):
    """The tokens of all experts."""

    offsets: Any
    """[experts], the end of each."""
    experts: Any
    index: Any = None
    """[m], the row of each token, or None where row t is that of token t."""
    rows: Any = None
    """Of what `index` tells the rows."""


class ProductLayer(NamedTuple):
    """What `expert_product_kernel` multiplies; None for what there is not."""

    x: Any
    """[m, k], or [rows, k] with an index."""
    w: Any
    """[experts, n, k]."""
    a: Any
    """[experts, r, k], whose h is computed here and kept where h is a tensor; or None."""
    h: Any
    """[m, r], float32."""
    b: Any
    """[experts, n, r]."""
    scaled: Any
    """[experts, k], of x."""
    gain: Any
    """[experts, n]."""
    bias: Any
    y: Any
    """[m, n], float32 where that is h of the next product."""
    z: Any
    """[m, n], for y before gain and bias."""
    scale: Any
    """Of y, before the gain; with a of h."""
    n: Any
    k: Any
    r: Any
    x0: Any
    x1: Any
    w_step: Any
    w0: Any
    w1: Any
    a_step: Any
    a0: Any
    a1: Any
    b_step: Any
    b0: Any
    b1: Any


class OuterLayer(NamedTuple):
    """What `expert_outer_kernel` sums over the tokens of each expert."""

    u: Any
    """[m, n], or [rows, n] with an index."""
    v: Any
    """[m, n], whose product with u is summed, or None."""
    p: Any
    """[m, r], float32, or None."""
    gain: Any
    """[experts, n], of out, or None."""
    out: Any
    """[experts, r, n], any strides: pᵀ u."""
    of_u: Any
    """[experts, n], float32: the sums of u, or None."""
    of_uv: Any
    n: Any
    r: Any
    u0: Any
    u1: Any
    v0: Any
    v1: Any
    out_step: Any
    out0: Any
    out1: Any


@triton.jit
def segment_of_tile(tokens, m, tile, E: tl.constexpr, BM: tl.constexpr):
    """The expert of a tile, its first row and the end of the segment. The rows of no expert are a
    last segment, whose expert is the number of experts; beyond it all is empty. Offsets that fall
    or leave the tokens count as if they did not."""
    segments, m = tl.arange(0, E), tl.cast(m, tl.int64)
    ends = tl.load(tokens.offsets + segments, mask=segments < tokens.experts, other=0).to(tl.int64)
    before = (segments > 0) & (segments <= tokens.experts)
    starts = tl.load(tokens.offsets + segments - 1, mask=before, other=0).to(tl.int64)
    starts = tl.minimum(tl.maximum(starts, 0), m)
    ends = tl.where(segments == tokens.experts, m, tl.maximum(tl.minimum(ends, m), starts))
    counts = tl.where(segments <= tokens.experts, (ends - starts + BM - 1) // BM, 0).to(tl.int32)
    until = tl.cumsum(counts, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    here = segments == expert
    inside = tile - tl.sum(tl.where(here, until - counts, 0), 0)
    first = tl.sum(tl.where(here, starts, 0), 0) + inside.to(tl.int64) * BM
    return expert, first, tl.sum(tl.where(here, ends, 0), 0)


@triton.jit
def rows_of_tokens(tokens, places, end):
    """Where the tokens lie, and how many rows there are. A token from `end` on lies beyond, and so
    does one whose row there is not."""
    if tokens.index is None:
        return places, end
    else:
        limit = tl.cast(tokens.rows, tl.int64)
        rows = tl.load(tokens.index + places, mask=places < end, other=limit)
        return tl.where(rows < 0, limit, rows), limit


@triton.jit(do_not_specialize=["m", "tiles"])
def expert_product_kernel(
    tokens, layer, m, tiles, PRECISION: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """y = gain ⊙ scale · ((x ⊙ scaled) wᵀ + h bᵀ) + bias of each segment with its expert's weights;
    zeros for the tokens of none."""
    expert, first, end = segment_of_tile(tokens, m, tl.program_id(0) % tiles, E, BM)
    rows = first + tl.arange(0, BM)
    columns = (tl.program_id(0) // tiles).to(tl.int64) * BN + tl.arange(0, BN)
    n, k, r, e = layer.n, layer.k, layer.r, expert.to(tl.int64)
    ranks = tl.arange(0, BR).to(tl.int64)
    sums, h = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BR), tl.float32)
    gain, bias = tl.zeros((BN,), tl.float32) + 1.0, tl.zeros((BN,), tl.float32)
    if expert < tokens.experts:
        of_x, x_rows = rows_of_tokens(tokens, rows, end)
        for begin in range(0, k, BK):
            depth = begin + tl.arange(0, BK).to(tl.int64)
            xs = load_tile(layer.x, of_x, depth, layer.x0, layer.x1, x_rows, k)  # [BM, BK]
            if layer.scaled is not None:
                by = tl.load(layer.scaled + e * k + depth, mask=depth < k, other=0.0).to(tl.float32)
                xs = xs.to(tl.float32) * by[None, :]
            ws = load_tile(layer.w + e * layer.w_step, depth, columns, layer.w1, layer.w0, k, n)  # [BK, BN]
            sums = dot_accumulate(xs, ws, sums, PRECISION)
            if layer.a is not None:
                of_a = load_tile(layer.a + e * layer.a_step, depth, ranks, layer.a1, layer.a0, k, r)  # [BK, BR]
                h = dot_accumulate(xs, of_a, h, PRECISION)
        if layer.a is not None:
            h *= layer.scale
            bs = load_tile(layer.b + e * layer.b_step, ranks, columns, layer.b1, layer.b0, r, n)
            sums = dot_accumulate(h, bs, sums, PRECISION)
        elif layer.h is not None:
            for begin in tl.range(0, r, BR, num_stages=1):
                hs = load_tile(layer.h, rows, begin + ranks, r, 1, end, r)  # [BM, BR]
                bs = load_tile(layer.b + e * layer.b_step, begin + ranks, columns, layer.b1, layer.b0, r, n)
                sums = dot_accumulate(hs, bs, sums, PRECISION)
        if layer.gain is not None:
            gain = tl.load(layer.gain + e * n + columns, mask=columns < n, other=0.0).to(tl.float32)
        if layer.bias is not None:
            bias = tl.load(layer.bias + e * n + columns, mask=columns < n, other=0.0).to(tl.float32)
    if layer.a is None:
        sums *= layer.scale
    elif layer.h is not None:
        mask = ((rows < end) & (tl.program_id(0) < tiles))[:, None] & (ranks < r)[None, :]
        tl.store(layer.h + rows[:, None] * r + ranks[None, :], h, mask=mask)
    offsets, mask = rows[:, None] * n + columns[None, :], (rows < end)[:, None] & (columns < n)[None, :]
    if layer.z is not None:
        tl.store(layer.z + offsets, sums.to(layer.z.dtype.element_ty), mask=mask)
    tl.store(layer.y + offsets, (sums * gain[None, :] + bias[None, :]).to(layer.y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def expert_outer_kernel(
    tokens, layer, m, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """out = gain ⊙ (pᵀ u) over the tokens of each expert, and the sums of u and of u ⊙ v; zeros for
    an expert without tokens."""
    e, n, r, m = tl.program_id(2).to(tl.int64), layer.n, layer.r, tl.cast(m, tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    start = tl.load(tokens.offsets + e - 1, mask=e > 0, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), m)
    end = tl.maximum(tl.minimum(tl.load(tokens.offsets + e).to(tl.int64), m), start)
    sums, of_u, of_uv = tl.zeros((BN, BR), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for first in range(start, end, BM):
        rows = first + tl.arange(0, BM).to(tl.int64)
        of_u_rows, u_rows = rows_of_tokens(tokens, rows, end)
        us = load_tile(layer.u, of_u_rows, columns, layer.u0, layer.u1, u_rows, n)  # [BM, BN]
        if layer.p is not None:
            ps = load_tile(layer.p, rows, ranks, r, 1, end, r)  # [BM, BR]
            sums = dot_accumulate(tl.trans(us), ps, sums, PRECISION)
        if layer.of_u is not None:
            of_u += tl.sum(us.to(tl.float32), 0)
        if layer.of_uv is not None:
            vs = load_tile(layer.v, rows, columns, layer.v0, layer.v1, end, n)  # [BM, BN]
            of_uv += tl.sum(tl.where((rows < end)[:, None], us.to(tl.float32) * vs.to(tl.float32), 0.0), 0)
    if layer.p is not None:
        if layer.gain is not None:
            # that of an expert without tokens may be anything; what tells is loaded again, for the
            # loop has no register left to hold it
            some = (columns < n) & (tl.load(tokens.offsets + e - 1, mask=e > 0, other=0).to(tl.int64) < end)
            sums *= tl.load(layer.gain + e * n + columns, mask=some, other=0.0).to(tl.float32)[:, None]
        pointers = layer.out + e * layer.out_step + ranks[None, :] * layer.out0 + columns[:, None] * layer.out1
        tl.store(pointers, sums.to(layer.out.dtype.element_ty), mask=(columns < n)[:, None] & (ranks < r)[None, :])
    mask = (columns < n) & (tl.program_id(1) == 0)
    if layer.of_u is not None:
        tl.store(layer.of_u + e * n + columns, of_u, mask=mask)
    if layer.of_uv is not None:
        tl.store(layer.of_uv + e * n + columns, of_uv, mask=mask)
