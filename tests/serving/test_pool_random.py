"""The pool under whatever order of calls, from two threads, and with ten thousand adapters."""

import random
import resource
import threading
from contextlib import suppress
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lora_kernels.adapters import AdapterError
from lora_kernels.serving import PoolFullError, serve
from tests.serving.faults import Fault, everything, same, with_fault_at
from tests.serving.pools import alone, net, pool_of, random_adapter, same_state, state


class Machine(RuleBasedStateMachine):
    """Loads, evictions, exchanges, updates and batches in any order, beside a base that changes,
    faults at any step and memory on the host, against a dictionary of what must come out."""

    names = st.sampled_from(["a", "b", "c", "d", "e"])
    adapters = st.builds(
        random_adapter, st.integers(0, 99), st.sampled_from([1, 8, 9, 17]),
        st.sampled_from([("0", "2"), ("0",), ("2",)]), st.booleans(),
    )  # fmt: skip

    @initialize(first=st.lists(adapters, min_size=2, max_size=2), host=st.sampled_from([0, 4000, 20_000]))
    def start(self, first, host):
        self.plain, self.model = net(), net()
        self.pool = pool_of(self.model, slots=3, pages=5, host_bytes=host)
        self.served = serve(self.model, self.pool)
        self.known, self.open = {}, []
        self.x = torch.randn(4, 24, generator=torch.Generator().manual_seed(3))
        for name, adapter in zip("ab", first, strict=True):
            self.load(name, adapter, False)

    def pick(self, data):
        """Mostly a name that there is."""
        return data.draw(st.sampled_from(sorted(self.known) * 3 + ["a", "f"]))

    def forget(self):
        """Who was evicted, and is not on the host; never somebody that an open batch holds."""
        held = {name for _, names, _ in self.open for name in names}
        for name in [name for name in self.known if name not in self.pool]:
            assert name not in held, "evicted while in use"
            del self.known[name]

    @rule(name=names, adapter=adapters, replace=st.booleans())
    def load(self, name, adapter, replace):
        try:
            self.pool.load(name, adapter, replace=replace)
        except PoolFullError:
            assert self.open
            return
        except ValueError:
            assert name in self.known and not replace
            return
        self.replaced(name, adapter)

    def replaced(self, name, adapter):
        self.known[name] = adapter
        for i, (batch, names, wanted) in enumerate(self.open):
            # the batch keeps the old one, which has no name
            self.open[i] = batch, [n for n in names if n != name], wanted
        self.forget()

    @rule(data=st.data(), adapter=adapters)
    def update(self, data, adapter):
        name = self.pick(data)
        before = self.pool.version_of(name) if name in self.known else 0
        try:
            version = self.pool.update(name, adapter)
        except LookupError:
            assert name not in self.known
        except PoolFullError:
            assert self.pool.version_of(name) == before
        else:
            assert version == self.pool.version_of(name) > before
            self.replaced(name, adapter)

    @rule(data=st.data(), adapter=adapters, step=st.integers(1, 500), kind=st.sampled_from(["load", "update"]))
    def fault(self, data, adapter, step, kind):
        """At any line of the pool's own code."""
        name = self.pick(data)
        if name not in self.known:
            return
        before, version = everything(self.pool), self.pool.version_of(name)
        change = self.pool.update if kind == "update" else partial(self.pool.load, replace=True)
        with suppress(PoolFullError):
            with_fault_at(step, lambda: change(name, adapter), Fault)
        if self.pool.version_of(name) != version:
            self.replaced(name, adapter)
        else:
            assert same(everything(self.pool), before)

    @rule(kind=st.sampled_from(["in place", "assigned", "exchanged"]), seed=st.integers(0, 99))
    def change_the_base(self, kind, seed):
        weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(seed)) * 0.3
        with torch.no_grad():
            self.plain[2].weight.copy_(weight)
            if kind == "in place":
                self.model[2].weight.copy_(weight)
            elif kind == "assigned":
                self.model.load_state_dict(self.model.state_dict() | {"2.weight": weight}, assign=True)
            else:
                self.model[2].weight.data = weight
        if self.open:
            self.pool.batch([None]).close()
            self.pool.refresh()

    @rule(data=st.data())
    def evict(self, data):
        name = self.pick(data)
        try:
            self.pool.evict(name)
        except LookupError:
            assert name not in self.known
            return
        del self.known[name]
        self.open = [(batch, [n for n in names if n != name], wanted) for batch, names, wanted in self.open]

    @rule(data=st.data(), count=st.integers(1, 4))
    def begin(self, data, count):
        rows, there = ([self.pick(data) for _ in range(count)] + [None] * 4)[:4], {*self.pool.names(), None}
        try:
            batch = self.pool.batch(rows)
        except LookupError:
            assert any(name not in self.known for name in rows if name)
            return
        except PoolFullError:
            assert not there.issuperset(rows)
            self.forget()
            return
        wanted = {name: self.known[name] for name in rows if name}
        self.open.append((batch, list(wanted), wanted))
        batch.rows = rows
        self.forget()

    @rule(which=st.integers(0, 9))
    def run(self, which):
        if self.open:
            batch, _, wanted = self.open.pop(which % len(self.open))
            with batch:
                y = self.served(self.x)
            for i, name in enumerate(batch.rows):
                expected = alone(self.plain, wanted[name] if name else None, self.x[i : i + 1])[0]
                torch.testing.assert_close(y[i], expected, rtol=1e-4, atol=1e-4)

    @rule(which=st.integers(0, 9))
    def drop(self, which):
        """Whoever loses a batch gives its adapters back."""
        if self.open:
            del self.open[which % len(self.open)]

    @rule()
    def fail(self):
        before = state(self.pool)
        with pytest.raises(AdapterError):
            self.pool.load("a", random_adapter(0, r=100), replace=True)
        assert same_state(before, state(self.pool))

    @invariant()
    def books_balance(self):
        if not hasattr(self, "pool"):
            return
        assert set(self.pool.names()) <= set(self.known) and all(name in self.pool for name in self.known)
        now = self.pool.stats()
        assert now.residents + len(self.pool._free) == 3
        assert now.in_use <= sum(len(wanted) for _, _, wanted in self.open) and bool(now.in_use) <= bool(self.open)
        for site in self.pool.sites.values():
            pages = sorted([*site.free, *site.shared, *(page for held in site.held.values() for page in held)])
            assert pages == list(range(5))
            used = {8 * held[j // 8] + j % 8 for slot, held in site.held.items() for j in range(int(site.slots.rank[slot]))}
            flags = site.slots.flags[list(site.held)]
            gains = set((flags[flags & 1 == 1] >> 2).tolist())
            assert len(gains) == int((flags & 1).sum()) and not gains & used
            for t, own in ((site.slots.a, used), (site.slots.b, used | gains)):
                assert not t[[row for row in range(40) if row not in own]].any()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_two_threads():
    """One loads, exchanges and evicts while the other runs batches; every row is what one adapter
    or none gives."""
    model = net()
    pool = pool_of(model, slots=4, pages=8)
    served = serve(model, pool)
    versions = {name: [random_adapter(10 * i + j) for j in range(2)] for i, name in enumerate("abc")}
    for name in versions:
        pool.load(name, versions[name][0])
    failures, done = [], threading.Event()

    def churn():
        draw = random.Random(0)
        while not done.is_set():
            name = draw.choice("abc")
            try:
                pool.load(name, versions[name][draw.randrange(2)], replace=True)
            except PoolFullError:
                pass
            except Exception as error:
                failures.append(error)

    x = torch.randn(3, 24)
    outcomes = {name: [alone(net(), v, x) for v in versions[name]] for name in versions}
    worker = threading.Thread(target=churn)
    worker.start()
    try:
        for i in range(150):
            rows = ["abc"[(i + j) % 3] for j in range(3)]
            try:
                y = served(x, adapters=rows)
            except LookupError:
                continue  # it was evicted to make room for another
            for j, name in enumerate(rows):
                assert any(torch.allclose(y[j], each[j], rtol=1e-4, atol=1e-4) for each in outcomes[name])
    finally:
        done.set()
        worker.join()
    assert not failures


def test_ten_thousand_adapters_through_64_slots():
    model = net()
    pool = pool_of(model, slots=64, pages=64, host_bytes=random_adapter(0).nbytes * 4)
    adapters = [random_adapter(i) for i in range(16)]
    for i in range(200):
        pool.load(f"first {i}", adapters[i % 16])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = len(pool), pool.stats().on_host
    for i in range(10_000):
        pool.load(f"adapter {i}", adapters[i % 16])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 10  # KiB
    assert (len(pool), pool.stats().on_host) == held == (64, 4) and pool.stats().evictions == 10_136
