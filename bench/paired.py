"""Times several callables in turn, so that what disturbs one disturbs all."""

import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

LEAST = 10  # rounds


def paired(calls: dict[str, Callable[[], Any]], rounds: int = 31, seconds: float = 1.0) -> dict[str, float]:
    """The median seconds of each call over interleaved rounds, at least LEAST of them.

    Each round has its own random order (the same in every run): what a call leaves behind, in the caches and in the
    allocator's free memory, must not always meet the same neighbour.
    """
    shuffled = random.Random(0)
    order = list(calls)
    for call in calls.values():
        call()
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    done = 0
    while done < LEAST or (done < rounds and time.perf_counter() < end):
        shuffled.shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - start)
        done += 1
    return {name: statistics.median(times) for name, times in taken.items()}


def row(
    op: str, kind: str, dtype: torch.dtype, shape: dict[str, int], seconds: dict[str, float], **more: Any
) -> dict[str, Any]:
    """One measurement as plain values: what, shape, threads, seconds of each contender, ratios of ours to them."""
    ratios = {f"ours / {name}": seconds["ours"] / seconds[name] for name in seconds if name != "ours"}
    if "linear" in seconds:
        ratios |= {f"{name} / linear": seconds[name] / seconds["linear"] for name in seconds if name not in ("ours", "linear")}
    name = str(dtype).removeprefix("torch.")
    return {
        "op": op, "kind": kind, "dtype": name, **shape, "threads": torch.get_num_threads(), **more,
        "seconds": seconds, "ratios": ratios,
    }  # fmt: skip


def stamp() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    from lora_kernels import _cpu

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", ":!bench/results")
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = [line.split(":", 1) for line in file if ":" in line]
    found = {key.strip(): value.strip() for key, value in lines}
    native = sorted(set(found.get("flags", "").split()) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    return {
        "processor": found.get("model name", platform.processor()),
        "instructions": native,
        "cores": os.cpu_count(),
        "level": _cpu.level(),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "torch": torch.__version__,
        "peft": __import__("peft").__version__,
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + (" and uncommitted changes" if changed else ""),
    }
