"""What the figures hold for."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.gpu.ready import assembler
from bench.gpu.setting import Setting, StageFindings
from lora_kernels.ops.launch import cuda_build

ROOT = Path(__file__).parents[2]
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "memory.total")


def program_output(*words: str) -> str:
    """What a program prints; nothing if it is not there."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def gpu_stamp(setting: Setting) -> dict[str, Any]:
    """The GPU, the versions and the commit."""
    changed = program_output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    found: dict[str, Any] = {"gpu": f"none: sm_{setting.arch} simulated" if setting.dry else torch.cuda.get_device_name()}
    if not setting.dry:
        has = torch.cuda.get_device_properties(0)
        found |= {
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "multiprocessors": has.multi_processor_count,
            "memory": has.total_memory,
        }
        # nvidia-smi counts all GPUs of the machine, torch only those that CUDA_VISIBLE_DEVICES
        # leaves it
        number = f"GPU-{has.uuid}" if hasattr(has, "uuid") else "0"
        # one by one: a driver that does not know one of them refuses the whole question
        for name in SMI_FIELDS:
            answer = program_output("nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader", f"--id={number}")
            found[name] = answer if answer and "not" not in answer.lower() and "error" not in answer.lower() else None
    return found | {
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "peft": installed("peft"),
        "assembler": assembler(),
        "cuda_cpp": cuda_build(),
        "python": platform.python_version(),
        "commit": program_output("git", "rev-parse", "--short", "HEAD") or None,
        "uncommitted_changes": bool(changed),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "date": datetime.date.today().isoformat(),
    }


def run_stage(setting: Setting, found: StageFindings) -> None:
    """The stamp, printed; it fails where something is missing that the other stages need."""
    for name, value in gpu_stamp(setting).items():
        found.note(f"{name}: {value}")
    for name in ("triton", "peft", "matplotlib"):
        found.check(name, lambda name=name: import_package(name))


def import_package(name: str) -> None:
    __import__(name)  # an ImportError says what is wrong
