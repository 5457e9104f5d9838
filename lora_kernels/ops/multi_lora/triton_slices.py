"""Triton: what the kernels of multi_lora are told of a batch and of the slices of W, as named
tuples, and which slice a tile is of."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Batch(NamedTuple):
    """What the slices of W share: the tokens, their plan (ops/multi_lora/plan.py) and h. None for
    what a kernel does not need, or there is not."""

    x: Any
    """[m, k]."""
    h: Any
    """[slice, part, entry, RANKS], float32."""
    order: Any
    """[entries]: the entries slot by slot, those without an adapter last."""
    starts: Any
    """[count + 1]: where in the order each slot begins."""
    k: Any
    count: Any
    """Of slots."""
    pages: Any
    """Of a row of a table."""
    x0: Any
    x1: Any
    w: Any = None
    """[Σ n, k]."""
    ids: Any = None
    """[m, EACH] int64."""
    weights: Any = None
    """[m, EACH]."""
    error: Any = None
    """Set where an id is nobody's."""
    bias: Any = None
    """[Σ n]."""
    y: Any = None
    """[m, Σ n]."""
    scratch: Any = None
    """Where the programs that share a tile leave their sums, and `ticket`, which counts them."""
    ticket: Any = None
    parts: Any = None
    """Of h."""
    w0: Any = None
    w1: Any = None
    y0: Any = None
    y1: Any = None
    bias0: Any = None


class ShrinkSlice(NamedTuple):
    """Of the adapters of one slice of W, what makes h; `Slots` of ops/multi_lora/plan.py."""

    a: Any
    table: Any
    rank: Any
    scale: Any
    a0: Any


class ExpandSlice(NamedTuple):
    """Of the adapters of one slice of W, what takes h to y."""

    b: Any
    table: Any
    rank: Any
    flags: Any
    gain: Any
    bias: Any
    generation: Any
    n: Any
    b0: Any


@triton.jit
def shrink_slice(slices, g, SLICES: tl.constexpr):
    """slices[g], its number as 32 bits."""
    found = ShrinkSlice(slices[0].a, slices[0].table, slices[0].rank, slices[0].scale, tl.cast(slices[0].a0, tl.int32))
    for i in tl.static_range(1, SLICES):
        if g == i:
            other = slices[i]
            found = ShrinkSlice(other.a, other.table, other.rank, other.scale, tl.cast(other.a0, tl.int32))
    return found


@triton.jit
def numbers_of(one):
    """An `ExpandSlice` with its numbers as 32 bits."""
    n, b0 = tl.cast(one.n, tl.int32), tl.cast(one.b0, tl.int32)
    return ExpandSlice(one.b, one.table, one.rank, one.flags, one.gain, one.bias, one.generation, n, b0)


@triton.jit
def expand_slice(slices, g, SLICES: tl.constexpr):
    """slices[g], its numbers as 32 bits."""
    found = numbers_of(slices[0])
    for i in tl.static_range(1, SLICES):
        if g == i:
            found = numbers_of(slices[i])
    return found


@triton.jit
def slice_of_tile(tile, slices, SLICES: tl.constexpr, BN: tl.constexpr):
    """Of tiles of BN columns, slice by slice: the slice of a tile, which of its tiles that is, and
    the slice's first column."""
    g, start, first, before = 0, 0, 0, 0
    for i in tl.static_range(SLICES - 1):
        before += tl.cdiv(slices[i].n, BN)
        if tile >= before:
            g, start = i + 1, before
            first += slices[i].n
    return g, tile - start, first


@triton.jit
def tiles_before(slices, g, SLICES: tl.constexpr, BN: tl.constexpr):
    """How many tiles the slices before g have."""
    tiles = 0
    for i in tl.static_range(SLICES):
        if i < g:
            tiles += tl.cdiv(slices[i].n, BN)
    return tiles
