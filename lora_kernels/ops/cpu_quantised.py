"""A quantised weight as the C++ kernels read it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import _cpu
from lora_kernels.ops.cpu_tensors import stack_args
from lora_kernels.ops.quantised.weight import DTYPES
from lora_kernels.ops.refusals import READ


class Packed(NamedTuple):
    """Rows `first` to `first + rows` of a QuantisedWeight, given by its fields. C++ reads this
    tuple (csrc/bindings/weight.h); Python what a tensor of those rows would say of itself."""

    codes: Tensor
    parts: list[Tensor]
    layout: list[int]
    first: int
    rows: int

    @staticmethod
    def of(codes: Tensor, parts: list[Tensor], layout: list[int]) -> "Packed":
        """All rows."""
        return Packed(codes, parts, layout, 0, layout[1])

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.layout[3]]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.layout[2]))

    def numel(self) -> int:
        return self.rows * self.layout[2]

    def stride(self, dim: int) -> int:
        return (self.layout[2], 1)[dim]

    def some(self, rows: slice) -> "Packed":
        """Some of these rows."""
        return self._replace(first=self.first + rows.start, rows=rows.stop - rows.start)


def weight_of(call: Any) -> Tensor | Packed:
    """W of an op's arguments as the kernels read it, quantised or not."""
    return Packed.of(call.w, call.parts, call.layout) if call.layout else call.w


def expert_args(w: Tensor | Packed, experts: int) -> tuple[Any, ...] | None:
    """What C++ is told of the weights of all experts."""
    return (w, experts) if isinstance(w, Packed) else stack_args(w)


def held(w: Tensor | Packed) -> Tensor | Packed:
    """The same memory under other tensors, for what reads W piece by piece: `.data =` of another
    thread does not reach them."""
    if isinstance(w, Packed):
        return w._replace(codes=w.codes.detach(), parts=[t.detach() for t in w.parts])
    return w.detach()


def some_rows(w: Tensor | Packed, rows: slice) -> Tensor | Packed:
    """Rows of W, not copied."""
    return w.some(rows) if isinstance(w, Packed) else w[rows]


def widened(w: Tensor | Packed) -> Tensor:
    """W, or some of its rows, in float32."""
    if not isinstance(w, Packed):
        return w.float()
    out = w.codes.new_empty(w.shape, dtype=torch.float32)
    widen_into(out, w)
    return out


def in_own_dtype(w: Packed) -> Tensor:
    """The numbers of these rows."""
    out = w.codes.new_empty(w.shape, dtype=w.dtype)
    _cpu.dequantise(w, out, torch.get_num_threads())
    return out


def widen_into(out: Tensor, w: Tensor | Packed) -> None:
    """Copies W, or some of its rows, into a float32 tensor."""
    if isinstance(w, Packed):
        _cpu.dequantise(w, out, torch.get_num_threads())
    else:
        out.copy_(w)


def refuse_codes(codes: Tensor, parts: list[Tensor], layout: list[int]) -> str | None:
    """Why the kernels do not read such a weight."""
    if DTYPES[layout[3]] not in READ:
        return f"w is {DTYPES[layout[3]]}; the kernels read float32, bfloat16 and float16"
    for tensor in (codes, *parts):
        if not tensor.is_contiguous() or tensor.is_neg():
            return "a part of the quantised w has gaps or is a negated view; contiguous() and resolve_neg() mend that"
    return None
