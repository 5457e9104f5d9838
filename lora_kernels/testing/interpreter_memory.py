"""Which program of an interpreted launch wrote and read each element, and what orders them."""

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from triton._C.libtriton import ir


class InterpreterViolation(AssertionError):
    """The kernel did what it must not; the message names the tensor, the element and the
    program."""


class InterpreterMemory:
    """The tensors of a launch, and which program wrote and read each element last."""

    def __init__(self, tensors: dict[str, Tensor], writes: Sequence[Tensor]) -> None:
        changed = {t.data_ptr() for t in writes}
        spans = [(t.data_ptr(), _byte_span(t), name, t.element_size()) for name, t in tensors.items() if t.numel()]
        self.spans = sorted({span[0]: span for span in spans}.values())
        self.first = np.array([at for at, *_ in self.spans], np.uint64)
        self.last = np.array([at + size for at, size, *_ in self.spans], np.uint64)
        self.writable = [at in changed for at, *_ in self.spans]
        # the program that wrote or read, as a number and 1, and its clock then; MANY programs for
        # reads
        self.wrote, self.read = [], []
        for (_, size, _, unit), writable in zip(self.spans, self.writable, strict=True):
            count = size // unit if writable else 0
            self.wrote.append(_access_marks(count))
            self.read.append(_access_marks(count))
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._clocks: dict[int, int] = {}
        self._known: dict[int, dict[int, int]] = {}
        self._released: dict[int, dict[int, int]] = {}
        self.program = (0, 0, 0)

    MANY = -1

    def raise_violation(self, text: str) -> None:
        raise InterpreterViolation(f"program {self.program}: {text}")

    def check_access(
        self, pointers: np.ndarray, mask: np.ndarray, size: int, kind: str, values: np.ndarray | None = None
    ) -> None:
        """Checks one tile's access; kind is load, store, atomic or atomic load."""
        # the product of masks may be an integer
        used = np.broadcast_to(mask, pointers.shape).astype(bool)
        at = pointers[used].astype(np.uint64)
        if not at.size:
            return
        which = np.searchsorted(self.first, at, side="right").astype(np.int64) - 1
        outside = (which < 0) | (at + np.uint64(size) > self.last[np.maximum(which, 0)])
        if outside.any():
            i = int(np.argmax(outside))
            place = int(at[i])
            base, span, name, _ = min(self.spans, key=lambda s: s[0] - place if place < s[0] else max(place - s[0] - s[1], 0))
            self.raise_violation(
                f"{kind} out of bounds, {name}{place - base:+d} of {span} bytes ({int(outside.sum())} elements)"
            )
        me = self._numbers.setdefault(self.program, len(self._numbers) + 1)
        for i in np.unique(which):
            base, _, name, unit = self.spans[i]
            if kind in ("store", "atomic") and not self.writable[i]:
                self.raise_violation(f"{kind} to {name}, which is not among the tensors it writes")
            if not self.writable[i]:
                continue
            elements = ((at[which == i] - np.uint64(base)) // np.uint64(unit)).astype(np.int64)
            if kind == "store" and values is not None:
                self._same_values(name, elements, np.broadcast_to(values, pointers.shape)[used][which == i])
            if kind in ("load", "store"):
                self._ordered(self.wrote[i], elements, me, f"{kind} of {name}", "written")
            if kind == "store":
                self._ordered(self.read[i], elements, me, f"store of {name}", "read")
                self.wrote[i][elements] = (me, self._clocks.get(me, 0))
                self.read[i][elements] = 0
            elif kind == "load":
                before = self.read[i][elements, 0]
                self.read[i][elements, 0] = np.where((before == 0) | (before == me), me, self.MANY)
                self.read[i][elements, 1] = self._clocks.get(me, 0)

    def _same_values(self, name: str, elements: np.ndarray, values: np.ndarray) -> None:
        order = np.argsort(elements, kind="stable")
        elements, values = elements[order], np.ascontiguousarray(values[order]).view(f"u{values.itemsize}")
        twice = (elements[1:] == elements[:-1]) & (values[1:] != values[:-1])
        if twice.any():
            self.raise_violation(f"stores two values to element {int(elements[1:][twice][0])} of {name} at once")

    def _ordered(self, marks: np.ndarray, elements: np.ndarray, me: int, what: str, how: str) -> None:
        others = marks[elements]
        suspect = (others[:, 0] != 0) & (others[:, 0] != me)
        for (other, clock), element in zip(others[suspect], elements[suspect], strict=True):
            if other == self.MANY or self._known.get(me, {}).get(int(other), -1) < clock:
                names = {number: program for program, number in self._numbers.items()}
                by = "several programs" if other == self.MANY else f"program {names[int(other)]}"
                self.raise_violation(f"{what} element {int(element)}: a race, it is {how} by {by}")

    def synchronise(self, pointers: np.ndarray, mask: np.ndarray, order: Any, *, replaces: bool = False) -> None:
        """An atomic passes on what its program did before, and brings what was passed on there."""
        me = self._numbers.setdefault(self.program, len(self._numbers) + 1)
        known = self._known.setdefault(me, {})
        for address in pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].ravel().tolist():
            if replaces:  # a store, not a read and a write: what was passed on before is gone
                self._released[int(address)] = {}
            there = self._released.setdefault(int(address), {})
            if order in (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE):
                for program, clock in there.items():
                    known[program] = max(known.get(program, -1), clock)
            if order in (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE):
                clock = self._clocks.get(me, 0)
                for program, seen in {**known, me: clock}.items():
                    there[program] = max(there.get(program, -1), seen)
                self._clocks[me] = clock + 1


def _byte_span(t: Tensor) -> int:
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _access_marks(count: int) -> np.ndarray:
    """Zeros [count, 2], of which only what is touched takes memory."""
    if count < 2**28:
        return np.zeros((count, 2), np.int64)
    # Linux's MAP_NORESERVE, which Python before 3.13 has no name for; Triton is for Linux alone
    no_reserve = 0x4000
    held = mmap.mmap(-1, 16 * count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return np.frombuffer(held, np.int64).reshape(count, 2)
