"""What multi_lora is told beside x and w: where the adapters of a module lie, and which of them
each token wants."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_kernels.ops.lora_linear.op import FLOATS

PAGE = 8
"""Rank rows of a page."""
BASE = -1
"""The id of no adapter."""
GAIN, BIAS, ROW = 1, 2, 2  # bits of Slots.flags, and the first of those that are a row
_SLOT = (1 << 32) - 1


@dataclass(frozen=True)
class Slots:
    """The adapters of one module, each in a slot. Its rank rows lie in pages of 8, which may be
    anywhere in a and b:

        A[j] = a[8 · table[slot, j // 8] + j mod 8],  the column B[:, j] likewise in b,  for j <
                                                      rank[slot]

    Pages are read as far as there are ranks, so memory and time follow the sum of the ranks. All
    tensors are on one device; a and b share a dtype.
    """

    a: Tensor
    """[rows, in]."""
    b: Tensor
    """[rows, out]: B's columns as rows."""
    table: Tensor
    """[slots, pages] int32."""
    rank: Tensor
    """[slots] int32; 0: this module has no part in the adapter."""
    scale: Tensor
    """[slots] float32: s."""
    flags: Tensor
    """[slots] int32: 1, it has a gain; 2, it has a bias; 4 times the row of gain and of bias that
    is its own."""
    gain: Tensor
    """[rows, out] float32: DoRA's m / ‖W + s·BA‖; read only where flags say so."""
    bias: Tensor
    """[rows, out] float32: s times the bias of B; read only where flags say so."""
    generation: Tensor
    """[slots] int32: how often the slot has changed hands. An id with another number is stale."""

    def __post_init__(self) -> None:
        """Raises ValueError unless the tensors fit one another; the message names the first that
        does not."""
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.dtype not in FLOATS or self.a.shape[0] % PAGE:
            found = f"{list(self.a.shape)} {self.a.dtype}, b {list(self.b.shape)}"
            raise ValueError(f"Slots: a and b must be floating matrices of whole pages of {PAGE} rows, found a {found}")
        count, n_out, i32, f32 = len(self.rank), self.b.shape[1], torch.int32, torch.float32
        pages = self.table.shape[-1]
        wanted = {
            "b": ((self.a.shape[0], n_out), self.a.dtype), "table": ((count, pages), i32), "rank": ((count,), i32),
            "scale": ((count,), f32), "flags": ((count,), i32), "gain": ((*self.gain.shape[:1], n_out), f32),
            "bias": ((*self.bias.shape[:1], n_out), f32), "generation": ((count,), i32),
        }  # fmt: skip
        for name, (shape, dtype) in wanted.items():
            t = getattr(self, name)
            whole = name == "b" or t.is_contiguous()
            if t.shape != shape or t.dtype is not dtype or t.device != self.a.device or not whole:
                asked = f"{list(shape)} {dtype} on {self.a.device} without gaps"
                raise ValueError(f"Slots: {name} must be {asked}, found {list(t.shape)} {t.dtype} on {t.device}")

    @cached_property
    def tensors(self) -> list[Tensor]:
        return tensors_of(self)


TENSORS = len(fields(Slots))


@dataclass(frozen=True)
class BatchPlan:
    """Which adapters each token of a step wants; made on the device of the ids, without a copy to
    the host. All shapes follow from the number of tokens, so a CUDA graph takes the plan of any
    step of its size.
    """

    ids: Tensor
    """[tokens, k] int64: generation · 2³² + slot of each adapter, or BASE."""
    weights: Tensor | None
    """[tokens, k] float32: what each counts, or None for 1."""
    order: Tensor
    """[tokens · k] int64: the entries of ids by slot, those of BASE last; equals keep their
    order."""
    starts: Tensor
    """[slots + 1] int64: where each slot's begin in `order`."""
    error: Tensor
    """[1] int32: not 0 once a kernel has met an id that is out of range or stale."""

    @staticmethod
    def build(ids: Tensor, slots: int, weights: Tensor | None = None) -> "BatchPlan":
        """The plan of ids [tokens] or [tokens, k], int64, as an `AdapterPool` gives them, for pools
        of `slots` slots.

        Raises:
            TypeError: ids are not int64, or weights not floating.
            ValueError: a shape or device does not fit.
        """
        if not isinstance(ids, Tensor) or ids.dtype is not torch.int64:
            raise TypeError(f"BatchPlan: ids must be an int64 tensor, found {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.dim() not in (1, 2) or slots < 1:
            raise ValueError(f"BatchPlan: ids must be [tokens] or [tokens, k] and slots > 0, found {list(ids.shape)}, {slots}")
        if weights is not None:
            if not isinstance(weights, Tensor) or not weights.is_floating_point():
                raise TypeError("BatchPlan: weights must be a floating tensor")
            if weights.shape != ids.shape or weights.device != ids.device:
                found = f"{list(weights.shape)} on {weights.device}"
                raise ValueError(f"BatchPlan: weights must be {list(ids.shape)} on {ids.device}, found {found}")
            weights = (weights if weights.dim() == 2 else weights[:, None]).detach().float().contiguous()
        ids = (ids if ids.dim() == 2 else ids[:, None]).contiguous()
        error = torch.zeros(1, dtype=torch.int32, device=ids.device)
        if type(ids) is Tensor and ids.device.type == "cpu" and not torch.compiler.is_compiling():
            return BatchPlan(ids, weights, *_sorted_by_numpy(ids, slots), error)
        slot = ids.flatten() & _SLOT
        known = (ids.flatten() >= 0) & (slot < slots)
        slot, order = torch.where(known, slot, slots).sort(stable=True)
        starts = torch.searchsorted(slot, torch.arange(slots + 1, device=ids.device))
        return BatchPlan(ids, weights, order, starts, error)

    def raise_errors(self) -> None:
        """Raises if a kernel met an id that no pool has given or that was evicted since; its token
        got the base alone. Waits for the device.

        Raises:
            LookupError: it did.
        """
        if int(self.error):
            raise LookupError("BatchPlan: an id of an adapter is out of range or stale; its tokens were computed without it")

    @cached_property
    def tensors(self) -> list[Tensor | None]:
        return tensors_of(self)


def _sorted_by_numpy(ids: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """`order` and `starts`: of few numbers numpy makes them in a third of torch's time."""
    flat = ids.numpy().reshape(-1)
    slot = flat & _SLOT
    slot[(flat < 0) | (slot >= slots)] = slots
    order = slot.argsort(kind="stable")
    starts = slot[order].searchsorted(np.arange(slots + 1))
    return torch.from_numpy(order), torch.from_numpy(starts)


_NAMES = {kind: tuple(field.name for field in fields(kind)) for kind in (Slots, BatchPlan)}


def tensors_of(one: Slots | BatchPlan) -> list[Any]:
    """The tensors in the order of the fields."""
    return [getattr(one, name) for name in _NAMES[type(one)]]


def id_of(generation: Any, slot: Any) -> Any:
    """The id of the adapter in a slot, of numbers or of int64 tensors."""
    return (generation << 32) + slot


def ids_of_experts(ids: Tensor, expert: Tensor, experts: int) -> Tensor:
    """Of adapters with a slot for each expert, slot · experts + expert, the ids for these experts;
    BASE for what is no expert's."""
    slot = ids & _SLOT
    # beside the slots it would be that of another generation
    there = (ids >= 0) & (slot <= _SLOT // (experts + 1))
    found = torch.where(there, ids + slot * (experts - 1) + expert, torch.where(ids < 0, ids, BASE - 1))
    return torch.where(expert < experts, found, BASE)


def slots_of(ids: Tensor, generation: Tensor) -> tuple[Tensor, Tensor]:
    """The slot of each id, and whether it is one that is there and not stale; where it is not, the
    slot is 0."""
    slot = ids & _SLOT
    inside = (ids >= 0) & (slot < len(generation))
    slot = torch.where(inside, slot, 0)
    return slot, inside & (generation[slot] == ids >> 32)


def unflatten(slots: list[Tensor]) -> list[Slots]:
    """The slots that an op got as a flat list."""
    return [Slots(*slots[i : i + TENSORS]) for i in range(0, len(slots), TENSORS)]


def members_of(
    s: Slots, ids: Tensor, weights: Tensor | None, error: Tensor
) -> Iterator[tuple[Tensor, int, Tensor | None]]:
    """The tokens of each adapter, its slot, and what it counts, one column of ids after the other;
    sets error where an id is out of range or stale. Copies to the host."""
    for i, column in enumerate(ids.unbind(1)):
        slot, known = slots_of(column, s.generation)
        if ((column != BASE) & ~known).any():  # torch.func lets nobody write to a tensor from outside
            error |= 1
        for each in slot[known].unique().tolist():
            members = torch.nonzero(known & (slot == each))[:, 0]
            yield members, each, None if weights is None else weights[members, i]


@dataclass(frozen=True)
class AdapterCopy:
    """One adapter, its rank rows together."""

    a: Tensor
    """scale · A, [r, in]."""
    b: Tensor
    """Bᵀ, [r, out]."""
    gain: Tensor | None
    bias: Tensor | None


def adapter_in_slot(s: Slots, slot: int, dtype: torch.dtype) -> AdapterCopy:
    """The adapter in a slot, copied in another dtype."""
    rows, flags = rows_of(s, slot), int(s.flags[slot])
    gain = s.gain[flags >> ROW].to(dtype) if flags & GAIN else None
    bias = s.bias[flags >> ROW].to(dtype) if flags & BIAS else None
    return AdapterCopy(s.scale[slot].to(dtype) * s.a[rows].to(dtype), s.b[rows].to(dtype), gain, bias)


def rows_of(s: Slots, slot: int) -> Tensor:
    """Where the rank rows of a slot are in a and b, [r]."""
    j = torch.arange(int(s.rank[slot]), device=s.table.device)
    return s.table[slot, j // PAGE].long() * PAGE + j % PAGE
