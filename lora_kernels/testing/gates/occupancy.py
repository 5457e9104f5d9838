"""How many blocks a multiprocessor holds, by NVIDIA's own cuda_occupancy.h, which needs no GPU."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.testing.gates.sass import find_tool

_KIB = 1024
_SOURCE = """
#include "cuda_occupancy.h"

extern "C" int blocks(int major, int minor, int threads_sm, int shared_sm, int shared_block, int reserved, int registers,
                      int shared, int dynamic, int threads, int* limits) {
  cudaOccDeviceProp chip;
  chip.computeMajor = major;
  chip.computeMinor = minor;
  chip.maxThreadsPerBlock = 1024;
  chip.maxThreadsPerMultiprocessor = threads_sm;
  chip.regsPerBlock = chip.regsPerMultiprocessor = 65536;
  chip.warpSize = 32;
  chip.sharedMemPerBlock = 49152;
  chip.sharedMemPerMultiprocessor = shared_sm;
  chip.sharedMemPerBlockOptin = shared_block;
  chip.reservedSharedMemPerBlock = reserved;
  chip.numSms = 1;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = threads;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = shared;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = dynamic;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &chip, &kernel, &state, threads, dynamic)) return -1;
  *limits = result.limitingFactors;
  return result.activeBlocksPerMultiprocessor;
}
"""
_LIMITS = {1: "threads", 2: "registers", 4: "shared memory", 8: "blocks", 16: "barriers", 32: "resources"}


@dataclass(frozen=True)
class Chip:
    """Of a multiprocessor. Source: the CUDA C++ Programming Guide's table "Technical Specifications
    per Compute Capability", compared with libcu++'s cuda/__device/arch_traits.h; AMD:
    rocm.docs.amd.com/en/latest/reference/gpu-specs.html."""

    threads: int
    shared: int
    shared_block: int
    """What one block may have, by opting in."""
    warp: int = 32

    @property
    def warps(self) -> int:
        return self.threads // self.warp


CHIPS = {
    "sm_80": Chip(2048, 164 * _KIB, 163 * _KIB),
    "sm_86": Chip(1536, 100 * _KIB, 99 * _KIB),
    "sm_89": Chip(1536, 100 * _KIB, 99 * _KIB),
    "sm_90": Chip(2048, 228 * _KIB, 227 * _KIB),
    "sm_100": Chip(2048, 228 * _KIB, 227 * _KIB),
    "sm_120": Chip(1536, 100 * _KIB, 99 * _KIB),
    "gfx942": Chip(2048, 64 * _KIB, 64 * _KIB, 64),
}
_TENSOR_MEMORY = 512  # columns of sm_100's, shared by the blocks of a multiprocessor
_SIMDS = 4


def find_compiler() -> str | None:
    """The machine's C++ compiler."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


def find_header() -> Path | None:
    from lora_kernels.ptxsim.nvcc import find_nvcc

    nvcc = find_nvcc()
    near = nvcc.parent.parent / "include" / "cuda_occupancy.h" if nvcc else None
    return find_tool("cuda_occupancy.h", "include") or (near if near and near.is_file() else None)


def missing() -> str | None:
    """What is not here, in words."""
    if find_compiler() is None:
        return "no C++ compiler (CXX, c++, g++, clang++), which cuda_occupancy.h needs"
    return None if find_header() else "cuda_occupancy.h in none of the wheels triton and nvidia-cuda-nvcc, and CUDA_HOME"


def occupancy(arch: str, registers: int, shared: int, dynamic: int, threads: int, columns: int = 0) -> tuple[int, str]:
    """Blocks on a multiprocessor of an NVIDIA chip, and what limits them; 0 where the kernel cannot
    start.

    `shared` and `dynamic` are bytes of a block, `columns` those of tensor memory (sm_100), which
    the header does not know.

    Raises:
        FileNotFoundError: no C++ compiler or no header.
        ValueError: the header refuses these numbers.
    """
    chip, number = CHIPS[arch], int(arch[3:])
    limits = ctypes.c_int(0)
    held = _library()(
        number // 10, number % 10, chip.threads, chip.shared, chip.shared_block, chip.shared - chip.shared_block, registers,
        shared, dynamic, threads, ctypes.byref(limits),
    )  # fmt: skip
    if held < 0:
        raise ValueError(f"cuda_occupancy.h: {arch} with {registers} registers, {shared + dynamic} bytes, {threads} threads")
    names = [name for bit, name in _LIMITS.items() if limits.value & bit]
    if columns and _TENSOR_MEMORY // columns <= held:
        names = ["tensor memory"] + names * (_TENSOR_MEMORY // columns == held)
        held = _TENSOR_MEMORY // columns
    return held, ", ".join(names)


def occupancy_amd(arch: str, waves: int, shared: int, warps: int) -> tuple[int, str]:
    """Blocks on a compute unit: `waves` a SIMD that LLVM allows by registers, the block's bytes of
    LDS."""
    by = {"registers": waves * _SIMDS // warps, "shared memory": CHIPS[arch].shared // shared if shared else 10**6}
    least = min(by.values())
    return least, ", ".join(name for name, blocks in by.items() if blocks == least)


@functools.cache
def _library() -> Callable[..., int]:
    gone = missing()
    if gone:
        raise FileNotFoundError(gone)
    header, compiler = find_header(), find_compiler()
    assert header and compiler
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "occupancy.cpp", Path(folder) / "occupancy.so"
        source.write_text(_SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", f"-I{header.parent}", str(source), "-o", str(library)], check=True)
        found: Callable[..., int] = ctypes.CDLL(str(library)).blocks
    return found
