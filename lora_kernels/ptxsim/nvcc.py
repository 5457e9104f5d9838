"""CUDA C++ to PTX and binaries without a GPU, by nvcc from its wheel, from CUDA_HOME or from
PATH."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_kernels.ptxsim import Kernel, Run
from lora_kernels.ptxsim.device import current

MISSING = "nvcc is in none of the wheel nvidia-cuda-nvcc, CUDA_HOME and PATH"
OPTIONS = ("-O3", "-std=c++17")


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


def source_architecture(arch: str) -> str:
    """The architecture that the sources see for a chip: 80 or 90, as in cmake/cuda.cmake; of a name
    with a letter, its own."""
    number = arch.removeprefix("sm_")
    return number if number[-1].isalpha() else "90" if int(number) >= 90 else "80"


def own(source: Path) -> str | None:
    """The one architecture that a file is for, as in cmake/cuda.cmake: sm_90a of
    cuda_x_sm90a.cu."""
    found = re.search(r"_sm(\d+a)$", source.stem)
    return f"sm_{found[1]}" if found else None


@functools.cache
def compile_ptx(source: Path, arch: str = "sm_80", *options: str) -> str:
    """The PTX that nvcc -O3 makes of a file.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: it refused the file; the message is its own.
    """
    return _compile(source, "-ptx", f"-arch={arch}", *options).decode()


@functools.cache
def compile_cubin(source: Path, arch: str = "sm_80", *options: str) -> bytes:
    """The binary for one chip, such as sm_120, that nvcc -O3 makes of a file, as in the module that
    is shipped: see `front`.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: it refused the file; the message is its own.
    """
    arch = own(source) or arch
    return _compile(source, "-cubin", "-gencode", f"arch=compute_{source_architecture(arch)},code={arch}", *options)


def simulate_cuda(
    source: Path, kernel: str, grid: Sequence[int], threads: int, args: Sequence[Any], writes: Sequence[Tensor], shared: int,
    *, poisoned: Sequence[Tensor] | None = None, early: bool = False,
) -> Run:  # fmt: skip
    """Runs a kernel of a file on CPU tensors; `writes` are those it changes, of which it fills
    `poisoned`, or else all. For the architecture of `ptxsim.device`, else sm_80. `early` as for
    `ptxsim.Kernel.launch`.

    Raises:
        FileNotFoundError: there is no nvcc.
    """
    sim = current.get()
    arch = own(source) or f"sm_{source_architecture(f'sm_{sim.arch}' if sim else 'sm_80')}"
    runs = _cached_kernel(compile_ptx(source, arch), kernel)
    return runs.launch(grid, (threads,), args, writes, writes if poisoned is None else poisoned, shared, early=early)


@functools.cache
def _cached_kernel(ptx: str, entry: str) -> Kernel:
    return Kernel(ptx, entry)


@functools.cache
def version() -> str:
    """Of nvcc, such as 13.0.88; "" where there is none."""
    nvcc = find_nvcc()
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout if nvcc else ""
    found = re.search(r"V(\d+[.\d]+)", said)
    return found[1] if found else ""


def _compile(source: Path, *options: str) -> bytes:
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError(MISSING)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        command = [str(nvcc), *OPTIONS, *options, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc: {source.name}: {done.stderr.strip()}")
        return made.read_bytes()
