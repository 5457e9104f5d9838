"""Triton: a QuantisedWeight inside a kernel, and some of its rows as a matrix.

Kernels count a weight's numbers in groups of GROUP, a power of two that divides its rows and its
blocks: so all numbers of a group have one scale, and lie in one row. A number is value · scale in
float32, then rounded to the weight's dtype; that is what the reference makes, bit for bit.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.launch import ceil_div, launch_triton, refuse_device
from lora_kernels.ops.quantised.weight import DTYPES, NIBBLES, beyond_blocks
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
        kind, _, k, _, block, outer_block = self.layout[:6]
        rest = list(self.parts)
        table = rest.pop(0) if kind == NIBBLES else None
        scales, outer_table, outer, offset = (*rest, None, None, None)[:4]
        parts = Parts(self.codes, table, scales, outer_table, outer, offset, block, outer_block)
        shifts = {"SHIFT": _shift(block), "OUTER_SHIFT": _shift(outer_block)}
        return {"weight": parts, "KIND": kind, "GROUP": math.gcd(block, k, most), **shifts}

    def refusal(self) -> str | None:
        """Why the kernels do not read it."""
        if self.dtype not in READ:
            return f"w is {self.dtype}; the kernels read float32, bfloat16 and float16"
        if more := beyond_blocks(self.layout):
            return f"w has {more}, which the kernels do not read"
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
    if KIND == 0:
        return tl.load(weight.table + tl.arange(0, 16))
    else:
        return tl.zeros((16,), tl.float32)


@triton.jit
def load_scales(weight, groups, inside, GROUP: tl.constexpr, SHIFT: tl.constexpr, OUTER_SHIFT: tl.constexpr):
    """The scale of each group, float32, of the shape of `groups`; 0 where not `inside`."""
    blocks = quotient(groups * GROUP, weight.block, SHIFT)
    scales = tl.load(weight.scales + blocks, mask=inside, other=0)
    if weight.outer is not None:
        outer = tl.load(weight.outer + quotient(blocks, weight.outer_block, OUTER_SHIFT), mask=inside, other=0.0)
        fine = tl.load(weight.outer_table + scales.to(tl.int32), mask=inside, other=0.0)
        # the compiler would fuse a plain product with the sum, which has two roundings
        scales = tl.fma(fine, outer, tl.zeros(fine.shape, tl.float32)) + tl.load(weight.offset)
        scales = tl.where(inside, scales, 0.0)
    return scales


@triton.jit
def float_of_e4m3(codes):
    """float8_e4m3fn, by its bits, since sm_80 has no instruction for it."""
    bits = codes.to(tl.int32)
    size = bits & 127
    # exponents count from 7 there, from 127 in float32; below 8 there is none
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    found = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    found = tl.where(size == 127, float("nan"), found)
    return tl.where(bits > 127, -found, found)


@triton.jit
def load_values(weight, table, groups, inside, KIND: tl.constexpr, GROUP: tl.constexpr):
    """What the codes of these groups stand for, float32 [groups, GROUP]; `groups` has one
    dimension."""
    size: tl.constexpr = groups.shape[0]
    if KIND == 0 and GROUP > 1:
        at = groups[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        pairs = tl.load(weight.codes + at, mask=inside[:, None], other=0).to(tl.int32)  # [groups, GROUP / 2]
        places = tl.reshape(tl.join(pairs >> 4, pairs & 15), (size * GROUP,))
        return tl.reshape(tl.gather(table, places, 0), (size, GROUP))
    elif KIND == 0:
        pairs = tl.load(weight.codes + (groups >> 1), mask=inside, other=0).to(tl.int32)
        places = tl.where(groups % 2 == 0, pairs >> 4, pairs & 15)
        return tl.reshape(tl.gather(table, places, 0), (size, GROUP))
    else:
        at = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        codes = tl.load(weight.codes + at, mask=inside[:, None], other=0)  # [groups, GROUP]
        return codes.to(tl.float32) if KIND == 1 else float_of_e4m3(codes)


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
    scales = load_scales(weight, groups, inside, GROUP, SHIFT, OUTER_SHIFT)
    numbers = load_values(weight, load_table(weight, KIND), groups, inside, KIND, GROUP) * scales[:, None]
    at = places[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [GROUPS, GROUP]
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=inside[:, None])
