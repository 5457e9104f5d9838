"""Times several callables in turn, so that what disturbs one disturbs all."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch


def paired(calls: dict[str, Callable[[], Any]], rounds: int = 15, seconds: float = 3.0) -> dict[str, float]:
    """The median seconds of each call over interleaved rounds, at least 10, in alternating order."""
    for call in calls.values():
        call()
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    done = 0
    while done < 10 or (done < rounds and time.perf_counter() < end):
        for name in list(calls) if done % 2 else reversed(list(calls)):
            start = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - start)
        done += 1
    return {name: statistics.median(times) for name, times in taken.items()}


def stamp() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    from lora_kernels import _cpu

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "level": _cpu.level(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.strip(),
    }
