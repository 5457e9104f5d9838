"""What AdapterPool is made of: reading an adapter, following the base, taking adapters for a
batch."""

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import AdapterError
from lora_kernels.adapters.inject import first_names, uncompiled_model
from lora_kernels.nn.passed_over import reader_of
from lora_kernels.ops.multi_lora.plan import PAGE
from lora_kernels.serving.adapter import Adapter, Source, adapter_of, read_adapter
from lora_kernels.serving.base import BaseChangedError, BaseWatch, check_base_name, check_kind
from lora_kernels.serving.experts import Experts
from lora_kernels.serving.experts_site import ExpertsSite
from lora_kernels.serving.residents import Hold, PoolStats, Resident, Residents, Stored, UnknownAdapterError
from lora_kernels.serving.scope import Scope
from lora_kernels.serving.site import EmbeddingSite, Layer, Prepared, Site, pages_of
from lora_kernels.serving.size import layers_of, size_of

TRIES = 8
"""Of a load beside which the weights of the base change."""


class PoolCore:
    """The state of a pool. What takes long (files, gains) is done without the lock; what changes
    who is where, under it, by `Residents`."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "AdapterPool: a pool cannot be copied or pickled, since it belongs to its model's memory; make another and load"
            " its adapters again"
        )

    def __init__(
        self, model: nn.Module, capacity_bytes: int, slots: int, max_rank: int, host_bytes: int, modules: Iterable[str] | None
    ) -> None:  # fmt: skip
        self.model = uncompiled_model(model)
        layers = layers_of(self.model, modules)
        self.size = size_of(layers.values(), capacity_bytes, slots, max_rank)
        device = next(iter(layers.values())).weight.device
        self.max_rank, self.capacity_bytes, self.host_bytes = max_rank, capacity_bytes, host_bytes
        for name, layer in layers.items():
            check_kind(name, layer)
        counts = {1, *(layer.count for layer in layers.values() if isinstance(layer, Experts))}
        tables = {count: torch.zeros(slots * count, dtype=torch.int32, device=device) for count in counts}
        self._generation = tables[1]
        self.sites = {name: self._site_of(layer, tables) for name, layer in layers.items()}
        self._held = Residents(self.sites, tables.values(), slots, host_bytes)
        self._base = BaseWatch(self.model, self.sites)
        self._stats = PoolStats(slots=slots)
        self.scope = Scope()
        linear = (name for name, layer in layers.items() if isinstance(layer, nn.Linear))
        self._readers = {name: reader for name in linear if (reader := reader_of(self.model, name))}
        self._versions = itertools.count(1)
        self._lock = threading.RLock()

    def _site_of(self, layer: Layer, generations: Mapping[int, Tensor]) -> Site | EmbeddingSite | ExpertsSite:
        pages, max_rank = self.size.pages, self.max_rank
        if isinstance(layer, Experts):
            return ExpertsSite(layer, generations[layer.count], pages, max_rank)
        if isinstance(layer, nn.Embedding):
            return EmbeddingSite(layer, generations[1], pages, max_rank)
        return Site(layer, generations[1], pages, max_rank)

    @property
    def _free(self) -> list[int]:
        with self._lock:
            self._held.settle()
            return list(self._held.free)

    @property
    def _residents(self) -> Mapping[int, Resident]:
        return self._held.by_slot

    @property
    def device(self) -> torch.device:
        return self._generation.device

    def _read_adapter(self, source: Source) -> Adapter:
        if isinstance(source, Adapter):
            adapter = source.copied()
        elif isinstance(source, tuple):
            adapter = adapter_of(self.model, *source)
        else:
            adapter = read_adapter(self.model, source)
        foreign = sorted(adapter.factors.keys() - self.sites.keys())
        if foreign:
            raise AdapterError(f"AdapterPool: the adapter changes modules that the pool does not have: {first_names(foreign)}")
        for name, f in adapter.factors.items():
            site = self.sites[name]
            if reader := self._readers.get(name):
                why = f"{reader} may compute with its weight without calling the layer, which no adapter can change"
                raise AdapterError(f"AdapterPool: {name}: {why}")
            adapter.check(name, site.shape, site.dtype)
            if (refusal := site.refusal(f)) is not None:
                raise AdapterError(f"AdapterPool: {name}: {refusal}")
            pages = self.size.pages - (f.vectors > 0)
            if f.r > self.max_rank or pages_of(f.r) > pages:
                most = min(self.max_rank, PAGE * pages)
                raise AdapterError(f"AdapterPool: {name}: the rank may be {most}, found {f.r}")
        return adapter

    def _written(
        self, name: str, source: Source, strict: bool, write: Callable[[Stored, Mapping[str, Prepared]], int]
    ) -> int:  # fmt: skip
        """Reads an adapter and computes its gains, without the lock, and writes it under it."""
        try:
            if not isinstance(name, str):
                raise TypeError(f"AdapterPool: a name must be a string, found {name!r}")
            adapter = self._read_adapter(source)
            check_base_name(self.model, adapter.base, name, strict)
            on_host = adapter.pinned() if self.device.type == "cuda" and adapter.nbytes <= self.host_bytes else adapter
            for _ in range(TRIES):
                with self._lock:
                    self._held.settle()
                    self._follow_base(True, adapter.factors)
                    mark = self._base.mark
                prepared = self._prepared(adapter, self._gains(adapter, mark))
                with self._lock:
                    self._held.settle()
                    self._follow_base(True, adapter.factors)
                    if mark == self._base.mark:
                        return write(Stored(on_host, next(self._versions)), prepared)
            raise BaseChangedError(f"AdapterPool: the base changed {TRIES} times while the gains of {name!r} were computed")
        except Exception:
            self._stats.failures += 1
            raise

    def _gains(self, adapter: Adapter, mark: int) -> dict[str, Tensor | None]:
        """Of DoRA, for the weights that the base had at `mark`."""
        gains = {name: self.sites[name].gain(f, self._base.weight(name), mark) for name, f in adapter.factors.items()}
        for name, gain in gains.items():
            if gain is not None and not bool(gain.isfinite().all()):
                raise AdapterError(f"AdapterPool: {name}: the gain of DoRA is not finite")
        return gains

    def _prepared(self, adapter: Adapter, gains: Mapping[str, Tensor | None]) -> dict[str, Prepared]:
        return {name: self.sites[name].prepared(f, gains[name]) for name, f in adapter.factors.items()}

    def _follow_base(self, weights: bool, modules: Iterable[str]) -> None:
        """Brings gains up to date with the base; `weights`: what weights hold matters.

        Raises:
            BaseChangedError: one of the modules does not fit any more.
        """
        if not self._base.same(weights):
            self._base.follow()
            self._renew_gains()
        if self._base.unfit:
            self._base.check(modules)

    def look_at_layers(self, modules: Iterable[str]) -> None:
        """For a batch that is open: whether the model still has its layers.

        Raises:
            BaseChangedError: as `batch`.
        """
        if self._base.unfit or not self._base.same(False):
            self.follow(modules)

    def look_at_weight(self, name: str, weight: Tensor | None, modules: Iterable[str]) -> None:
        """For a layer that is about to use gains: computes them anew where the weight is another
        than theirs.

        Raises:
            BaseChangedError: as `batch`.
        """
        if not self._base.known[name].is_still(weight):
            self.follow(modules)

    def follow(self, modules: Iterable[str]) -> None:
        with self._lock:
            self._held.settle()
            self._follow_base(True, modules)

    def _layers_look(self) -> bool:
        """Whether each call looks at the weights itself. One that a CUDA graph repeats does not."""
        return "_lora_kernels" in self.model.__dict__ and self.device.type == "cpu"

    def _renew_gains(self) -> None:
        base = self._base
        for name in list(base.pending):
            site = self.sites[name]
            for resident in self._held.by_slot.values():
                if name in resident.magnitudes:
                    site.renew_gain(resident.slot, *resident.magnitudes[name], base.weight(name), base.mark)
            base.renewed(name)

    def _taken(self, names: Sequence[str], looking: bool = False) -> Hold:
        """A hold on adapters, in their order. What is on the host alone is brought into slots, for
        which its gains are computed without the lock. `looking`: the weights are looked at,
        whether layers do so themselves or not.

        Raises:
            as `batch`.
        """
        held, hold = self._held, Hold(self._held.dropped)
        ready: dict[str, tuple[Stored, int, dict[str, Tensor | None]]] = {}
        while True:
            with self._lock:
                held.settle()
                parked, modules, gained = {}, [], False
                for name in names:
                    resident = held.names.get(name)
                    if resident is not None:
                        modules.append(resident.modules)
                        gained = gained or bool(resident.magnitudes)
                    elif name in held.host:
                        parked[name] = held.host[name]
                        modules.append(frozenset(parked[name].adapter.factors))
                    else:
                        raise self._unknown(name)
                looked = bool(parked) or looking or (gained and not self._layers_look())
                self._follow_base(looked, itertools.chain(*modules))
                mark = self._base.mark
                of = {name: (stored, mark) for name, stored in parked.items()}
                wanted = [name for name in of if name not in ready or ready[name][:2] != of[name]]
                if not wanted:
                    try:
                        self._take_all(hold, names, ready)
                    except BaseException:
                        held.give_back(hold)
                        raise
                    return hold
            for name in wanted:
                ready[name] = parked[name], mark, self._gains(parked[name].adapter, mark)

    def _take_all(self, hold: Hold, names: Sequence[str], ready: Mapping[str, Any]) -> None:
        held, stats = self._held, self._stats
        absent = []
        for name in names:
            resident = held.names.get(name)
            if resident is None:
                absent.append(name)
            else:
                hold.take(resident)
        stats.hits += len(names) - len(absent)
        for name in absent:
            stored, _, gains = ready[name]
            stats.misses += 1
            stats.evictions += held.place(name, stored, self._prepared(stored.adapter, gains), False, False)
            held.host.move_to_end(name)
            hold.take(held.names[name])
        for name in names:
            held.by_slot.move_to_end(held.names[name].slot)
        if absent:
            hold.residents = [held.names[name] for name in names]

    def _give_back(self, hold: Hold) -> None:
        with self._lock:
            self._held.settle()
            self._held.give_back(hold)

    def _unknown(self, name: str) -> UnknownAdapterError:
        there = first_names(sorted({*self._held.names, *self._held.host})) or "none"
        return UnknownAdapterError(f"AdapterPool: no adapter is called {name!r}; there are {there}", name)


def renamed(
    names: list[list[str]], weights: list[list[float]] | None, old: str, new: str | None
) -> tuple[list[list[str]], list[list[float]] | None]:
    """Requests with another name in the place of one, or without it and its weight."""
    keep = [[i for i, name in enumerate(row) if name != old or new is not None] for row in names]
    left = [[new if row[i] == old and new is not None else row[i] for i in kept] for row, kept in zip(names, keep, strict=True)]
    if weights is not None:
        weights = [[row[i] for i in kept] for row, kept in zip(weights, keep, strict=True)]
    return left, weights
