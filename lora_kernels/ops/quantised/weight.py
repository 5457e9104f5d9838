"""A frozen weight that is kept as codes and scales, as 4-bit and 8-bit bases are."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

NIBBLES, INT8, E4M3, E5M2 = range(4)
"""What a code is: half a byte, a place among 16 values; int8; float8_e4m3fn; float8_e5m2."""

HIGH_FIRST, LOW_FIRST, HALVES = range(3)
"""Where the 4-bit codes of two neighbours lie: in the high and the low half of one byte; in its low
and its high half; or, as HQQ has it, number i of the first half of all in the high half of byte i,
and number i of the second half in its low half."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The table of MXFP4 (Open Compute Project, Microscaling formats 1.0, §5.3.3)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CODES = {torch.int8: INT8, torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2, torch.uint8: NIBBLES}
POWERS = torch.float8_e8m0fnu
_KINDS = ("4-bit codes", "int8", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """W [out, in], or of experts [experts, out, in], as codes and scales, for ops in the place of
    `w`:

        W[n, k] = (value(code[n, k]) - zero(n, k)) · scale(n, k)                             (1)

    in float32, and then rounded to `dtype`. Numbers count row by row, and each `block` of them,
    across the ends of rows, has one scale and, with `zeros`, one zero; the last block may be
    shorter. With `block_rows` blocks are of that many rows and of `block` columns instead, counted
    row by row, and those at W's edges may be smaller. The rows of experts are counted on from one
    to the next, so blocks may cross from one to another, but those of `block_rows` end at each
    one's edges. A scale may be a power of two
    (float8_e8m0fnu, as in MXFP4), or an 8-bit code ("double quantised"):

        scale[i] = outer_table[scales[i]] · outer[i // outer_block] + offset                 (2)

    This is how bitsandbytes keeps nf4 and fp4 (QLoRA, arXiv:2305.14314, §3). With a block of a
    whole row it is a scale for each row, with one of all numbers a scale for the matrix.

    | codes                | scales of                   | who writes it                          |
    |----------------------|-----------------------------|----------------------------------------|
    | 4 bits, any table    | a block, double quantised   | bitsandbytes nf4 and fp4               |
    | 4 bits, `E2M1`       | 32 of a row, powers of two  | MXFP4: gpt-oss, transformers           |
    | 4 bits, 0 … 15       | a group of a row, zeros     | HQQ, compressed-tensors                |
    | int8                 | row, group or matrix, zeros | bitsandbytes, torchao                  |
    | float8, e4m3 or e5m2 | row, 128×128 block, matrix  | torchao, transformers, DeepSeek        |

    `codes`: uint8 with two numbers in a byte, in one of the orders `HIGH_FIRST`, `LOW_FIRST` and
    `HALVES`, and then `table`, 16 float32; or int8, float8_e4m3fn, float8_e5m2. Whatever their
    shape, they lie without gaps. `scales`: float32 or float8_e8m0fnu [blocks], or uint8 where
    `outer`, `outer_table` (256 float32) and `offset` (one float32) are given. `zeros`: float32
    [blocks]; with `zero_rounded` the difference in (1) is rounded to `dtype` before it is
    multiplied, as HQQ does, whose zeros are fractions. Nothing gets a gradient.

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
    block_rows: int = 0
    order: int = HIGH_FIRST
    zeros: Tensor | None = None
    zero_rounded: bool = False

    requires_grad = False  # frozen
    layout = torch.strided
    # `fields`, where no part is a view: that would not follow `.data =` of its base
    _kept: ClassVar[tuple[Tensor, list[Tensor], list[int]] | None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if len(self.shape) not in (2, 3) or min(self.shape) < 0:
            raise ValueError(f"QuantisedWeight: shape must be [out, in] or [experts, out, in], found {list(self.shape)}")
        if self.codes.dtype not in _CODES:
            raise TypeError(
                f"QuantisedWeight: codes must be uint8, int8, float8_e4m3fn or float8_e5m2, found {self.codes.dtype}"
            )
        if self.dtype not in DTYPES:
            raise TypeError(f"QuantisedWeight: dtype must be a floating one of at least 16 bits, found {self.dtype}")
        if self.block < 1 or self.outer_block < 1:
            raise ValueError(f"QuantisedWeight: blocks must have numbers, found {self.block} and {self.outer_block}")
        nibbles, numbers, blocks = self.kind == NIBBLES, self.numel(), self.blocks
        if self.block_rows < 0:
            raise ValueError(f"QuantisedWeight: block_rows must be at least 0, found {self.block_rows}")
        if self.order not in ((HIGH_FIRST, LOW_FIRST, HALVES) if nibbles else (HIGH_FIRST,)):
            raise ValueError(f"QuantisedWeight: order {self.order} is none of codes of {self.codes.dtype}")
        if self.order == HALVES and numbers % 2:
            raise ValueError(f"QuantisedWeight: halves want an even count of numbers, found {list(self.shape)}")
        wanted = {"codes": (self.codes, self.codes.dtype, -(-numbers // 2) if nibbles else numbers)}
        nested = self.outer is not None
        powers = not nested and isinstance(self.scales, Tensor) and self.scales.dtype is POWERS
        wanted["scales"] = (self.scales, torch.uint8 if nested else POWERS if powers else torch.float32, blocks)
        if nibbles:
            wanted["table"] = (self.table, torch.float32, 16)
        if nested:
            wanted["outer"] = (self.outer, torch.float32, -(-blocks // self.outer_block))
            wanted["outer_table"] = (self.outer_table, torch.float32, 256)
            wanted["offset"] = (self.offset, torch.float32, 1)
        if self.zeros is not None:
            wanted["zeros"] = (self.zeros, torch.float32, blocks)
        for name, (tensor, dtype, size) in wanted.items():
            if not isinstance(tensor, Tensor) or tensor.dtype is not dtype:
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"QuantisedWeight: {name} must be {dtype}, found {found}")
            if tensor.numel() != size or not tensor.is_contiguous():
                where = "" if tensor.is_contiguous() else " with gaps"
                raise ValueError(f"QuantisedWeight: {name} must be {size} numbers without gaps, found {tensor.numel()}{where}")
            if tensor.device != self.codes.device:
                raise ValueError(f"QuantisedWeight: {name} must be on {self.codes.device} (codes), found {tensor.device}")
            if tensor.requires_grad:
                object.__setattr__(self, name, tensor.detach())
        for name in ("table", "outer_table", "offset"):
            if name not in wanted and getattr(self, name) is not None:
                where = "codes of 4 bits" if name == "table" else "outer"
                raise ValueError(f"QuantisedWeight: {name} must be None without {where}")
        if self.kind < E4M3 and not powers:
            object.__setattr__(self, "_kept", self._fields())

    @property
    def kind(self) -> int:
        """NIBBLES, INT8, E4M3 or E5M2."""
        return _CODES[self.codes.dtype]

    @property
    def blocks(self) -> int:
        """How many there are."""
        if self.block_rows:
            return self.experts * -(-self.shape[-2] // self.block_rows) * -(-self.shape[-1] // self.block)
        return -(-self.numel() // self.block)

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
        return len(self.shape)

    @property
    def experts(self) -> int:
        """How many matrices there are."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def numel(self) -> int:
        return self.experts * self.shape[-2] * self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        codes, parts, _ = self.fields()
        return sum(t.numel() * t.element_size() for t in (codes, *parts))

    def to(self, dtype: torch.dtype) -> "QuantisedWeight":
        """The same codes as a weight of another dtype; nothing is copied."""
        return self if dtype is self.dtype else replace(self, dtype=dtype)

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """Formula (1) as a tensor of W's shape, in another dtype than its own if that is given."""
        from lora_kernels.ops.quantised.op import dequantise

        return dequantise(self if dtype is None else self.to(dtype))

    def fields(self) -> tuple[Tensor, list[Tensor], list[int]]:
        """(codes, other tensors, numbers), as the ops pass them on. The numbers are (kind, out, in,
        dtype, block, outer_block), and more only where one of these is not 0: (block_rows, order,
        whether scales are powers, whether there are zeros, zero_rounded, the rows of an expert
        where the tiles at its edge are smaller). `out` counts the rows of all experts."""
        return self._fields() if self._kept is None else self._kept

    def _fields(self) -> tuple[Tensor, list[Tensor], list[int]]:
        scales, powers = self.scales, self.scales.dtype is POWERS
        tensors = (self.table, _bytes(scales) if powers else scales, self.outer_table, self.outer, self.offset, self.zeros)
        n_out, n_in = self.shape[-2], self.shape[-1]
        layout = [self.kind, self.experts * n_out, n_in, DTYPES.index(self.dtype), self.block, self.outer_block]
        # pieces of one row that fill it are blocks across rows
        block_rows = 0 if self.block_rows == 1 and n_in % self.block == 0 else self.block_rows
        expert_rows = n_out if len(self.shape) == 3 and block_rows and n_out % block_rows else 0
        more = [block_rows, self.order, int(powers), int(self.zeros is not None), int(self.zero_rounded), expert_rows]
        codes = _bytes(self.codes) if self.kind >= E4M3 else self.codes
        return codes, [t for t in tensors if t is not None], layout + more if any(more) else layout

    def packed(self) -> tuple[Tensor, list[Tensor], list[int], int, int]:
        """`fields`, the first row and how many: all of W, as the CPU's kernels of a layer read it.

        Raises:
            ValueError: W is of experts.
        """
        if len(self.shape) != 2:
            raise ValueError(f"QuantisedWeight: the w of a layer must be [out, in], found {list(self.shape)}")
        codes, parts, layout = self.fields()
        return codes, parts, layout, 0, layout[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    @staticmethod
    def of_fields(codes: Tensor, parts: list[Tensor], layout: list[int], experts: int | None = None) -> "QuantisedWeight":
        """What `fields` gave, again: [out, in], or with `experts` theirs."""
        kind, n_out, n_in, dtype, block, outer_block, *more = layout
        block_rows, order, powers, has_zeros, zero_rounded, expert_rows = more or (0,) * 6
        experts = experts or (n_out // expert_rows if expert_rows else None)
        shape: tuple[int, ...] = (n_out, n_in) if experts is None else (experts, n_out // experts, n_in)
        rest = list(parts)
        if kind >= E4M3:
            codes = codes.view(torch.float8_e4m3fn if kind == E4M3 else torch.float8_e5m2)
        named: dict[str, Any] = {"table": rest.pop(0)} if kind == NIBBLES else {}
        named |= {"zeros": rest.pop()} if has_zeros else {}
        if powers:
            rest[0] = rest[0].view(POWERS)
        named |= dict(zip(("scales", "outer_table", "outer", "offset"), rest, strict=False))
        return QuantisedWeight(
            codes, torch.Size(shape), block=block, dtype=DTYPES[dtype], outer_block=outer_block,
            block_rows=block_rows, order=order, zero_rounded=bool(zero_rounded), **named,
        )  # fmt: skip

    def __repr__(self) -> str:
        nested = ", scales of 8 bits" if self.outer is not None or self.scales.dtype is POWERS else ""
        zeros = ", zeros" if self.zeros is not None else ""
        blocks = f"{self.block_rows}×{self.block}" if self.block_rows else f"{self.block}"
        return f"QuantisedWeight({list(self.shape)}, {_KINDS[self.kind]}, blocks of {blocks}{nested}{zeros}, {self.dtype})"


def beyond_blocks(layout: list[int]) -> str | None:
    """What a weight, given by the numbers of its `fields`, has beyond codes of 4 bits in the order
    HIGH_FIRST, int8 or float8_e4m3fn with a scale for a block across rows, in words: for kernels
    that read no more than these."""
    words = "tiles of scales", "4-bit codes in another order", "powers of two as scales", "zeros"
    found = ["codes of float8_e5m2"] if layout[0] == E5M2 else []
    found += [word for word, given in zip(words, layout[6:10], strict=False) if given]
    return " and ".join(found) or None


def _bytes(tensor: Tensor) -> Tensor:
    """Few of torch's functions take 8-bit floats."""
    return tensor.view(torch.uint8)
