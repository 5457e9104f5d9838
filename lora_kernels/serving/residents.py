"""What a pool holds: its adapters in their slots and on the host, and its counts."""

import itertools
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_kernels.adapters.config import AdapterError
from lora_kernels.adapters.inject import first_names
from lora_kernels.ops.multi_lora.plan import id_of
from lora_kernels.serving.adapter import Adapter
from lora_kernels.serving.site import Pages, Prepared, Saved, pages_of


class PoolFullError(AdapterError):
    """There is no room that an adapter in use would not have to leave; nothing has changed."""


class UnknownAdapterError(LookupError):
    """No adapter has this name."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(eq=False)
class Resident:
    """An adapter in a slot."""

    name: str | None
    """None once its name stands for another, or for none."""
    slot: int
    id: int
    modules: frozenset[str]
    """Those that it changes."""
    magnitudes: Mapping[str, tuple[Tensor, float]]
    """m and s of the modules with DoRA."""
    pinned: bool
    version: int
    users: set[int] = field(default_factory=set)
    """The numbers of the holds on it."""


@dataclass(frozen=True, eq=False)
class Stored:
    """An adapter on the host."""

    adapter: Adapter
    version: int


@dataclass
class PoolStats:
    """What a pool did so far, and what it holds; bytes."""

    loads: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    updates: int = 0
    failures: int = 0
    residents: int = 0
    slots: int = 0
    in_use: int = 0
    on_host: int = 0
    bytes_on_host: int = 0
    pages_free: int = field(default=0)
    """Of the module that has the fewest."""


class Hold:
    """What a batch holds until it ends. One that is dropped, or was interrupted, gives it back when
    the pool is called next."""

    _numbers = itertools.count()
    residents: list[Resident] = []

    def __init__(self, dropped: "deque[Hold]") -> None:
        self.number, self._dropped = next(self._numbers), dropped
        self.residents = []

    def take(self, resident: Resident) -> None:
        self.residents.append(resident)
        resident.users.add(self.number)

    def __del__(self) -> None:
        if self.residents:
            # no lock: the collector may run in a thread that has it
            rest = Hold(self._dropped)
            rest.residents, rest.number, self.residents = self.residents, self.number, []
            self._dropped.append(rest)


@dataclass(frozen=True)
class Journal:
    """How everything was before a change."""

    sites: list[tuple[Pages, Saved]]
    slots: Collection[int]
    names: dict[str, Resident]
    by_slot: "OrderedDict[int, Resident]"
    free: list[int]
    generations: list[int]
    host: "OrderedDict[str, Stored]"
    titles: list[tuple[Resident, str | None, Any]]
    """Each resident's name, and what else of it a change may replace."""


class Residents:
    """Who is in which slot, and on the host. A change is whole or undone, whatever interrupts it:
    its first step is a journal, its last drops it, and `settle`, with which every call begins, goes
    back to a journal that is left. Its owner has the lock.
    """

    def __init__(self, sites: Mapping[str, Pages], tables: Collection[Tensor], slots: int, host_bytes: int) -> None:
        self.sites, self.host_bytes = sites, host_bytes
        self._tables = [table.view(slots, -1) for table in tables]
        """The generation of each slot, as often as the sites have it."""
        self.generations = [0] * slots
        self.free = list(range(slots))
        self.names: dict[str, Resident] = {}
        self.by_slot: OrderedDict[int, Resident] = OrderedDict()
        """The one used last at the end."""
        self.host: OrderedDict[str, Stored] = OrderedDict()
        self.dropped: deque[Hold] = deque()
        self._journal: Journal | None = None
        self._past: Journal | None = None

    def settle(self) -> None:
        """Undoes a change that was interrupted, and takes back what dropped batches held."""
        journal, self._past = self._journal, None
        if journal is not None:
            for site, saved in journal.sites:
                site.restore(saved)
            for slot in journal.slots:
                self._write_generation(slot, journal.generations[slot])
            for resident, name, rest in journal.titles:
                resident.name = name
                resident.modules, resident.magnitudes, resident.version = rest
            self.names, self.by_slot, self.free = dict(journal.names), OrderedDict(journal.by_slot), list(journal.free)
            self.generations, self.host = list(journal.generations), OrderedDict(journal.host)
            self._journal = None
        while self.dropped:
            hold = self.dropped.popleft()
            self.give_back(hold)

    def _begin(self, slots: Collection[int], modules: Iterable[str]) -> None:
        """All that a change may fail to undo later is saved here, before it."""
        sites = [self.sites[name] for name in modules]
        self._journal = Journal(
            [(site, site.save(slots)) for site in sites], slots, dict(self.names), OrderedDict(self.by_slot), list(self.free),
            list(self.generations), OrderedDict(self.host),
            [(r, r.name, (r.modules, r.magnitudes, r.version)) for r in self.by_slot.values()],
        )  # fmt: skip

    def _commit(self) -> None:
        # to free the journal takes longer than all that is left to do, so the next call does it
        self._past, self._journal = self._journal, None

    def place(self, name: str, source: Stored, prepared: Mapping[str, Prepared], pinned: bool, to_host: bool) -> int:
        """Puts an adapter into a slot under a name, and onto the host if `to_host`; how many
        others had to leave.

        Raises:
            PoolFullError: there is no room.
        """
        old = self.names.get(name)
        victims = self._victims(name, source.adapter, old)
        leaving = victims if old is None or old in victims or old.users else [*victims, old]
        touched = {*prepared, *(module for resident in leaving for module in resident.modules)}
        self._begin({*(r.slot for r in leaving), *self.free[-1:]}, touched)
        try:
            for resident in victims:
                self._release(resident)
            slot = self.free.pop()
            for module, each in prepared.items():
                self.sites[module].put(slot, each)
            adapter, number = source.adapter, id_of(self.generations[slot], slot)
            new = Resident(name, slot, number, self._set_of(prepared), adapter.magnitudes, pinned, source.version)
            self.names[name] = self.by_slot[slot] = new
            if old is not None:
                old.name = None
                if old in leaving and old not in victims:
                    self._release(old)
            if to_host:
                self._keep_on_host(name, source)
            self._commit()
        finally:
            if self._journal is not None:
                self.settle()
        return sum(resident is not old for resident in victims)

    def rewrite(self, resident: Resident, source: Stored, prepared: Mapping[str, Prepared]) -> None:
        """Other weights in the slot of an adapter that nobody uses; its id stays.

        Raises:
            PoolFullError: there are too few pages.
        """
        for module, f in source.adapter.factors.items():
            short = self.sites[module].short_of(f.r, f.vectors, [resident.slot])
            if short > 0:
                raise PoolFullError(f"AdapterPool: {module} has {short} pages too few for {resident.name!r}")
        modules = {*prepared, *resident.modules}
        self._begin([resident.slot], modules)
        try:
            for module in modules:
                site, wanted = self.sites[module], source.adapter.factors.get(module)
                if wanted is None or site.holding(resident.slot) != (pages_of(wanted.r), wanted.vectors):
                    site.clear_slot(resident.slot)
                if wanted is not None:
                    site.put(resident.slot, prepared[module])
            resident.modules, resident.magnitudes = self._set_of(prepared), source.adapter.magnitudes
            resident.version = source.version
            if resident.name is not None:
                self._keep_on_host(resident.name, source)
            self._commit()
        finally:
            if self._journal is not None:
                self.settle()

    def _set_of(self, modules: Iterable[str]) -> frozenset[str]:
        """One object for adapters that change the same, so that a batch need not compare them."""
        found = frozenset(modules)
        return next((r.modules for r in self.by_slot.values() if r.modules == found), found)

    def exchange_on_host(self, name: str, stored: Stored) -> None:
        """Other weights for an adapter that is on the host alone."""
        self._begin([], [])
        try:
            self._keep_on_host(name, stored)
            self._commit()
        finally:
            if self._journal is not None:
                self.settle()

    def forget(self, name: str) -> None:
        """Takes a name out of the slots and off the host; a slot in use is freed later."""
        resident = self.names.get(name)
        idle = resident is not None and not resident.users
        self._begin([resident.slot] if resident and idle else [], resident.modules if resident and idle else ())
        try:
            self.host.pop(name, None)
            if resident is not None:
                del self.names[name]
                resident.name = None
                if idle:
                    self._release(resident)
            self._commit()
        finally:
            if self._journal is not None:
                self.settle()

    def give_back(self, hold: Hold) -> None:
        """Ends a hold. An adapter whose name is gone leaves with its last user."""
        for resident in hold.residents:
            resident.users.discard(hold.number)
            if resident.name is None and not resident.users and self.by_slot.get(resident.slot) is resident:
                self._begin([resident.slot], resident.modules)
                try:
                    self._release(resident)
                    self._commit()
                finally:
                    if self._journal is not None:
                        self.settle()
        hold.residents = []

    def _victims(self, name: str, adapter: Adapter, old: Resident | None) -> list[Resident]:
        """Whom to evict so that there is a slot and pages enough: whose name is gone, whom the new
        one replaces, then the longest unused first."""
        victims: list[Resident] = []
        short = self._short_of(adapter, victims)
        if self.free and not short:
            return victims
        idle = [r for r in self.by_slot.values() if not r.users and (not r.pinned or r.name is None or r is old)]
        idle.sort(key=lambda r: r.name is not None and r is not old)
        for resident in idle:
            if not short and len(self.free) + len(victims):
                break
            victims.append(resident)
            short = self._short_of(adapter, victims)
        slots = 1 - len(self.free) - len(victims)
        if slots > 0 or short:
            what = "a slot" if slots > 0 else f"pages of {first_names(short)}"
            in_use = len(self.by_slot) - len(idle)
            raise PoolFullError(f"AdapterPool: no room for {name!r}: {what} wanted, and {in_use} adapters are in use or pinned")
        return victims

    def _short_of(self, adapter: Adapter, victims: list[Resident]) -> list[str]:
        """The modules that have too few pages for an adapter, once these have left."""
        without = {resident.slot for resident in victims}
        return [name for name, f in adapter.factors.items() if self.sites[name].short_of(f.r, f.vectors, without) > 0]

    def _release(self, resident: Resident) -> None:
        """Frees a slot; ids of it are stale from now on."""
        slot = resident.slot
        self.generations[slot] = (self.generations[slot] + 1) & 0x7FFFFFFF
        self._write_generation(slot, self.generations[slot])
        for module in resident.modules:
            self.sites[module].clear_slot(slot)
        del self.by_slot[slot]
        if resident.name is not None and self.names.get(resident.name) is resident:
            del self.names[resident.name]
        self.free.append(slot)

    def _write_generation(self, slot: int, number: int) -> None:
        for table in self._tables:
            table[slot] = number

    def _keep_on_host(self, name: str, stored: Stored) -> None:
        self.host.pop(name, None)
        if stored.adapter.nbytes > self.host_bytes:
            return
        self.host[name] = stored
        while sum(each.adapter.nbytes for each in self.host.values()) > self.host_bytes:
            self.host.popitem(last=False)
