"""Stages in processes of their own, because an access out of bounds leaves a process without its
GPU."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.gpu.record import NOT_RUN, Record

ROOT = Path(__file__).parents[2]
# seconds beyond a stage's time that its last check may take, and in the simulator
GRACE, SIMULATED = 15.0, 60.0
# the exit status of a process that lost its GPU: another one goes on behind the check that did it
GPU_LOST_STATUS = 3
MAX_RESTARTS = 8  # processes, at most, that go on


@dataclass(frozen=True)
class Work:
    """A stage as it is run: its name in the file, the module of bench.gpu that has it, which of its
    forms ("" is the usual)."""

    name: str
    module: str
    form: str = ""


def run_in_process(work: Work, setting: Any, found: Any) -> int:
    """The stage in this process; what escapes from it is a failure of it. The exit status."""
    from bench.gpu.setting import GpuLostError

    if found.process[1] == 1:
        print(f"{work.name}{': ' + work.form if work.form else ''}:", flush=True)
    module = import_module(f"bench.gpu.{work.module}")
    try:
        module.fill_caches(setting, found) if work.form == "warm" else module.run_stage(setting, found)
    except GpuLostError as error:
        print(f"    the GPU is lost: {error}", flush=True)
        return GPU_LOST_STATUS
    except Exception as error:
        found.fail(f"the stage ended with {type(error).__name__}: {error}")
    return 0


def run_in_processes(
    work: Work, record: Record, seconds: float, words: list[str], processes: int = 1,
    environment: Mapping[str, str | None] | None = None, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """The stage in `processes` that share its checks, each for `seconds`; `words` are the command's
    for all stages, and an `environment` of None takes a variable away. What dies or does not end
    has failed, and its checks go on in another."""
    began = clock()
    until = began + seconds
    variables = {name: value for name, value in (os.environ | dict(environment or {})).items() if value is not None}
    if work.module != "rows" and work.module != "speed":
        # torch refuses cuBLAS in its deterministic mode without it; it costs speed, which is
        # therefore not measured under it
        variables.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # its helpers would be at work beside what is timed
    variables.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if processes > 1:
        variables.setdefault("OMP_NUM_THREADS", "1")

    def start_process(i: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "bench.gpu", "--stage", work.name, "--module", work.module, "--form", work.form]
        command += ["--out", str(record.path.resolve()), "--until", str(until), "--process", f"{i}/{processes}", *words]
        return subprocess.Popen(command, cwd=ROOT, env=variables)

    ahead = work.form == "warm"  # it finds nothing: what fails there fails again where it counts
    grace = 0 if ahead else SIMULATED if "--dry-run" in words else GRACE
    lives = MAX_RESTARTS
    running = {i: start_process(i) for i in range(processes)}
    try:
        while running:
            for i, process in list(running.items()):
                status = process.poll()
                if status is None:
                    if clock() <= until + grace:
                        continue
                    process.kill()
                    process.wait()
                    if not ahead:
                        record.add_death(work.name, str(i), f"had no end {clock() - began:.0f} s after it began")
                        record.add_entry(work.name, NOT_RUN, "what stood behind it: time")
                    del running[i]
                    continue
                del running[i]
                if status and not ahead:
                    if status != GPU_LOST_STATUS:
                        record.add_death(work.name, str(i), f"ended with {status}")
                    # one that dies before its first check would do so again
                    if clock() < until and lives and record.tried_checks(work.name):
                        lives -= 1
                        running[i] = start_process(i)
                    else:
                        record.add_entry(work.name, NOT_RUN, f"what stood behind it: its process ended with {status}")
            time.sleep(0.02)
    finally:
        for process in running.values():
            process.kill()


def not_run(record: Record, name: str, why: str) -> None:
    record.add_entry(name, NOT_RUN, why)
    print(f"{name}: not run: {why}", flush=True)
