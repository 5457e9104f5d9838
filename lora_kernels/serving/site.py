"""One module's part of a pool: pages for rank rows, and what a slot says of its adapter here."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import AdapterError
from lora_kernels.ops import dora_gain, row_norm_squared, weight_norm
from lora_kernels.ops.multi_lora.plan import BIAS, GAIN, PAGE, Slots, slots_of
from lora_kernels.serving.adapter import Factors


def bytes_of_page(module: nn.Module, max_rank: int) -> int:
    rows, columns = _shape(module)
    own = PAGE * pages_of(max_rank) if isinstance(module, nn.Embedding) else 0
    return PAGE * (rows + columns + own) * module.weight.element_size()  # type: ignore[operator]


def bytes_of_slots(module: nn.Module, slots: int, max_rank: int) -> int:
    """Of gain and bias, and of the tables."""
    return slots * (2 * 4 * _shape(module)[0] + 4 * pages_of(max_rank) + 12)


def _shape(module: nn.Module) -> tuple[int, int]:
    """Rows of B and columns of A."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, nn.Embedding) else (rows, columns)


def pages_of(r: int) -> int:
    return -(-r // PAGE)


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


class Pages:
    """Slots for the adapters of one matrix [out, in], and who has which page. Its owner calls it from one thread at a time."""

    def __init__(self, n_out: int, n_in: int, dtype: torch.dtype, generation: Tensor, pages: int, max_rank: int) -> None:
        count, new = len(generation), partial(torch.zeros, device=generation.device)
        # zeros: nothing but a pool's own numbers is ever in reach of a kernel
        self.slots = Slots(
            a=new(pages * PAGE, n_in, dtype=dtype),
            b=new(pages * PAGE, n_out, dtype=dtype),
            table=new(count, pages_of(max_rank), dtype=torch.int32),
            rank=new(count, dtype=torch.int32),
            scale=new(count),
            flags=new(count, dtype=torch.int32),
            gain=new(count, n_out),
            bias=new(count, n_out),
            generation=generation,
        )
        self.free = list(range(pages))
        self.held: dict[int, list[int]] = {}

    def put(self, slot: int, prepared: Prepared) -> None:
        """Writes an adapter into a slot that holds none here, or one of as many pages."""
        r, held = len(prepared.a), self.held.get(slot)
        if held is None:
            held = self.held[slot] = [self.free.pop() for _ in range(pages_of(r))]
        s, place = self.slots, self.slots.a.device
        pages = torch.tensor(held, dtype=torch.int32).to(place, non_blocking=True)
        at = (pages.long()[:, None] * PAGE + torch.arange(PAGE, device=place)).flatten()
        s.a[at[:r]], s.b[at[:r]] = prepared.a, prepared.b
        s.a[at[r:]] = 0
        s.b[at[r:]] = 0
        s.table[slot, : len(held)] = pages
        s.gain[slot] = 0 if prepared.gain is None else prepared.gain
        s.bias[slot] = 0 if prepared.bias is None else prepared.bias
        s.scale[slot], s.rank[slot] = prepared.scale, r
        s.flags[slot] = GAIN * (prepared.gain is not None) + BIAS * (prepared.bias is not None)

    def clear(self, slot: int) -> None:
        """Takes the adapter out of a slot and leaves nothing of it behind."""
        held, s = self.held.pop(slot, None), self.slots
        for t in (s.table, s.rank, s.scale, s.flags, s.gain, s.bias):
            t[slot] = 0
        for page in held or ():
            s.a[page * PAGE : (page + 1) * PAGE] = 0
            s.b[page * PAGE : (page + 1) * PAGE] = 0
            self.free.append(page)


class Site(Pages):
    """The adapters of one linear layer, W [out, in]. Nobody but the pool calls it, under its lock."""

    def __init__(self, module: nn.Linear, generation: Tensor, pages: int, max_rank: int) -> None:
        self.shape = _shape(module)
        super().__init__(*self.shape, module.weight.dtype, generation, pages, max_rank)
        self.weight = module.weight
        self._squared: Tensor | None = None

    def prepared(self, f: Factors) -> Prepared:
        """What the tables are to hold; of DoRA one pass over W, whose own norm is kept."""
        w = self.weight.detach()
        a, b = (t.to(w.device, w.dtype, non_blocking=True) for t in (f.a, f.b))
        gain = None
        if f.magnitude is not None:
            if self._squared is None:
                self._squared = row_norm_squared(w)
            norm = weight_norm(w, a, b, f.scale, self._squared)
            gain = dora_gain(f.magnitude.to(norm, non_blocking=True), norm).float()
        bias = None if f.bias is None else f.scale * f.bias.to(w.device, torch.float32, non_blocking=True)
        return Prepared(a, b.T, f.scale, gain, bias)


class EmbeddingSite(Pages):
    """The adapters of one embedding, W [entries, dim]: y = W[i] + s · B A[:, i]. A token's column of A is looked up; it is then
    the x of a linear layer with this B, whose own A is the first rows of the identity."""

    def __init__(self, module: nn.Embedding, generation: Tensor, pages: int, max_rank: int) -> None:
        self.shape = _shape(module)
        super().__init__(self.shape[0], PAGE * pages_of(max_rank), module.weight.dtype, generation, pages, max_rank)
        self.weight = module.weight
        self.columns = torch.zeros(self.shape[1], pages, PAGE, dtype=self.weight.dtype, device=self.weight.device)
        """[entries, pages, 8]: Aᵀ, in the pages that B has."""

    def prepared(self, f: Factors) -> Prepared:
        """What the tables are to hold, but for A.

        Raises:
            AdapterError: the adapter has a magnitude or a bias.
        """
        if f.magnitude is not None or f.bias is not None:
            raise AdapterError("an embedding has no DoRA and no lora_bias in a batch")
        w = self.weight
        units = torch.eye(f.r, self.slots.a.shape[1], dtype=w.dtype, device=w.device)
        a, b = (t.to(w.device, w.dtype, non_blocking=True) for t in (f.a, f.b))
        return Prepared(units, b.T, f.scale, columns=a)

    def put(self, slot: int, prepared: Prepared) -> None:
        super().put(slot, prepared)
        assert prepared.columns is not None
        held = self.held[slot]
        room = self.columns.new_zeros(self.shape[1], len(held) * PAGE)
        room[:, : len(prepared.columns)] = prepared.columns.T
        pages = torch.tensor(held).to(room.device, non_blocking=True)
        self.columns[:, pages] = room.view(-1, len(held), PAGE)

    def clear(self, slot: int) -> None:
        for page in self.held.get(slot, ()):
            self.columns[:, page] = 0
        super().clear(slot)

    def looked_up(self, ids: Tensor, entries: Tensor) -> Tensor:
        """The column of A for each token, [tokens, ranks]: of the adapter `ids` [tokens] at `entries` [tokens]; zeros where it
        has no ranks, or the id is not known."""
        s, j = self.slots, torch.arange(self.slots.a.shape[1], device=ids.device)
        slot, known = slots_of(ids, s.generation)
        there = known[:, None] & (j < s.rank[slot][:, None])
        return torch.where(there, self.columns[entries[:, None], s.table[slot].long()].flatten(1), 0)


def site_of(module: nn.Linear | nn.Embedding, generation: Tensor, pages: int, max_rank: int) -> Site | EmbeddingSite:
    if isinstance(module, nn.Embedding):
        return EmbeddingSite(module, generation, pages, max_rank)
    return Site(module, generation, pages, max_rank)
