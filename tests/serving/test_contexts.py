"""A call belongs to the batch it began in, by generator, context, thread, task or executor; what
cannot be bound raises."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_kernels.serving import unserve
from tests.integrations.fuse_helpers import llama
from tests.serving.merged import serve_two
from tests.serving.pools import net
from tests.serving.served import tokens

X = torch.randn(1, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def served():
    model = net()
    pool, models = serve_two(model)
    wanted = {name: each(X.double()) for name, each in models.items()}

    def who():
        y = model(X).double()
        return min(wanted, key=lambda name: float((y - wanted[name]).abs().max()))

    return model, pool, who


def stream(pool, who, name, steps=3):
    with pool.batch([name]):
        for _ in range(steps):
            yield who()


@contextlib.contextmanager
def serving(pool, name):
    with pool.batch([name]):
        yield


def by_manager(pool, who, name):
    with serving(pool, name):
        yield who()
        yield who()


def test_generators(served):
    """Each step of a generator is in its batch, and nothing between two steps is."""
    _, pool, who = served
    for kind in (stream, by_manager):
        a, b = kind(pool, who, "a"), kind(pool, who, "b")
        seen = [(next(a), who(), next(b), who()) for _ in range(2)]
        assert seen == [("a", None, "b", None)] * 2
        with pool.batch(["b"]):
            assert (who(), next(kind(pool, who, "a")), who()) == ("b", "a", "b")
        a.close()
        del b
    assert pool.stats().in_use == 0


def test_generators_in_other_contexts(served):
    """As a server runs each step of a response in a thread of its pool."""
    _, pool, who = served
    a, found = stream(pool, who, "a"), []
    for _ in range(3):
        found.append(contextvars.Context().run(next, a))
        thread = threading.Thread(target=lambda: found.append(who()))
        thread.start()
        thread.join()
    assert found == ["a", None] * 3
    assert contextvars.Context().run(lambda: list(a)) == [] and pool.stats().in_use == 0


def test_generators_within_each_other(served):
    _, pool, who = served

    def outer():
        with pool.batch(["a"]):
            yield who()
            yield from stream(pool, who, "b", 1)
            with serving(pool, "b"):
                yield who()
            with pool.batch(["b"]) as batch, batch:
                yield who()
            with ThreadPoolExecutor(1) as executor:
                yield executor.submit(who).result()
            yield who()

    assert list(outer()) == ["a", "b", "b", "b", "a", "a"] and who() is None


def test_what_contextlib_enters_its_user_holds(served):
    _, pool, who = served
    with serving(pool, "a"):
        assert who() == "a"
    with contextlib.ExitStack() as stack:
        stack.enter_context(pool.batch(["b"]))
        assert who() == "b"
    assert who() is None and pool.stats().in_use == 0


def test_threads_and_executors(served):
    """Those that begin inside are of the batch, also tasks of a worker from before."""
    _, pool, who = served
    worker, found = ThreadPoolExecutor(1), []
    assert worker.submit(who).result() is None
    with pool.batch(["a"]):
        thread = threading.Thread(target=lambda: found.append(who()))
        thread.start()
        thread.join()
        with ThreadPoolExecutor(1) as executor:
            found += [executor.submit(who).result(), worker.submit(who).result()]
    with pool.batch(["b"]):
        found.append(worker.submit(who).result())
    assert found == ["a", "a", "a", "b"] and worker.submit(who).result() is None
    threading.Thread(target=who).start()
    assert threading.Thread.start.__module__ == "threading" and "concurrent" in ThreadPoolExecutor.submit.__module__


def test_a_thread_that_outlives_its_batch(served):
    _, pool, who = served
    ended, found = threading.Event(), []

    def late():
        ended.wait()
        with pytest.raises(RuntimeError, match=r"Batch: it has ended.*\(a thread or task that began inside it goes on\?\)"):
            who()
        found.append(True)

    with pool.batch(["a"]):
        thread = threading.Thread(target=late)
        thread.start()
    ended.set()
    thread.join()
    assert found


def test_a_thread_from_before(served):
    """It is nobody's: it may want the base, or have lost its way."""
    model, pool, who = served
    opened, found = threading.Event(), []

    def run():
        opened.wait()
        for call in (who, lambda: model[0](X)):
            with pytest.raises(RuntimeError, match=r"while a pool.batch is open in another thread; say adapters=\[None, ...\]"):
                call()
        found.append(model(X, adapters=[None]))

    thread = threading.Thread(target=run)
    thread.start()
    with pool.batch(["a"]):
        opened.set()
        thread.join()
        with pytest.raises(RuntimeError, match="open around it, in another context"):
            contextvars.Context().run(who)
    assert found[0].equal(model(X))


def test_bindings_of_a_call_are_its_own(served):
    """Beside model(x, adapters=...) in one thread others compute the base."""
    model, pool, who = served
    inside, done = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        done.wait()

    handle = model[1].register_forward_hook(lambda *args: wait() if threading.current_thread() is thread else None)
    thread = threading.Thread(target=lambda: model(X, adapters=["a"]))
    thread.start()
    inside.wait()
    assert who() is None
    done.set()
    thread.join()
    handle.remove()
    assert pool.stats().in_use == 0


def test_asyncio(served):
    """Tasks and their threads, executors and generators."""
    _, pool, who = served

    async def steps(name):
        with pool.batch([name]):
            for _ in range(2):
                await asyncio.sleep(0)
                yield who(), await asyncio.to_thread(who)

    async def task(name):
        with pool.batch([name]):
            loop = asyncio.get_running_loop()
            found = [who(), await asyncio.to_thread(who), await loop.run_in_executor(None, who)]
            await asyncio.sleep(0)
            return [*found, *await asyncio.gather(asyncio.create_task(later()), later())]

    async def later():
        await asyncio.sleep(0)
        return who()

    async def main():
        a, b = steps("a"), steps("b")
        seen = [(await anext(a), who(), await anext(b), who()) for _ in range(2)]
        assert seen == [(("a", "a"), None, ("b", "b"), None)] * 2
        # a task that begins here is of the consumer or of a generator: nobody knows
        with pytest.raises(RuntimeError, match="while a pool.batch is open in a generator"):
            await asyncio.create_task(later())
        await a.aclose()
        await b.aclose()
        return await asyncio.gather(*map(task, "abab"))

    assert asyncio.run(main()) == [[name] * 5 for name in "abab"]
    assert pool.stats().in_use == 0 and who() is None


def test_what_is_dropped_is_released(served):
    """Without an end, in its thread or another."""
    _, pool, who = served
    batch = pool.batch(["a"])
    assert pool.stats().in_use == 1
    del batch
    assert pool.stats().in_use == 0
    a = stream(pool, who, "a")
    next(a)
    del a
    assert pool.stats().in_use == 0

    def leave():
        batch = pool.batch(["a"])
        batch.__enter__()
        assert who() == "a"

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    gc.collect()
    assert pool.stats().in_use == 0 and who() is None


def test_other_ways_in():
    """What would take `adapters` and ignore them refuses."""
    model = llama().eval()
    pool, models = serve_two(model)
    x = tokens(2, 5)
    for call in (
        lambda: model.model(input_ids=x, adapters=["a", "b"]),
        lambda: type(model).forward(model, input_ids=x, adapters=["a", "b"]),
        lambda: model.model.layers[0](torch.randn(2, 5, 32), adapters=["a", "b"]),
    ):
        with pytest.raises(TypeError, match="adapters: Llama.* is a part of a served model"):
            call()
    with pytest.raises(NotImplementedError, match="continuous batching packs tokens of many requests"):
        model.generate_batch([[1, 2], [3]], adapters=["a", "b"])
    with pool.batch(["a", "b"]):
        with pytest.raises(NotImplementedError, match="continuous batching packs tokens of many requests"):
            model.generate_batch([[1, 2], [3]])
        torch.testing.assert_close(model.model(x)[0][:1].double(), models["a"].model(x[:1])[0], rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        unserve(each)
        assert not [name for m in each.modules() for name, value in vars(m).items() if callable(value) and "forward" in name]
