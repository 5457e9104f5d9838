"""A batch of requests, each with its adapters, which the layers of `serve` use."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.multi_lora.plan import BatchPlan
from lora_kernels.serving.frame import Requests
from lora_kernels.serving.scope import Opening, Scope

Wanted = str | None | Sequence[str]


class Batch:
    """The adapters of a batch, from `AdapterPool.batch`; a context, inside which the layers of this
    thread use them, and those of threads and tasks that begin there.

    The served model must then be called with as many sequences as there are requests. A layer
    called by itself wants them as the first dimension of x. `rows`, if given, are the request of
    each row instead, for every layer. Leaving it raises LookupError if a kernel met an id that the
    pool no longer has. Entered in a generator it holds while that generator runs, and not between
    two steps of it.
    """

    missing: frozenset[str] = frozenset()
    """Names that the pool did not know, whose requests get the base."""

    def __init__(self, scope: Scope, requests: Requests, let_go: Callable[[], None]) -> None:
        self.scope, self.requests = scope, requests
        self._let_go = let_go
        self._entries: list[Opening] = []

    @property
    def ids(self) -> Tensor:
        """[requests, k]: the adapters of each."""
        return self.requests.ids

    @property
    def modules(self) -> frozenset[str]:
        """Those that an adapter of the batch changes."""
        return self.requests.modules

    def plan(self, rows: int) -> BatchPlan:
        """The plan for that many rows, an equal share of neighbouring rows for each request.

        Raises:
            ValueError: they are no multiple of the requests.
            BaseChangedError: as `AdapterPool.batch`.
        """
        count, pool = len(self.ids), self.requests.pool
        if pool is not None:
            pool.follow(self.modules)
        if rows % count if count else rows:
            raise ValueError(f"adapters: {count} were given, for an input of {rows} rows; those must be a multiple")
        return self.requests.repeated_plan(rows // count if count else 0)

    def close(self) -> None:
        """Lets go of the adapters; the pool may then evict them."""
        # of two threads one gets it
        let_go = self.__dict__.pop("_let_go", None)
        self.requests.end()
        if let_go is not None:
            let_go()

    def __del__(self) -> None:
        if "_let_go" not in self.__dict__:
            return
        # the pool's hold is dropped with it, and given back when the pool is called next
        self.requests.end()
        for opening in self.__dict__.get("_entries", ()):
            self.scope.forget(opening)

    def __enter__(self) -> "Batch":
        self.requests.raise_if_ended()
        self._entries.append(self.scope.open(self))
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        entries = self._entries
        self.scope.shut(entries.pop() if len(entries) == 1 else entries.pop(self.scope.which(entries)))
        if self._entries:
            return
        self.close()
        if kind is None:
            self.requests.raise_errors()


def requests_of(adapters: Sequence[Wanted], weights: Sequence[Any] | None) -> tuple[list[list[str]], list[list[float]] | None]:
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
