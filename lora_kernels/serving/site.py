"""One module's part of a pool: pages for rank rows, and what a slot says of its adapter here."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.ops import dora_gain, row_norm_squared, weight_norm
from lora_kernels.ops.multi_lora.plan import BIAS, GAIN, PAGE, ROW, Slots, rows_of, slots_of
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.serving.adapter import Factors, vectors_of
from lora_kernels.serving.base import form_of, weight_of
from lora_kernels.serving.experts import Experts

Layer = nn.Linear | nn.Embedding | Experts
"""What a site can be of."""


def bytes_of_page(layer: Layer, max_rank: int) -> int:
    rows, columns = _matrix_shape(layer)
    own = PAGE * pages_of(max_rank) if isinstance(layer, nn.Embedding) else 0
    return _experts_of(layer) * PAGE * (rows + columns + own) * form_of(layer)[1].itemsize


def bytes_of_slots(layer: Layer, slots: int, max_rank: int) -> int:
    """Of the tables: the pages of each slot, its rank, scale and flags."""
    return slots * _experts_of(layer) * (4 * pages_of(max_rank) + 12)


def _experts_of(layer: Layer) -> int:
    return layer.count if isinstance(layer, Experts) else 1


def _matrix_shape(module: Layer) -> tuple[int, int]:
    """Rows of B and columns of A."""
    rows, columns = form_of(module)[0]
    return (columns, rows) if isinstance(module, nn.Embedding) else (rows, columns)


def pages_of(r: int) -> int:
    return -(-r // PAGE)


def vectors_of_page(dtype: torch.dtype) -> int:
    """How many of them a page has room for, in its part of b."""
    return PAGE * dtype.itemsize // 4


@dataclass(frozen=True)
class Prepared:
    """An adapter as the tables hold it."""

    a: Tensor
    """[r, in]."""
    b: Tensor
    """Bᵀ [r, out]."""
    scale: float
    gain: Tensor | None = None
    """[out] of DoRA."""
    bias: Tensor | None = None
    """[out]: scale times the bias of B."""
    columns: Tensor | None = None
    """A of an embedding, [r, entries]."""


@dataclass(frozen=True)
class Saved:
    """What some slots held in one module, and who had which page."""

    slots: Collection[int]
    free: list[int]
    held: dict[int, list[int]]
    vectors: dict[int, tuple[int, int]]
    entries: dict[int, tuple[int, float, int]]
    rows: Tensor
    """Those of the pages that the slots held."""
    a: Tensor
    b: Tensor
    columns: Tensor | None = None


class Pages:
    """Slots for the adapters of one matrix [out, in], and who has which page. Its owner calls it
    from one thread at a time.

    Of several `experts`, each with such a matrix, a page is as many pages of the kernel's side by
    side, one for each expert, and a slot as many slots: number slot · experts + expert, with a
    generation of its own. Where shapes begin with [experts], that is left out for a matrix alone.

    Gains and biases are float32 rows in pages that several adapters share: memory of b read as
    float32. With `own_vectors` each slot has memory of its own for both, whether its adapter wants
    it or not.
    """

    parameter: str | None = None
    """The name of the matrix in its module, if it is not that of the module's `weight`."""

    def __init__(
        self, n_out: int, n_in: int, dtype: torch.dtype, generation: Tensor, pages: int, max_rank: int,
        own_vectors: bool = False, experts: int = 1,
    ) -> None:  # fmt: skip
        count, new = len(generation), partial(torch.zeros, device=generation.device)
        # zeros: nothing but a pool's own numbers is ever in reach of a kernel
        b = new(pages * experts * PAGE, n_out, dtype=dtype)
        vectors = b.view(-1).view(torch.float32).view(-1, n_out)
        self._own_vectors, self._per_page, self.experts = own_vectors, vectors_of_page(dtype), experts
        self.slots = Slots(
            a=new(pages * experts * PAGE, n_in, dtype=dtype),
            b=b,
            table=new(count, pages_of(max_rank), dtype=torch.int32),
            rank=new(count, dtype=torch.int32),
            scale=new(count),
            flags=new(count, dtype=torch.int32),
            gain=new(count, n_out) if own_vectors else vectors,
            bias=new(count, n_out) if own_vectors else vectors[experts:],
            generation=generation,
        )
        self.free = list(range(pages))
        self.held: dict[int, list[int]] = {}
        self._vectors: dict[int, tuple[int, int]] = {}
        """Of each slot that has some: the first of its float32 rows, and how many; a row of each
        expert counts as one."""
        self._entries: dict[int, tuple[int, float, int]] = {}
        """Of each slot that holds something: rank, scale and flags, as `put` wrote them."""

    def refusal(self, f: Factors) -> str | None:
        """Why no batch can do what an adapter asks of this matrix, or None."""
        return None

    def prepared(self, f: Factors, gain: Tensor | None) -> Prepared:
        """What the tables are to hold."""
        to, device = self.slots.a, self.slots.a.device
        a, b = (t.to(device, to.dtype, non_blocking=True) for t in (f.a, f.b))
        bias = None if f.bias is None else f.scale * f.bias.to(device, torch.float32, non_blocking=True)
        return Prepared(a, b.mT, f.scale, gain, bias)

    @property
    def bytes_of_page(self) -> int:
        return self.experts * PAGE * (self.slots.a.shape[1] + self.slots.b.shape[1]) * self.slots.a.element_size()

    @property
    def shared(self) -> set[int]:
        """The pages that hold gains and biases."""
        return {first // self._per_page for first, _ in self._vectors.values()}

    def short_of(self, ranks: int, vectors: int, without: Collection[int] = ()) -> int:
        """How many pages are missing for an adapter of so many ranks and vectors, once the slots
        `without` were cleared; not above 0 if it fits."""
        free = len(self.free) + sum(len(self.held.get(slot, ())) for slot in without)
        left = {slot: rows for slot, rows in self._vectors.items() if slot not in without}
        free += len(self.shared) - len({first // self._per_page for first, _ in left.values()})
        beside = self._own_vectors or not vectors or self._free_vector_rows(vectors, left) is not None
        return pages_of(ranks) + (not beside) - free

    def _free_vector_rows(self, count: int, vectors: dict[int, tuple[int, int]]) -> int | None:
        """The first of `count` free rows in one of the pages that hold vectors."""
        taken = {row for first, rows in vectors.values() for row in range(first, first + rows)}
        for page in sorted({first // self._per_page for first, _ in vectors.values()}):
            rows = range(page * self._per_page, (page + 1) * self._per_page)
            for first in rows[: len(rows) - count + 1]:
                if taken.isdisjoint(range(first, first + count)):
                    return first
        return None

    def _take_vector_rows(self, slot: int, count: int) -> int:
        """Where the vectors of a slot that has none yet go."""
        row = self._free_vector_rows(count, self._vectors)
        if row is None:
            row = self.free.pop() * self._per_page
        self._vectors[slot] = row, count
        return row

    def holding(self, slot: int) -> tuple[int, int]:
        """The pages of a slot's ranks, and its vectors."""
        return len(self.held.get(slot, ())), self._vectors.get(slot, (0, 0))[1]

    def put(self, slot: int, prepared: Prepared) -> None:
        """Writes an adapter into a slot that holds none here, or one of as many pages and
        vectors."""
        r, held = prepared.a.shape[-2], self.held.get(slot)
        if held is None:
            held = self.held[slot] = [self.free.pop() for _ in range(pages_of(r))]
        gains, biases = prepared.gain is not None, prepared.bias is not None
        row, count = slot if self._own_vectors else 0, vectors_of(gains, biases)
        if count and not self._own_vectors:
            row = self._vectors[slot][0] if slot in self._vectors else self._take_vector_rows(slot, count)
        s, place = self.slots, self.slots.a.device
        pages = torch.tensor(held, dtype=torch.int32).to(place, non_blocking=True)
        at = self._rows_of_pages(pages)
        s.a[at[:, :r]], s.b[at[:, :r]] = prepared.a, prepared.b
        s.a[at[:, r:]] = 0
        s.b[at[:, r:]] = 0
        if prepared.gain is not None:
            self._each(s.gain)[row] = prepared.gain
        if prepared.bias is not None:
            self._each(s.bias)[row] = prepared.bias
        self._entries[slot] = r, prepared.scale, GAIN * gains + BIAS * biases + (row << ROW)
        self._write_entry(slot, pages)

    def _each(self, table: Tensor) -> Tensor:
        """A table of the slots, or rows of vectors, as [slots, experts, ...]."""
        return table.view(-1, self.experts, *table.shape[1:])

    def _write_entry(self, slot: int, pages: Tensor) -> None:
        s, (rank, scale, flags) = self.slots, self._entries[slot]
        expert = torch.arange(self.experts, dtype=torch.int32, device=pages.device)
        self._each(s.table)[slot, :, : len(pages)] = pages * self.experts + expert[:, None]
        self._each(s.rank)[slot], self._each(s.scale)[slot] = rank, scale
        row = (flags >> ROW) * self.experts + expert
        self._each(s.flags)[slot] = (flags & (GAIN | BIAS)) + (row << ROW)

    def _rows_of_pages(self, pages: Tensor) -> Tensor:
        """Where they are in a and b, [experts, 8 · pages]."""
        j, expert = (torch.arange(count, device=pages.device) for count in (PAGE, self.experts))
        return ((pages.long()[:, None] * self.experts + expert[:, None, None]) * PAGE + j).flatten(1)

    def clear_slot(self, slot: int) -> None:
        """Takes the adapter out of a slot and leaves nothing of it behind."""
        held, s, shared = self.held.pop(slot, []), self.slots, self.shared
        self._entries.pop(slot, None)
        for t in (s.table, s.rank, s.scale, s.flags, *((s.gain, s.bias) if self._own_vectors else ())):
            self._each(t)[slot] = 0
        first, count = self._vectors.pop(slot, (0, 0))
        if count:
            self._each(s.gain)[first] = 0
        if count > 1:
            self._each(s.bias)[first] = 0
        for page in [*held, *(shared - self.shared)]:
            self._zero(page)
            self.free.append(page)

    def _zero(self, page: int) -> None:
        rows = self.experts * PAGE
        self.slots.a[page * rows : (page + 1) * rows] = 0
        self.slots.b[page * rows : (page + 1) * rows] = 0

    def save(self, slots: Collection[int]) -> Saved:
        """What `restore` puts back, whatever was put into these slots or cleared there since."""
        held = {page for slot in slots for page in self.held.get(slot, ())}
        held |= {self._vectors[slot][0] // self._per_page for slot in slots if slot in self._vectors}
        rows = self._rows_of_pages(torch.tensor(sorted(held), dtype=torch.int64).to(self.slots.a.device)).flatten()
        return Saved(
            slots, list(self.free), dict(self.held), dict(self._vectors), dict(self._entries), rows, self.slots.a[rows],
            self.slots.b[rows],
        )  # fmt: skip

    def restore(self, saved: Saved) -> None:
        """Goes back; may be called again if it was interrupted."""
        for page in set(saved.free) - set(self.free):
            self._zero(page)
        s = self.slots
        for slot in saved.slots:
            # its rows may be in a page that it shares with slots that were not saved
            first, count = self._vectors.get(slot, (0, 0))
            for t in (s.gain, s.bias)[:count]:
                self._each(t)[first] = 0
        s.a[saved.rows], s.b[saved.rows] = saved.a, saved.b
        for slot in saved.slots:
            for t in (s.table, s.rank, s.scale, s.flags):
                self._each(t)[slot] = 0
        self.held, self._vectors, self._entries = dict(saved.held), dict(saved.vectors), dict(saved.entries)
        for slot in saved.slots:
            if slot in self._entries:
                self._write_entry(slot, torch.tensor(self.held[slot], dtype=torch.int32).to(s.table.device))
        self.free = list(saved.free)


class Site(Pages):
    """The adapters of one linear layer, W [out, in]. Nobody but the pool calls it, under its
    lock."""

    def __init__(self, module: nn.Linear, generation: Tensor, pages: int, max_rank: int) -> None:
        self.shape, self.dtype = form_of(module)
        super().__init__(*self.shape, self.dtype, generation, pages, max_rank)
        self.weight_shape, self.weight_dtype = tuple(module.weight.shape), module.weight.dtype
        self.device, self.numbers = module.weight.device, self.shape
        self._squared: tuple[int, Tensor] | None = None

    def gain(self, f: Factors, weight: Tensor | QuantisedWeight, mark: int) -> Tensor | None:
        """Of DoRA, m / ‖W + s·BA‖: one pass over W, whose own norm is kept for as long as `mark` is
        the same. May be called without the pool's lock.

        Raises:
            AdapterError: W is quantised in a way that hides it.
        """
        if f.magnitude is None:
            return None
        w, known = weight_of(weight), self._squared
        if known is None or known[0] != mark:
            known = self._squared = mark, row_norm_squared(w)
        a, b = (t.to(self.device, self.dtype, non_blocking=True) for t in (f.a, f.b))
        norm = weight_norm(w, a, b, f.scale, known[1])
        return dora_gain(f.magnitude.to(norm, non_blocking=True), norm).float()

    def renew_gain(self, slot: int, magnitude: Tensor, scale: float, weight: Any, mark: int) -> None:
        """The gain of an adapter in a slot, for a weight that is another now."""
        at = rows_of(self.slots, slot)
        gain = self.gain(Factors(self.slots.a[at], self.slots.b[at].T, scale, magnitude), weight, mark)
        if gain is not None:
            self.slots.gain[self._vectors[slot][0]] = gain


class EmbeddingSite(Pages):
    """The adapters of one embedding, W [entries, dim]: y = W[i] + s · B A[:, i]. A token's column
    of A is looked up; it is then the x of a linear layer with this B, whose own A is the first rows
    of the identity."""

    def __init__(self, module: nn.Embedding, generation: Tensor, pages: int, max_rank: int) -> None:
        self.shape = _matrix_shape(module)
        super().__init__(self.shape[0], PAGE * pages_of(max_rank), module.weight.dtype, generation, pages, max_rank)
        self.weight_shape, self.device = tuple(module.weight.shape), module.weight.device
        self.dtype = self.weight_dtype = module.weight.dtype
        self.columns = torch.zeros(self.shape[1], pages, PAGE, dtype=self.dtype, device=self.device)
        """[entries, pages, 8]: Aᵀ, in the pages that B has."""

    def refusal(self, f: Factors) -> str | None:
        return "an embedding has no DoRA and no lora_bias in a batch" if f.vectors else None

    def gain(self, f: Factors, weight: Any, mark: int) -> None:
        """An embedding has none."""

    def renew_gain(self, slot: int, magnitude: Tensor, scale: float, weight: Any, mark: int) -> None:
        """There is none to renew."""

    def prepared(self, f: Factors, gain: Tensor | None) -> Prepared:
        """What the tables are to hold, but for A."""
        units = torch.eye(f.r, self.slots.a.shape[1], dtype=self.dtype, device=self.device)
        a, b = (t.to(self.device, self.dtype, non_blocking=True) for t in (f.a, f.b))
        return Prepared(units, b.T, f.scale, columns=a)

    @property
    def bytes_of_page(self) -> int:
        return super().bytes_of_page + PAGE * len(self.columns) * self.columns.element_size()

    def put(self, slot: int, prepared: Prepared) -> None:
        super().put(slot, prepared)
        assert prepared.columns is not None
        held = self.held[slot]
        room = self.columns.new_zeros(self.shape[1], len(held) * PAGE)
        room[:, : len(prepared.columns)] = prepared.columns.T
        pages = torch.tensor(held).to(room.device, non_blocking=True)
        self.columns[:, pages] = room.view(-1, len(held), PAGE)

    def clear_slot(self, slot: int) -> None:
        for page in self.held.get(slot, ()):
            self.columns[:, page] = 0
        super().clear_slot(slot)

    def save(self, slots: Collection[int]) -> Saved:
        saved = super().save(slots)
        return replace(saved, columns=self.columns[:, saved.rows[::PAGE] // PAGE])

    def restore(self, saved: Saved) -> None:
        assert saved.columns is not None
        for page in set(saved.free) - set(self.free):
            self.columns[:, page] = 0
        self.columns[:, saved.rows[::PAGE] // PAGE] = saved.columns
        super().restore(saved)

    def looked_up(self, ids: Tensor, entries: Tensor) -> Tensor:
        """The column of A for each token, [tokens, ranks]: of the adapter `ids` [tokens] at
        `entries` [tokens]; zeros where it has no ranks, or the id is not known."""
        s, j = self.slots, torch.arange(self.slots.a.shape[1], device=ids.device)
        slot, known = slots_of(ids, s.generation)
        there = known[:, None] & (j < s.rank[slot][:, None])
        return torch.where(there, self.columns[entries[:, None], s.table[slot].long()].flatten(1), 0)
