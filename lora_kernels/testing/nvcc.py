"""CUDA C++ to PTX without a GPU, by nvcc from its wheel, from CUDA_HOME or from PATH."""

import functools
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path


def find_nvcc() -> Path | None:
    """The wheel's first, since its version is pinned; None where there is no nvcc."""
    found = importlib.util.find_spec("nvidia")
    homes = [Path(place) / "cu13" for place in (found.submodule_search_locations or [] if found else [])]
    if os.environ.get("CUDA_HOME"):
        homes.append(Path(os.environ["CUDA_HOME"]))
    for home in homes:
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    return Path(on_path) if on_path else None


@functools.cache
def compile_ptx(source: Path, arch: str = "sm_80", *options: str) -> str:
    """The PTX that nvcc -O3 makes of a file.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: it refused the file; the message is its own.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is in none of the wheel nvidia-cuda-nvcc, CUDA_HOME and PATH")
    command = [str(nvcc), "-ptx", f"-arch={arch}", "-O3", "-std=c++17", *options, str(source), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc: {source.name}: {done.stderr.strip()}")
    return done.stdout
