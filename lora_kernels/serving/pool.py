"""Adapters in a fixed amount of memory, ready for `multi_lora`: loaded, evicted, exchanged while
others run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lora_kernels.adapters.inject import uncompiled_model
from lora_kernels.ops.multi_lora.plan import BASE
from lora_kernels.serving.adapter import Source
from lora_kernels.serving.batch import Batch, Wanted, requests_of
from lora_kernels.serving.compiled import prepare
from lora_kernels.serving.core import PoolCore, renamed
from lora_kernels.serving.frame import Requests, checked_rows
from lora_kernels.serving.residents import PoolFullError, PoolStats, Stored, UnknownAdapterError
from lora_kernels.serving.site import Prepared
from lora_kernels.serving.size import MIB, PoolSize, layers_of, size_for, size_of

Missing = Literal["raise", "base"] | Callable[[str], str | None]


class AdapterPool(PoolCore):
    """Slots and pages for the adapters of the layers of `model`, all allocated here and never more.

        pool = AdapterPool(model, capacity_bytes=1 << 30, slots=64)
        pool.load("customer-7", "path/to/adapter")   # PEFT's files, of any kind that adds B A
        with pool.batch(["customer-7", None]): ...   # adapters that run are never evicted

    Rank rows lie in pages of 8, so ranks from 1 to `max_rank` share the memory without padding to
    the largest; gains of DoRA and biases lie in pages, too, which adapters share. `capacity_bytes`
    covers pages and tables, on the device of the weights, in their dtype; each module gets as many
    pages. `sizing` says how many bytes some ranks need, `size` what this pool holds. `host_bytes`
    of the host's memory keep adapters that were evicted (pinned, with a GPU), and `batch` brings
    them back. `modules` are the names of the layers that adapters may change: nn.Linear, the head
    among them, nn.Embedding (LoRA alone), and transformers' experts, by the name of their module or
    of one of its parameters. If not given all nn.Linear, since the pages of an embedding have as
    many columns as it has entries, and a page of experts has rows for each of them.

    A load is all or nothing, also when it is interrupted: what fails, at whatever step, leaves
    slots, pages, names and the host's memory as they were. The gain of DoRA is computed then, in
    one pass over the weight, while batches go on. Evicted is whoever was not used for longest and
    is not in use or pinned; what was in its pages is overwritten with zeros. All methods may be
    called from several threads; on a GPU all of it, the batches' kernels too, must be on one
    stream, which orders them.

    The base is the model's: if its weights change, the next load, or the next call of a served
    layer, an open batch's too, computes the gains anew. Where pages do not fit any more (another
    shape or dtype, another layer) the batch, the call or the load raises BaseChangedError. A weight
    may be quantised if it is a tensor that nn.Linear multiplies with, and DoRA wants that it
    dequantises; or of experts that bitsandbytes has parametrised, or FP8Experts.

    Raises:
        TypeError, ValueError: a module is none of these, has a dtype that is not supported, or the
            capacity holds no page.
    """

    def __init__(
        self, model: nn.Module, *, capacity_bytes: int, slots: int = 64, max_rank: int = 512, host_bytes: int = 0,
        modules: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, capacity_bytes, slots, max_rank, host_bytes, modules)

    @staticmethod
    def sizing(
        model: nn.Module, ranks: Iterable[int] | None = None, *, capacity_bytes: int | None = None, dora: bool = False,
        lora_bias: bool = False, slots: int | None = None, max_rank: int = 512, modules: Iterable[str] | None = None,
    ) -> PoolSize:  # fmt: skip
        """What a pool needs to hold adapters of these ranks at once, in as many slots if `slots`
        are not given:

            size = AdapterPool.sizing(model, [16] * 32, dora=True)
            pool = AdapterPool(model, capacity_bytes=size.capacity_bytes, slots=size.slots)

        Or, without ranks, what `capacity_bytes` with `slots` (64) give: `sizing(model,
        capacity_bytes=1 << 30).holds(16)`. Nothing is allocated: of the model shapes and dtypes are
        read, and it may be on the meta device.

        Raises:
            ValueError: neither or both are given, a rank is below 1 or above max_rank, slots are
                fewer than ranks, or the capacity holds no page.
        """
        layers = layers_of(uncompiled_model(model), modules).values()
        if (ranks is None) == (capacity_bytes is None):
            raise ValueError("AdapterPool: sizing wants either ranks or capacity_bytes")
        if capacity_bytes is not None:
            return size_of(layers, capacity_bytes, 64 if slots is None else slots, max_rank)
        return size_for(layers, ranks or (), slots, max_rank, dora, lora_bias)

    def load(
        self, name: str, source: Source, *, replace: bool = False, pinned: bool = False, strict: bool = False
    ) -> int:  # fmt: skip
        """Puts an adapter into a slot under a name, and returns its id. `source`: a directory in
        PEFT's format, an `Adapter`, or (LoraConfig, tensors by PEFT's names), which are copied.
        With `replace` the name may be taken: batches that began keep what they have, later ones get
        the new one, and the old slot is freed when nobody uses it. A `pinned` adapter is not
        evicted. An adapter that was trained on a base of another name is warned of, or refused if
        `strict`.

        Raises:
            AdapterError: the adapter is damaged, does not fit the model, or has a rank over
                `max_rank` or more than the pool holds; nothing has changed.
            PoolFullError: everything in the way is in use or pinned; nothing has changed.
            BaseChangedError: the model is not the one that the pool was made for.
            TypeError: the name is not a string.
            ValueError: the name is taken, by an adapter in a slot or on the host.
        """

        def place(stored: Stored, prepared: Mapping[str, Prepared]) -> int:
            if name in self and not replace:
                raise ValueError(f"AdapterPool: {name!r} is loaded already; replace=True exchanges it")
            self._stats.evictions += self._held.place(name, stored, prepared, pinned, True)
            self._stats.loads += 1
            return self._held.names[name].id

        return self._written(name, source, strict, place)

    def update(self, name: str, source: Source, *, strict: bool = False) -> int:
        """Gives an adapter other weights, for instance those of a trainer, and returns the number
        of this version, which grows. A batch that runs keeps the version that it began with, in
        every layer.

        While no batch holds the adapter it is written in place: its id stays, and a CUDA graph
        needs no second capture; ranks may change as far as there are pages. While one does, the new
        version goes into another slot and has another id, as with `load(replace=True)`. On the host
        alone it is exchanged there.

        Raises:
            AdapterError, BaseChangedError, LookupError: as `load` and `batch`; nothing has changed.
            PoolFullError: there are too few pages, or no slot for a second version beside the one
                that runs; nothing has changed.
        """

        def write(stored: Stored, prepared: Mapping[str, Prepared]) -> int:
            resident = self._held.names.get(name)
            if resident is None and name in self._held.host:
                self._held.exchange_on_host(name, stored)
            elif resident is None:
                raise self._unknown(name)
            elif not resident.users:
                self._held.rewrite(resident, stored, prepared)
            else:
                try:
                    self._stats.evictions += self._held.place(name, stored, prepared, resident.pinned, True)
                except PoolFullError as error:
                    raise PoolFullError(f"{error}; a batch that runs holds the version before") from None
            self._stats.updates += 1
            return stored.version

        return self._written(name, source, strict, write)

    def version_of(self, name: str) -> int:
        """The number of an adapter's weights: another after each `load` and `update`, larger than
        all before. It can be the salt of a prefix cache.

        Raises:
            LookupError: there is none of that name.
        """
        with self._lock:
            self._held.settle()
            held = self._held.names.get(name) or self._held.host.get(name)
            if held is None:
                raise self._unknown(name)
            return held.version

    def evict(self, name: str) -> None:
        """Forgets an adapter. Its slot is freed now, or when the last batch that uses it ends.

        Raises:
            LookupError: there is none of that name.
        """
        with self._lock:
            self._held.settle()
            if name not in self:
                raise self._unknown(name)
            self._held.forget(name)

    def refresh(self) -> None:
        """Computes all gains of DoRA anew. Wanted after weights of the base were written through
        `.data` or numpy, which nothing else shows; other changes the next call notices.

        Raises:
            BaseChangedError: as `load`.
        """
        with self._lock:
            self._held.settle()
            self._base.follow(all_weights=True)
            self._renew_gains()
            self._base.check(module for resident in self._held.by_slot.values() for module in resident.modules)

    def prefetch(self, names: Iterable[str]) -> None:
        """Brings adapters from the host's memory into slots, as `batch` would when it wants them;
        copies from pinned memory run beside the host.

        Raises:
            LookupError, PoolFullError: as `batch`.
        """
        for name in names:
            self._give_back(self._taken([name]))

    def batch(
        self, adapters: Sequence[Wanted], weights: Sequence[Any] | None = None, *, rows: Any = None,
        missing: Missing = "raise",
    ) -> Batch:  # fmt: skip
        """A context in which the layers of `serve` use `adapters`: for each sequence (or token) a
        name, None for the base, or several names, whose `weights` are then given likewise (1 if
        not). `rows` says for each row of the layers' inputs the index of its request, or -1 for the
        base, where rows are not sequences. Adapters in it stay until it ends.

        `missing` says what becomes of a name that is not known, so that it fails alone: "raise";
        "base", which is what its sequence gets, and `batch.missing` has the name; or a function. It
        gets the name and returns another, after a load of its own perhaps, or None for the base.

        Raises:
            LookupError: a name is not known; the others are not held.
            PoolFullError: the batch wants more adapters than there is room for.
            BaseChangedError: a layer that one of them changes is not the one that the pool was made
                for.
        """
        names, counted = requests_of(adapters, weights)
        if missing not in ("raise", "base") and not callable(missing):
            raise ValueError(f"AdapterPool: missing must be 'raise', 'base' or a function, found {missing!r}")
        given = None if rows is None else checked_rows(rows, len(names))
        absent: dict[str, str | None] = {}
        while True:
            wanted = list(dict.fromkeys(n for row in names for n in row))
            try:
                hold = self._taken(wanted)
                break
            except UnknownAdapterError as error:
                if missing == "raise" or error.name in absent:
                    raise
                absent[error.name] = other = missing(error.name) if callable(missing) else None
                if other is not None and not isinstance(other, str):
                    raise TypeError(
                        f"AdapterPool: missing gave {other!r} for {error.name!r}; it must give a name or None"
                    ) from None
                names, counted = renamed(names, counted, error.name, other)
        id_of_name = {name: resident.id for name, resident in zip(wanted, hold.residents, strict=True)}
        each = [[id_of_name[n] for n in row] for row in names]
        width = max(map(len, each), default=1) or 1
        rows_of_ids = [row + [BASE] * (width - len(row)) for row in each]
        # of few numbers numpy makes a tensor in half of torch's time
        ids = torch.from_numpy(np.array(rows_of_ids, dtype=np.int64).reshape(-1, width)).to(self._generation.device)
        of_ids = None
        if width > 1 or counted is not None:
            filled = [[1.0] * len(row) for row in each] if counted is None else counted
            padded = [row + [0.0] * (width - len(row)) for row in filled]
            of_ids = torch.tensor(padded).reshape(len(each), width).to(self.device)
        sets = {resident.modules for resident in hold.residents}
        modules = sets.pop() if len(sets) == 1 else frozenset[str]().union(*sets)
        uniform = each.count(each[0]) == len(each) if each else True
        uniform = uniform and (not counted or counted.count(counted[0]) == len(counted))
        slots = len(self._held.generations)
        gains = self if any(resident.magnitudes for resident in hold.residents) else None
        requests = Requests(len(each), ids, of_ids, slots, modules, uniform, given, gains)
        prepare()
        batch = Batch(self.scope, requests, partial(self._give_back, hold))
        if absent:
            batch.missing = frozenset(name for name, other in absent.items() if other is None)
        return batch

    def id_of(self, name: str) -> int:
        """The id of an adapter, for plans of one's own; brings it into a slot if it is on the
        host. It holds as long as the adapter is not evicted: pin it, or hold a batch.

        Raises:
            LookupError, PoolFullError: as `batch`.
        """
        hold = self._taken([name], looking=True)
        try:
            return hold.residents[0].id
        finally:
            self._give_back(hold)

    def __contains__(self, name: str) -> bool:
        with self._lock:
            self._held.settle()
            return name in self._held.names or name in self._held.host

    def __len__(self) -> int:
        """How many adapters are in slots under a name."""
        return len(self.names())

    def __repr__(self) -> str:
        with self._lock:
            now, pinned = self.stats(), sum(r.pinned for r in self._held.by_slot.values())
            return (
                f"AdapterPool({now.residents} adapters in {now.slots} slots, {pinned} pinned, {now.in_use} in use;"
                f" {self.bytes_in_use / MIB:.1f} of {self.capacity_bytes / MIB:.1f} MiB; {now.on_host} on the host,"
                f" {now.bytes_on_host / MIB:.1f} of {self.host_bytes / MIB:.1f} MiB)"
            )

    @property
    def bytes_in_use(self) -> int:
        """Of the tables and the pages that adapters have."""
        with self._lock:
            pages = sum(site.bytes_of_page * (self.size.pages - len(site.free)) for site in self.sites.values())
            return self.size.bytes_of_tables + pages

    def names(self) -> list[str]:
        """Those in slots, the one used last at the end."""
        with self._lock:
            self._held.settle()
            return [r.name for r in self._held.by_slot.values() if r.name is not None]

    def stats(self) -> PoolStats:
        with self._lock:
            self._held.settle()
            now, residents = PoolStats(**vars(self._stats)), self._held.by_slot.values()
            now.residents, now.in_use = len(residents), sum(bool(r.users) for r in residents)
            now.on_host, now.bytes_on_host = len(self._held.host), sum(s.adapter.nbytes for s in self._held.host.values())
            now.pages_free = min(len(site.free) for site in self.sites.values())
            return now
