"""A frozen weight that is kept as codes and scales, as 4-bit and 8-bit bases are."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NIBBLES, INT8, E4M3 = range(3)
"""What a code is: half a byte, the high half first, a place among 16 values; int8;
float8_e4m3fn."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CODES = {torch.int8: INT8, torch.float8_e4m3fn: E4M3, torch.uint8: NIBBLES}


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """W [out, in] as codes and scales, for ops in the place of `w`:

        W[n, k] = value(code[n, k]) · scale(n, k), in float32 and then rounded to `dtype`    (1)

    Numbers count row by row, and each `block` of them, across the ends of rows, has one scale; the
    last block may be shorter. A scale may be a code of 8 bits itself ("double quantised"):

        scale[i] = outer_table[scales[i]] · outer[i // outer_block] + offset                 (2)

    This is how bitsandbytes keeps nf4 and fp4 (QLoRA, arXiv:2305.14314, §3). With a block of a
    whole row it is a scale for each row, with one of all numbers a scale for the matrix.

    `codes`: uint8 with two numbers in a byte, the first in its high half, and then `table`, 16
    float32; or int8; or float8_e4m3fn. Whatever their shape, they lie without gaps. `scales`:
    float32 [blocks], or uint8 where `outer`, `outer_table` (256 float32) and `offset` (one float32)
    are given. Nothing gets a gradient.

    Raises:
        TypeError, ValueError: a part has a dtype or a size that does not fit; the message names it.
    """

    codes: Tensor
    shape: torch.Size
    scales: Tensor
    block: int
    dtype: torch.dtype
    table: Tensor | None = None
    outer: Tensor | None = None
    outer_table: Tensor | None = None
    offset: Tensor | None = None
    outer_block: int = 256

    requires_grad = False  # frozen
    layout = torch.strided

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if len(self.shape) != 2:
            raise ValueError(f"QuantisedWeight: shape must be [out, in], found {list(self.shape)}")
        if self.codes.dtype not in _CODES:
            raise TypeError(f"QuantisedWeight: codes must be uint8, int8 or float8_e4m3fn, found {self.codes.dtype}")
        if self.dtype not in DTYPES:
            raise TypeError(f"QuantisedWeight: dtype must be a floating one of at least 16 bits, found {self.dtype}")
        if self.block < 1 or self.outer_block < 1:
            raise ValueError(f"QuantisedWeight: blocks must have numbers, found {self.block} and {self.outer_block}")
        nibbles, numbers = self.kind == NIBBLES, self.numel()
        blocks = -(-numbers // self.block)
        wanted = {"codes": (self.codes, self.codes.dtype, -(-numbers // 2) if nibbles else numbers)}
        nested = self.outer is not None
        wanted["scales"] = (self.scales, torch.uint8 if nested else torch.float32, blocks)
        if nibbles:
            wanted["table"] = (self.table, torch.float32, 16)
        if nested:
            wanted["outer"] = (self.outer, torch.float32, -(-blocks // self.outer_block))
            wanted["outer_table"] = (self.outer_table, torch.float32, 256)
            wanted["offset"] = (self.offset, torch.float32, 1)
        for name, (tensor, dtype, size) in wanted.items():
            if not isinstance(tensor, Tensor) or tensor.dtype is not dtype:
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"QuantisedWeight: {name} must be {dtype}, found {found}")
            if tensor.numel() != size or not tensor.is_contiguous():
                where = "" if tensor.is_contiguous() else " with gaps"
                raise ValueError(f"QuantisedWeight: {name} must be {size} numbers without gaps, found {tensor.numel()}{where}")
            if tensor.device != self.codes.device:
                raise ValueError(f"QuantisedWeight: {name} must be on {self.codes.device} (codes), found {tensor.device}")

    @property
    def kind(self) -> int:
        """NIBBLES, INT8 or E4M3."""
        return _CODES[self.codes.dtype]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def is_meta(self) -> bool:
        return self.codes.is_meta

    @property
    def is_cuda(self) -> bool:
        return self.codes.is_cuda

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        codes, parts, _ = self.fields()
        return sum(t.numel() * t.element_size() for t in (codes, *parts))

    def to(self, dtype: torch.dtype) -> "QuantisedWeight":
        """The same codes as a weight of another dtype; nothing is copied."""
        return self if dtype is self.dtype else replace(self, dtype=dtype)

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """Formula (1) as a tensor [out, in], in another dtype than its own if that is given."""
        from lora_kernels.ops.quantised.op import dequantise

        return dequantise(self if dtype is None else self.to(dtype))

    def fields(self) -> tuple[Tensor, list[Tensor], list[int]]:
        """(codes, other tensors, numbers), as the ops pass them on."""
        tensors = (self.table, self.scales, self.outer_table, self.outer, self.offset)
        layout = [self.kind, *self.shape, DTYPES.index(self.dtype), self.block, self.outer_block]
        # as bytes: few of torch's functions take float8
        codes = self.codes.view(torch.uint8) if self.kind == E4M3 else self.codes
        return codes, [t for t in tensors if t is not None], layout

    @staticmethod
    def of_fields(codes: Tensor, parts: list[Tensor], layout: list[int]) -> "QuantisedWeight":
        """What `fields` gave, again."""
        kind, n_out, n_in, dtype, block, outer_block = layout
        rest, codes = list(parts), codes.view(torch.float8_e4m3fn) if kind == E4M3 else codes
        named: dict[str, Any] = {"table": rest.pop(0)} if kind == NIBBLES else {}
        named |= dict(zip(("scales", "outer_table", "outer", "offset"), rest, strict=False))
        return QuantisedWeight(
            codes, torch.Size((n_out, n_in)), block=block, dtype=DTYPES[dtype], outer_block=outer_block, **named
        )

    def __repr__(self) -> str:
        kind = ("4-bit codes", "int8", "float8_e4m3fn")[self.kind]
        nested = ", scales of 8 bits" if self.outer is not None else ""
        return f"QuantisedWeight({list(self.shape)}, {kind}, blocks of {self.block}{nested}, {self.dtype})"
