"""A measurement as plain values, and its circumstances. `interleaved_medians` is that of `python -m
lora_kernels bench`."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.commands.paired import interleaved_medians

__all__ = ["interleaved_medians", "machine_stamp", "measurement_row", "write_measured"]


def measurement_row(
    op: str, kind: str, dtype: torch.dtype, shape: dict[str, int], seconds: dict[str, float], **more: Any
) -> dict[str, Any]:
    """One measurement as plain values: what, shape, threads, seconds of each contender, ratios of
    ours to them."""
    ratios = {f"ours / {name}": seconds["ours"] / seconds[name] for name in seconds if name != "ours"}
    if "linear" in seconds:
        ratios |= {f"{name} / linear": seconds[name] / seconds["linear"] for name in seconds if name not in ("ours", "linear")}
    name = str(dtype).removeprefix("torch.")
    return {
        "op": op, "kind": kind, "dtype": name, **shape, "threads": torch.get_num_threads(), **more,
        "seconds": seconds, "ratios": ratios,
    }  # fmt: skip


def machine_stamp() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    from lora_kernels import _cpu

    def git_output(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = git_output("status", "--porcelain", ":!bench/results")
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
        "commit": git_output("rev-parse", "--short", "HEAD") + (" and uncommitted changes" if changed else ""),
    }


def write_measured(file: Path, stamp: dict[str, Any], rows: Sequence[Any], **more: Any) -> None:
    """Measurements with their circumstances, as JSON."""
    file.write_text(json.dumps({"stamp": stamp, "rows": rows, **more}, indent=1) + "\n", encoding="utf-8")
