"""Triton: a QuantisedWeight inside a kernel, and some of its rows as a matrix.

Kernels count a weight's numbers in groups of GROUP, a power of two that divides its rows, its
blocks and, where codes lie in halves, the half: so all numbers of a group have one scale and one
zero, and lie in one row. A number is (value - zero) · scale in float32, then rounded to the
weight's dtype; that is what the reference makes, bit for bit.

KIND, a constant of every kernel, says how codes and scales lie: what a code is (2 bits), the order
of 4-bit codes (2), whether scales are powers of two (1), and to which dtype value - zero is rounded
(2; 0 is float32).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.launch import ceil_div, launch_triton, refuse_device
from lora_kernels.ops.quantised.weight import DTYPES, HALVES, NIBBLES
from lora_kernels.ops.refusals import READ
from lora_kernels.ops.tables.tiles import tile


class Parts(NamedTuple):
    """The tensors of a QuantisedWeight, None for what there is not."""

    codes: Any
    table: Any
    scales: Any
    outer_table: Any
    outer: Any
    offset: Any
    block: Any
    outer_block: Any
    zeros: Any = None
    half: Any = None
    """Of the groups, where codes lie in halves."""
    tile_rows: Any = None
    """Of W, where blocks are tiles."""
    tiles_across: Any = None
    """How many of these lie beside each other."""
    row_groups: Any = None
    """Of numbers in a row of W there."""
    expert_rows: Any = None
    """Of W, where tiles end with each expert."""
    expert_tiles: Any = None
    """How many lie below each other there."""


class Wanted(NamedTuple):
    """Which of the experts of a weight have tokens."""

    offsets: Any
    """[experts], the end of each one's tokens."""
    groups: Any
    """Of numbers of each."""


class Quantised(NamedTuple):
    """A QuantisedWeight by its fields, as an op has them."""

    codes: Tensor
    parts: list[Tensor]
    layout: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.layout[3]]

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout[1], self.layout[2]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, *self.parts))

    def arguments(self, most: int) -> dict[str, Any]:
        """Of a kernel, with groups of `most` numbers at most, which is a power of two."""
        kind, n, k, dtype, block, outer_block, *more = self.layout
        block_rows, order, powers, has_zeros, zero_rounded, expert_rows = more or (0,) * 6
        rest = list(self.parts)
        table = rest.pop(0) if kind == NIBBLES else None
        zeros = rest.pop() if has_zeros else None
        scales, outer_table, outer, offset = (*rest, None, None, None)[:4]
        group = math.gcd(block, k, most, n * k // 2 if order == HALVES else 0)
        half = n * k // 2 // group if order == HALVES else None
        tiles = (block_rows, ceil_div(k, block), k // group) if block_rows else (None,) * 3
        of_expert = (expert_rows, ceil_div(expert_rows, block_rows)) if expert_rows else (None, None)
        parts = Parts(
            self.codes, table, scales, outer_table, outer, offset, block, outer_block, zeros, half, *tiles, *of_expert
        )
        how = kind | order << 2 | powers << 4 | (dtype if zero_rounded else 0) << 5
        return {"weight": parts, "KIND": how, "GROUP": group, "SHIFT": _shift(block), "OUTER_SHIFT": _shift(outer_block)}

    def refusal(self) -> str | None:
        """Why the kernels do not read it."""
        if self.dtype not in READ:
            return f"w is {self.dtype}; the kernels read float32, bfloat16 and float16"
        for tensor in (self.codes, *self.parts):
            if not tensor.is_contiguous() or tensor.is_neg():
                return "a part of the quantised w has gaps or is a negated view; contiguous() and resolve_neg() mend that"
        return refuse_device(self.codes)


def _shift(block: int) -> int:
    """Of a power of two its logarithm, else -1."""
    return -1 if block & (block - 1) else block.bit_length() - 1


def dequantise_rows(w: Quantised, first: int = 0, rows: int | None = None, offsets: Tensor | None = None) -> Tensor:
    """Rows `first` to `first + rows` of W, [rows, in] in its dtype: a slab. Each byte of them is
    read once. `offsets` [experts], of a W of experts: the numbers of those without tokens are
    neither read nor written."""
    (n, k), rows = w.shape, w.shape[0] - first if rows is None else rows
    assert 0 <= first <= first + rows <= n
    out = w.codes.new_empty(rows, k, dtype=w.dtype)
    t = tile("dequantise", w.codes)
    args = w.arguments(t.depth)
    group = args["GROUP"]
    args |= {"out": out, "first": first * k // group, "count": rows * k // group, "GROUPS": t.columns // group}
    args["wanted"] = None if offsets is None else Wanted(offsets.contiguous(), n // max(len(offsets), 1) * k // group)
    launch_triton(
        dequantise_kernel, (ceil_div(rows * k, t.columns),), args, [out], warps=t.warps, stages=t.stages, registers=t.registers
    )
    return out


@triton.jit
def quotient(number, divisor, SHIFT: tl.constexpr):
    """number // divisor; SHIFT: the divisor's logarithm, or -1."""
    if SHIFT >= 0:
        return number >> SHIFT
    else:
        return number // divisor


@triton.jit
def groups_of_tile(rows, first, n, k, GROUP: tl.constexpr, BK: tl.constexpr):
    """The groups of numbers `first` to `first + BK` of these rows, one after another, and which of
    them there are."""
    each: tl.constexpr = BK // GROUP
    size: tl.constexpr = rows.shape[0] * each
    along = first // GROUP + tl.arange(0, each)
    groups = rows[:, None] * (k // GROUP) + along[None, :]
    inside = (rows < n)[:, None] & (along < k // GROUP)[None, :]
    return tl.reshape(groups, (size,)), tl.reshape(inside, (size,))


@triton.jit
def rounded(numbers, DTYPE: tl.constexpr):
    """Float32 numbers as they are in a dtype, which is a place among `DTYPES`."""
    if DTYPE == 1:
        return numbers.to(tl.bfloat16).to(tl.float32)
    elif DTYPE == 2:
        return numbers.to(tl.float16).to(tl.float32)
    else:
        return numbers


@triton.jit
def load_table(weight, KIND: tl.constexpr):
    """The 16 values of codes of 4 bits."""
    if KIND & 3 == 0:
        return tl.load(weight.table + tl.arange(0, 16))
    else:
        return tl.zeros((16,), tl.float32)


@triton.jit
def blocks_of_tiles(weight, rows, columns, SHIFT: tl.constexpr):
    """Of numbers in these rows and columns, of which there are fewer than 2³¹, the block where
    blocks are tiles."""
    rows = rows.to(tl.int32)
    if weight.expert_rows is None:
        down = rows // weight.tile_rows
    else:
        experts = rows // weight.expert_rows
        down = experts * weight.expert_tiles + (rows - experts * weight.expert_rows) // weight.tile_rows
    return down.to(tl.int64) * weight.tiles_across + quotient(columns.to(tl.int32), weight.block, SHIFT)


@triton.jit
def blocks_of_groups(weight, groups, GROUP: tl.constexpr, SHIFT: tl.constexpr):
    """The block of each group."""
    if weight.tile_rows is None:
        return quotient(groups * GROUP, weight.block, SHIFT)
    else:
        rows = groups // weight.row_groups
        return blocks_of_tiles(weight, rows, (groups - rows * weight.row_groups) * GROUP, SHIFT)


@triton.jit
def float_of_e8m0(codes):
    """2^(code - 127), by its bits; the last code is NaN."""
    bits = codes.to(tl.int32)
    # 2^-127 is subnormal in float32: half the significand's first bit, which makes NaN of infinity
    rest = tl.where((bits == 0) | (bits == 255), 1 << 22, 0)
    return ((bits << 23) | rest).to(tl.float32, bitcast=True)


@triton.jit
def load_scales(weight, blocks, inside, KIND: tl.constexpr, OUTER_SHIFT: tl.constexpr):
    """The scale of each block, float32, of the shape of `blocks`, and its zero if there are any, as
    a tuple. Where not `inside` the scale is 0, or 2^-127, whose square is."""
    scales = tl.load(weight.scales + blocks, mask=inside, other=0)
    if weight.outer is not None:
        outer = tl.load(weight.outer + quotient(blocks, weight.outer_block, OUTER_SHIFT), mask=inside, other=0.0)
        fine = tl.load(weight.outer_table + scales.to(tl.int32), mask=inside, other=0.0)
        # the compiler would fuse a plain product with the sum, which has two roundings
        scales = tl.fma(fine, outer, tl.zeros(fine.shape, tl.float32)) + tl.load(weight.offset)
        scales = tl.where(inside, scales, 0.0)
    elif (KIND >> 4) & 1:
        scales = float_of_e8m0(scales)
    if weight.zeros is None:
        return (scales,)
    else:
        return scales, tl.load(weight.zeros + blocks, mask=inside, other=0.0)


@triton.jit
def float_of_e4m3(codes):
    """float8_e4m3fn, by its bits, since sm_80 has no instruction for it."""
    bits = codes.to(tl.int8, bitcast=True).to(tl.int32)
    # sign and significand where float32 has them; exponents count from 7 there, from 127 in float32
    found = ((bits << 20) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
    # of the last size, which is NaN, 480 would come
    return tl.where(tl.abs(found) == 480.0, float("nan"), found)


@triton.jit
def float_of_e5m2(codes):
    """float8_e5m2, which is the first byte of a float16."""
    return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_nibbles(weight, groups, inside, ORDER: tl.constexpr, GROUP: tl.constexpr):
    """The 4-bit codes of these groups, [groups · GROUP]."""
    size: tl.constexpr = groups.shape[0] * GROUP
    if ORDER == 2:
        second = groups >= weight.half
        at = tl.where(second, groups - weight.half, groups)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        pairs = tl.load(weight.codes + at, mask=inside[:, None], other=0).to(tl.int32)  # [groups, GROUP]
        return tl.reshape(tl.where(second[:, None], pairs & 15, pairs >> 4), (size,))
    elif GROUP > 1:
        at = groups[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        pairs = tl.load(weight.codes + at, mask=inside[:, None], other=0).to(tl.int32)  # [groups, GROUP / 2]
        if ORDER == 0:
            return tl.reshape(tl.join(pairs >> 4, pairs & 15), (size,))
        else:
            return tl.reshape(tl.join(pairs & 15, pairs >> 4), (size,))
    else:
        pairs = tl.load(weight.codes + (groups >> 1), mask=inside, other=0).to(tl.int32)
        return tl.where(groups % 2 == ORDER, pairs >> 4, pairs & 15)


@triton.jit
def load_values(weight, table, groups, inside, KIND: tl.constexpr, GROUP: tl.constexpr):
    """What the codes of these groups stand for, float32 [groups, GROUP]; `groups` has one
    dimension."""
    if KIND & 3 == 0:
        places = load_nibbles(weight, groups, inside, (KIND >> 2) & 3, GROUP)
        return tl.reshape(tl.gather(table, places, 0), (groups.shape[0], GROUP))
    else:
        at = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        codes = tl.load(weight.codes + at, mask=inside[:, None], other=0)  # [groups, GROUP]
        if KIND & 3 == 1:
            return codes.to(tl.float32)
        elif KIND & 3 == 2:
            return float_of_e4m3(codes)
        else:
            return float_of_e5m2(codes)


@triton.jit
def load_numbers(weight, table, scales, groups, inside, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The numbers of these groups before their rounding, float32 [groups, GROUP]; `scales` as
    `load_scales` gives them."""
    values = load_values(weight, table, groups, inside, KIND, GROUP)
    if weight.zeros is not None:
        values = rounded(values - scales[1][:, None], KIND >> 5)
    return values * scales[0][:, None]


@triton.jit
def load_scales_of_tile(
    weight, rows, first, n, k, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, OUTER_SHIFT: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """`load_scales` of the groups of `groups_of_tile`."""
    groups, inside = groups_of_tile(rows, first, n, k, GROUP, BK)
    if weight.tile_rows is None:
        blocks = blocks_of_groups(weight, groups, GROUP, SHIFT)
    else:
        columns = first + tl.arange(0, BK // GROUP) * GROUP
        blocks = tl.reshape(blocks_of_tiles(weight, rows[:, None], columns[None, :], SHIFT), groups.shape)
    return load_scales(weight, blocks, inside, KIND, OUTER_SHIFT)


@triton.jit
def load_numbers_of_tile(
    weight, table, scales, rows, first, n, k, KIND: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """`load_numbers` of the same, [groups, GROUP], which are W [rows, BK]."""
    groups, inside = groups_of_tile(rows, first, n, k, GROUP, BK)
    return load_numbers(weight, table, scales, groups, inside, KIND, GROUP)


@triton.jit
def dequantise_kernel(
    weight, out, first, count, wanted, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, OUTER_SHIFT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """out: `count` groups of a weight from `first` on, one after another; of experts those of the
    `wanted`."""
    places = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside, groups = places < count, first + places
    if wanted is not None:
        expert = groups // wanted.groups
        start = tl.load(wanted.offsets + expert - 1, mask=inside & (expert > 0), other=0)
        # as of offsets that no kernel takes for others: one below 0 counts as 0
        inside &= tl.load(wanted.offsets + expert, mask=inside, other=0) > tl.maximum(start, 0)
    scales = load_scales(weight, blocks_of_groups(weight, groups, GROUP, SHIFT), inside, KIND, OUTER_SHIFT)
    numbers = load_numbers(weight, load_table(weight, KIND), scales, groups, inside, KIND, GROUP)
    at = places[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [GROUPS, GROUP]
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=inside[:, None])
