"""One module's part of a pool: pages for rank rows, and what a slot says of its adapter here."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_kernels.ops import dora_gain, row_norm_squared, weight_norm
from lora_kernels.ops.multi_lora.plan import BIAS, GAIN, PAGE, Slots
from lora_kernels.serving.adapter import Factors


def bytes_of_page(weight: Tensor) -> int:
    return PAGE * (weight.shape[0] + weight.shape[1]) * weight.element_size()


def bytes_of_slots(weight: Tensor, slots: int, max_rank: int) -> int:
    """Of gain and bias, and of the tables."""
    return slots * (2 * 4 * weight.shape[0] + 4 * pages_of(max_rank) + 12)


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
    """The adapters of one weight W [out, in]. Nobody but the pool calls it, under its lock."""

    def __init__(self, weight: Tensor, generation: Tensor, pages: int, max_rank: int) -> None:
        n_out, n_in = weight.shape
        super().__init__(n_out, n_in, weight.dtype, generation, pages, max_rank)
        self.weight = weight
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
