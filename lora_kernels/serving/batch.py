"""Which adapters the layers of `serve` use at the moment."""

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.multi_lora.plan import BatchPlan

Wanted = str | None | Sequence[str]


class Batch:
    """The adapters of a batch, from `AdapterPool.batch`; a context, inside which the layers of this
    thread use them.

    A layer with as many rows of x as there are requests, or a multiple of that (tokens of a
    sequence, beams), gives each request its share of neighbouring rows. Leaving it raises
    LookupError if a kernel met an id that the pool no longer has.
    """

    missing: frozenset[str] = frozenset()
    """Names that the pool did not know, whose requests get the base."""

    def __init__(
        self, ids: Tensor, weights: Tensor | None, slots: int, modules: frozenset[str], let_go: Callable[[], None]
    ) -> None:  # fmt: skip
        self.ids, self.weights, self._slots = ids, weights, slots
        self.modules = modules
        """Those that an adapter of the batch changes."""
        self.all_base = not modules
        self._let_go: Callable[[], None] | None = let_go
        self._plans: dict[int, BatchPlan] = {}
        self._columns: dict[int, list[BatchPlan]] = {}
        self._tokens: list[Token[Batch | None]] = []
        self._lock = threading.Lock()

    def plan(self, rows: int) -> BatchPlan:
        """The plan for that many rows.

        Raises:
            ValueError: they are no multiple of the requests.
        """
        found = self._plans.get(rows)
        if found is None:
            count = len(self.ids)
            if rows % count if count else rows:
                raise ValueError(f"adapters: {count} were given, for an input of {rows} rows; those must be a multiple")
            each = rows // count if count else 1
            ids, weights = self.ids.repeat_interleave(each, 0), self.weights
            weights = None if weights is None else weights.repeat_interleave(each, 0)
            found = self._plans[rows] = BatchPlan.build(ids, self._slots, weights)
        return found

    def columns(self, rows: int) -> list[BatchPlan]:
        """`plan` as one plan for each of the adapters that a row may have."""
        plan = self.plan(rows)
        if plan.ids.shape[1] == 1:
            return [plan]
        found = self._columns.get(rows)
        if found is None:
            weights = [None] * plan.ids.shape[1] if plan.weights is None else plan.weights.unbind(1)
            pairs = zip(plan.ids.unbind(1), weights, strict=True)
            found = self._columns[rows] = [BatchPlan.build(ids, self._slots, of_ids) for ids, of_ids in pairs]
        return found

    def close(self) -> None:
        """Lets go of the adapters; the pool may then evict them."""
        with self._lock:
            let_go, self._let_go = self._let_go, None
        if let_go is not None:
            let_go()

    def __enter__(self) -> "Batch":
        if self._let_go is None:
            raise RuntimeError("Batch: it has ended; the pool may have evicted its adapters")
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        _current.reset(self._tokens.pop())
        if self._tokens:
            return
        self.close()
        if kind is None:
            for plan in (*self._plans.values(), *(plan for plans in self._columns.values() for plan in plans)):
                plan.raise_errors()


_current: ContextVar[Batch | None] = ContextVar("batch", default=None)


def current_batch() -> Batch | None:
    return _current.get()


def requests_of(
    adapters: Sequence[Wanted], weights: Sequence[Any] | None
) -> tuple[list[list[str]], list[list[float]] | None]:
    """The names of each request, and their weights, as lists.

    Raises:
        TypeError: a request is neither a name, None nor several names.
        ValueError: the weights do not fit the names.
    """
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise TypeError(f"adapters must be a list with a name, None or several names for each request, found {adapters!r}")
    names = []
    for each in adapters:
        row = [] if each is None else [each] if isinstance(each, str) else each
        if not isinstance(row, list | tuple) or not all(isinstance(name, str) for name in row):
            raise TypeError(f"adapters: a request must be a name, None or several names, found {each!r}")
        names.append(list(row))
    if weights is None:
        return names, None
    counted = [[float(w)] if isinstance(w, int | float) else [float(v) for v in w or ()] for w in weights]
    if [len(row) for row in counted] != [len(row) for row in names]:
        raise ValueError(f"weights must be as many as the names of each request, {[len(r) for r in names]}, found {weights!r}")
    if not all(torch.isfinite(torch.tensor(row)).all() for row in counted):
        raise ValueError("weights must be finite")
    return names, counted
