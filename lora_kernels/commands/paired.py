"""Times several callables in turn, so that what disturbs one disturbs all."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

MIN_ROUNDS = 10  # rounds


def interleaved_medians(
    calls: dict[str, Callable[[], Any]], rounds: int = 31, seconds: float = 1.0, wait: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter, pick: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:  # fmt: skip
    """The median seconds of each call over interleaved rounds, at least MIN_ROUNDS; `wait` for a
    device that runs behind. On a busy machine `clock` may be time.process_time, and `pick` min.

    Each round has its own random order (the same in every run): what a call leaves behind, in the
    caches and in the allocator's free memory, must not always meet the same neighbour.
    """
    shuffled = random.Random(0)
    order = list(calls)
    for call in calls.values():
        call()
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    done = 0
    while done < MIN_ROUNDS or (done < rounds and time.perf_counter() < end):
        shuffled.shuffle(order)
        for name in order:
            wait()
            start = clock()
            calls[name]()
            wait()
            taken[name].append(clock() - start)
        done += 1
    return {name: pick(times) for name, times in taken.items()}
