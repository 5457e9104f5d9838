"""NVIDIA's compute-sanitizer over all kernels; a machine without it says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu import cases
from bench.gpu.setting import Found, Setting

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")  # where CUDA installs it, often outside PATH
SECONDS = 1800
WRONG = 86  # the exit status that the sanitizer gives when it found something


def stage(setting: Setting) -> Found:
    found = Found()
    if setting.dry:
        found.skip("compute-sanitizer: needs a GPU; the simulator has such checks of its own, and ran what it would look at")
        cases.once(setting)
        return found
    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if program is None:
        found.skip("compute-sanitizer: not found")
        return found
    for tool in TOOLS:
        found.check(tool, lambda tool=tool: look(program, tool, setting, found))
    return found


def look(program: str, tool: str, setting: Setting, found: Found) -> None:
    """Raises with what the tool said if it found something."""
    script = [sys.executable, "-m", "bench.gpu", "--once", *(["--quick"] if setting.quick else [])]
    # each tensor in an allocation of its own: what lies beyond it is then out of bounds and not another tensor's
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    words = [program, "--tool", tool, "--error-exitcode", str(WRONG), *script]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=SECONDS, env=environment, cwd=root, errors="replace"
    )
    lines = (done.stdout + done.stderr).splitlines()
    said = [line for line in lines if line.startswith("=========")] or lines
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: " + "\n".join(said[:12] + ["…"] + said[-3:] + lines[-3:]))
    found.note(f"{tool}: {said[-1] if said else 'nothing said'}")
