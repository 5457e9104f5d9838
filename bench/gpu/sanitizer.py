"""NVIDIA's compute-sanitizer over all kernels, or in a timed run over a few; a machine without it
says so."""

import os
import shutil
import signal
import subprocess
import sys
import time

from bench.gpu import cases
from bench.gpu.running import ROOT
from bench.gpu.setting import Refused, Setting, StageFindings

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")  # where CUDA installs it, often outside PATH
SECONDS = 1800
ERROR_FOUND_STATUS = 86  # the exit status that the sanitizer gives when it found something


def program() -> str | None:
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def run_stage(setting: Setting, found: StageFindings) -> None:
    if setting.dry:
        found.skip("compute-sanitizer: needs a GPU; the simulator has such checks of its own, and ran what it would look at")
        cases.run_cases_once(setting, few=setting.timed)
        return
    path = program()
    if path is None:
        found.skip("compute-sanitizer: not found")
        return
    for tool in TOOLS[:1] if setting.timed else TOOLS:
        seconds = min(SECONDS, max(1.0, found.until - time.monotonic()))
        found.check(tool, lambda tool=tool, seconds=seconds: run_tool(path, tool, setting, found, seconds))


def run_tool(path: str, tool: str, setting: Setting, found: StageFindings, seconds: float) -> None:
    """Raises with what the tool said if it found something."""
    flags = {"--quick": setting.quick, "--timed": setting.timed}
    script = [sys.executable, "-m", "bench.gpu", "--once", *(flag for flag, wanted in flags.items() if wanted)]
    # each tensor in an allocation of its own: what lies beyond it is then out of bounds and not
    # another tensor's
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    words = [path, "--tool", tool, "--error-exitcode", str(ERROR_FOUND_STATUS), *script]
    try:
        done = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        said_, _ = done.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        os.killpg(done.pid, signal.SIGKILL)  # the Python under it, too, which would hold the GPU
        done.wait()
        raise Refused(f"no end within {seconds:.0f} s") from error
    lines = said_.splitlines()
    said = [line for line in lines if line.startswith("=========")] or lines
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: " + "\n".join(said[:12] + ["…"] + said[-3:] + lines[-3:]))
    found.note(f"{tool}: {said[-1] if said else 'nothing said'}")
