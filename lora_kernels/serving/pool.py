"""Adapters in a fixed amount of memory, ready for `multi_lora`: loaded, evicted, exchanged while
others run."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import AdapterError
from lora_kernels.adapters.inject import first_names, uncompiled_model
from lora_kernels.ops.multi_lora.plan import BASE, PAGE, id_of
from lora_kernels.serving.adapter import Adapter, adapter_of, read_adapter
from lora_kernels.serving.batch import Batch, Wanted, release_dropped, requests_of
from lora_kernels.serving.frame import Requests, checked_rows
from lora_kernels.serving.residents import PoolFullError, PoolStats, Resident
from lora_kernels.serving.scope import scope_of
from lora_kernels.serving.site import Prepared, pages_of, site_of
from lora_kernels.serving.size import MIB, PoolSize, layers_of, size_for, size_of


class AdapterPool:
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
    among them, and nn.Embedding (LoRA alone). If not given all nn.Linear, since the pages of an
    embedding have as many columns as it has entries.

    A load is all or nothing. The gain of DoRA is computed then, in one pass over the weight.
    Evicted is whoever was not used for longest and is not in use or pinned; what was in its pages
    is overwritten with zeros. All methods may be called from several threads; on a GPU all of it,
    the batches' kernels too, must be on one stream, which orders them.

    Raises:
        TypeError, ValueError: a module is neither, has a dtype that is not supported, or the
        capacity holds no page.
    """

    def __init__(
        self, model: nn.Module, *, capacity_bytes: int, slots: int = 64, max_rank: int = 512, host_bytes: int = 0,
        modules: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        self.model = uncompiled_model(model)
        layers = layers_of(self.model, modules)
        self.size = size_of(layers.values(), capacity_bytes, slots, max_rank)
        device = next(iter(layers.values())).weight.device
        self.max_rank, self.capacity_bytes, self.host_bytes = max_rank, capacity_bytes, host_bytes
        self._generation = torch.zeros(slots, dtype=torch.int32, device=device)
        self.sites = {name: site_of(layer, self._generation, self.size.pages, max_rank) for name, layer in layers.items()}
        self._generations = [0] * slots
        self._free = list(range(slots))
        self._names: dict[str, Resident] = {}
        # by slot, the one used last at the end
        self._residents: OrderedDict[int, Resident] = OrderedDict()
        self._host: OrderedDict[str, Adapter] = OrderedDict()
        self._stats = PoolStats(slots=slots)
        self._lock = threading.RLock()

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

    @property
    def device(self) -> torch.device:
        return self._generation.device

    def load(
        self, name: str, source: str | os.PathLike[str] | Adapter | tuple[Any, Mapping[str, Tensor]], *, replace: bool = False,
        pinned: bool = False,
    ) -> int:  # fmt: skip
        """Puts an adapter into a slot under a name, and returns its id. `source`: a directory in
        PEFT's format, an `Adapter`, or (LoraConfig, tensors by PEFT's names). With `replace` the
        name may be taken: batches that began keep what they have, later ones get the new one, and
        the old slot is freed when nobody uses it. A `pinned` adapter is not evicted.

        Raises:
            AdapterError: the adapter is damaged, does not fit the model, or has a rank over
                `max_rank` or more than the pool holds; nothing has changed.
            PoolFullError: everything in the way is in use or pinned; nothing has changed.
            ValueError: the name is taken.
        """
        try:
            adapter = self._read_adapter(source)
            with self._lock:
                if name in self._names and not replace:
                    raise ValueError(f"AdapterPool: {name!r} is loaded already; replace=True exchanges it")
                resident = self._place_adapter(name, adapter, pinned)
                self._stats.loads += 1
                self._keep_on_host(name, adapter)
                return resident.id
        except Exception:
            self._stats.failures += 1
            raise

    def update(self, name: str, source: str | os.PathLike[str] | Adapter | tuple[Any, Mapping[str, Tensor]]) -> None:
        """Writes other weights into the slot of an adapter, in place: its id stays, and a CUDA
        graph needs no second capture. For weights that come from a trainer. Ranks may change as far
        as there are pages.

        Raises:
            AdapterError, PoolFullError, LookupError: as `load` and `batch`; nothing has changed.
        """
        try:
            adapter = self._read_adapter(source)
            with self._lock:
                resident = self._resident(name)
                prepared = self._prepared(adapter)
                for site_name, f in adapter.factors.items():
                    short = self.sites[site_name].short_of(f.r, f.vectors, [resident.slot])
                    if short > 0:
                        raise PoolFullError(f"AdapterPool: {site_name} has {short} pages too few for {name!r}")
                for site_name, site in self.sites.items():
                    wanted = adapter.factors.get(site_name)
                    if wanted is None or site.holding(resident.slot) != (pages_of(wanted.r), wanted.vectors):
                        site.clear_slot(resident.slot)
                    if wanted is not None:
                        site.write_slot(resident.slot, prepared[site_name])
                resident.adapter = adapter
                self._keep_on_host(name, adapter)
                self._stats.updates += 1
        except Exception:
            self._stats.failures += 1
            raise

    def evict(self, name: str) -> None:
        """Forgets an adapter. Its slot is freed now, or when the last batch that uses it ends.

        Raises:
            LookupError: there is none of that name.
        """
        with self._lock:
            on_host = self._host.pop(name, None)
            if name not in self._names and on_host is not None:
                return
            resident = self._resident(name)
            del self._names[name]
            resident.name = None
            if not resident.users:
                self._release(resident)

    def prefetch(self, names: Iterable[str]) -> None:
        """Brings adapters from the host's memory into slots, as `batch` would when it wants them;
        copies from pinned memory run beside the host.

        Raises:
            LookupError, PoolFullError: as `batch`.
        """
        with self._lock:
            for name in names:
                self._activate(name)

    def batch(self, adapters: Sequence[Wanted], weights: Sequence[Any] | None = None, *, rows: Any = None) -> Batch:
        """A context in which the layers of `serve` use `adapters`: for each sequence (or token) a
        name, None for the base, or several names, whose `weights` are then given likewise (1 if
        not). `rows` says for each row of the layers' inputs the index of its request, or -1 for the
        base, where rows are not sequences. Adapters in it stay until it ends.

        Raises:
            LookupError: a name is not known; the others are not held.
            PoolFullError: the batch wants more adapters than there is room for.
        """
        names, counted = requests_of(adapters, weights)
        given = None if rows is None else checked_rows(rows, len(names))
        release_dropped()
        with self._lock:
            held: dict[str, Resident] = {}
            try:
                for name in dict.fromkeys(n for row in names for n in row):
                    held[name] = self._activate(name)
                    held[name].users += 1
            except Exception:
                self._let_go(list(held.values()))
                raise
        each = [[held[n].id for n in row] for row in names]
        width = max(map(len, each), default=1) or 1
        rows_of_ids = [row + [BASE] * (width - len(row)) for row in each]
        ids = torch.tensor(rows_of_ids, dtype=torch.int64) if each else torch.empty(0, 1, dtype=torch.int64)
        of_ids = None
        if width > 1 or counted is not None:
            filled = [[1.0] * len(row) for row in each] if counted is None else counted
            padded = [row + [0.0] * (width - len(row)) for row in filled]
            of_ids = torch.tensor(padded).reshape(len(each), width).to(self.device)
        let_go = lambda: self._let_go(list(held.values()))  # noqa: E731
        modules = frozenset(module for resident in held.values() for module in resident.adapter.factors)
        uniform = each.count(each[0]) == len(each) if each else True
        uniform = uniform and (not counted or counted.count(counted[0]) == len(counted))
        requests = Requests(len(each), ids.to(self.device), of_ids, len(self._generations), modules, uniform, given)
        return Batch(scope_of(self), requests, let_go, self._lock)

    def id_of(self, name: str) -> int:
        """The id of a resident adapter, for plans of one's own."""
        with self._lock:
            return self._resident(name).id

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._names or name in self._host

    def __len__(self) -> int:
        """How many adapters are in slots under a name."""
        return len(self._names)

    def __repr__(self) -> str:
        with self._lock:
            now, pinned = self.stats(), sum(r.pinned for r in self._residents.values())
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
            return [r.name for r in self._residents.values() if r.name is not None]

    def stats(self) -> PoolStats:
        with self._lock:
            now = PoolStats(**vars(self._stats))
            now.residents, now.in_use = len(self._residents), sum(r.users > 0 for r in self._residents.values())
            now.on_host, now.bytes_on_host = len(self._host), sum(a.nbytes for a in self._host.values())
            now.pages_free = min(len(site.free) for site in self.sites.values())
            return now

    def _read_adapter(self, source: Any) -> Adapter:
        if isinstance(source, Adapter):
            adapter = source
        elif isinstance(source, tuple):
            adapter = adapter_of(self.model, *source)
        else:
            adapter = read_adapter(self.model, source)
        foreign = sorted(adapter.factors.keys() - self.sites.keys())
        if foreign:
            raise AdapterError(f"AdapterPool: the adapter changes modules that the pool does not have: {first_names(foreign)}")
        for name, f in adapter.factors.items():
            n_out, n_in = self.sites[name].shape
            pages = self.size.pages - (f.vectors > 0)
            if f.a.shape != (f.r, n_in) or f.b.shape != (n_out, f.r):
                wanted, found = f"[r, {n_in}] and [{n_out}, r]", f"{list(f.a.shape)} and {list(f.b.shape)}"
                raise AdapterError(f"AdapterPool: {name}: a and b must be {wanted}, found {found}")
            if f.r > self.max_rank or pages_of(f.r) > pages:
                most = min(self.max_rank, PAGE * pages)
                raise AdapterError(f"AdapterPool: {name}: the rank may be {most}, found {f.r}")
            for what, t in (("a", f.a), ("b", f.b), ("magnitude", f.magnitude), ("bias", f.bias)):
                if t is not None and not bool(t.to(self.sites[name].weight.dtype).isfinite().all()):
                    kind = self.sites[name].weight.dtype
                    raise AdapterError(f"AdapterPool: {name}: {what} has values that are not finite as {kind}")
        return adapter

    def _prepared(self, adapter: Adapter) -> dict[str, Prepared]:
        prepared = {name: self.sites[name].prepared(f) for name, f in adapter.factors.items()}
        for name, each in prepared.items():
            if each.gain is not None and not bool(each.gain.isfinite().all()):
                raise AdapterError(f"AdapterPool: {name}: the gain of DoRA is not finite")
        return prepared

    def _place_adapter(self, name: str, adapter: Adapter, pinned: bool) -> Resident:
        """Everything that can fail comes before the first change."""
        prepared = self._prepared(adapter)
        for victim in self._victims(name, adapter):
            self._release(victim)
            self._stats.evictions += 1
        slot = self._free.pop()
        for site, each in prepared.items():
            self.sites[site].write_slot(slot, each)
        resident = Resident(name, slot, id_of(self._generations[slot], slot), adapter, pinned)
        old = self._names.get(name)
        self._names[name] = self._residents[slot] = resident
        if old is not None:
            old.name = None
            if not old.users:
                self._release(old)
        return resident

    def _victims(self, name: str, adapter: Adapter) -> list[Resident]:
        """Whom to evict so that there is a slot and pages enough, the longest unused first."""
        victims: list[Resident] = []
        short = self._short_of(adapter, victims)
        idle = [r for r in self._residents.values() if not r.users and not r.pinned]
        for resident in idle:
            if not short and len(self._free) + len(victims):
                break
            victims.append(resident)
            short = self._short_of(adapter, victims)
        slots = 1 - len(self._free) - len(victims)
        if slots > 0 or short:
            what = "a slot" if slots > 0 else f"pages of {first_names(short)}"
            in_use = len(self._residents) - len(idle)
            raise PoolFullError(f"AdapterPool: no room for {name!r}: {what} wanted, and {in_use} adapters are in use or pinned")
        return victims

    def _short_of(self, adapter: Adapter, victims: list[Resident]) -> list[str]:
        """The modules that have too few pages for an adapter, once these have left."""
        without = {resident.slot for resident in victims}
        return [name for name, f in adapter.factors.items() if self.sites[name].short_of(f.r, f.vectors, without) > 0]

    def _release(self, resident: Resident) -> None:
        """Frees a slot; ids of it are stale from now on."""
        slot = resident.slot
        self._generations[slot] = (self._generations[slot] + 1) & 0x7FFFFFFF
        self._generation[slot] = self._generations[slot]
        for site in self.sites.values():
            site.clear_slot(slot)
        del self._residents[slot]
        if resident.name is not None and self._names.get(resident.name) is resident:
            del self._names[resident.name]
        self._free.append(slot)

    def _let_go(self, residents: list[Resident]) -> None:
        with self._lock:
            for resident in residents:
                resident.users -= 1
                if not resident.users and resident.name is None:
                    self._release(resident)

    def _resident(self, name: str) -> Resident:
        if name not in self._names:
            raise LookupError(
                f"AdapterPool: no adapter is called {name!r}; there are {first_names(sorted(self._names)) or 'none'}"
            )
        return self._names[name]

    def _activate(self, name: str) -> Resident:
        """The adapter in a slot, brought there from the host's memory if it must be; it is the one
        used last now."""
        if name not in self._names and name in self._host:
            self._stats.misses += 1
            self._host.move_to_end(name)
            return self._place_adapter(name, self._host[name], False)
        resident = self._resident(name)
        self._stats.hits += 1
        self._residents.move_to_end(resident.slot)
        return resident

    def _keep_on_host(self, name: str, adapter: Adapter) -> None:
        self._host.pop(name, None)
        if adapter.nbytes > self.host_bytes:
            return
        self._host[name] = adapter.pinned() if self.device.type == "cuda" else adapter
        while sum(a.nbytes for a in self._host.values()) > self.host_bytes:
            self._host.popitem(last=False)
