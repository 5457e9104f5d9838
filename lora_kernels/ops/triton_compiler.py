"""Which loops Triton and the ptxas behind it compile soundly for sm_90 and sm_100: the one place
that knows.

There `wgmma` and `tcgen05` multiply tiles of 64 rows and more while a pipelined loop loads the
next. Three faults are public:

* wgmma whose first operand lies in registers (a cast, a mask or a gain between load and product):
  the registers are written before it has read them, by Triton before 3.8 and in loops of two
  products by later ones, and by ptxas before 13.3 whatever Triton (triton#9433).
* Tiles that `cp.async` copied are read without a `fence.proxy.async`, by Triton before 3.7.1
  (triton#9610, pytorch#181248); those that come through tensor maps need none.
* tcgen05: two products of one step on the same sums (triton#10821), as `dot_accumulate` makes of
  float32 operands.

None of them is in a loop without stages, and none in `mma.sync`, which Triton takes for fewer rows
or for two warps.
"""

import ctypes
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.launch import architecture

WGMMA, TCGEN05 = 9, 10  # the major versions of the architectures that have them
ROWS = 64  # of a tile, from which they are taken
WARPS = 2  # of a block, with which they are not
FENCED = (3, 7, 1)  # the first Triton that puts a fence after `cp.async`
SOUND = (13, 3)  # the first ptxas that leaves the registers of wgmma alone
DRIVER = 13000  # the first CUDA driver that loads what a ptxas of CUDA 13 makes

_H = torch.empty(0)  # float32
_turn = threading.RLock()


def sound_schedule(
    u: Tensor, vs: Sequence[Tensor | None], precision: str, rows: int, warps: int, stages: int, *, changed: bool = False,
    mapped: bool = False, narrow: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Warps and stages of a loop of products `dot_accumulate(u, v, …, precision)`, as wanted where
    that is sound; tiles of u have `rows` rows.

    `changed`: they are changed between load and product. `mapped`: all tiles come through tensor
    maps. `narrow`: two warps will do, so that products are mma.sync; else there is one stage.
    """
    major = architecture(u) // 10
    if major not in (WGMMA, TCGEN05) or precision == "ieee" or rows < ROWS or warps % 4:
        return warps, stages
    chained = precision.startswith("bf16x") or any(v is not None and v.dtype is not u.dtype for v in vs)
    # bfloat16 is multiplied as it is by both halves of a float32; anything else is split or widened
    # first
    registers = changed or (chained and u.dtype is not torch.bfloat16)
    if not (registers if major == WGMMA else chained) and (mapped or has_fences()):
        return warps, stages
    return (WARPS, stages) if narrow else (warps, 1)


def rank_stages(u: Tensor, precision: str, rows: int, warps: int) -> int | None:
    """Stages of a loop over ranks, whose products take float32 sums with B or A: none where that is
    faulty, else None, which stands for those of the launch."""
    return 1 if sound_schedule(u, [_H], precision, rows, warps, 2, changed=True)[1] == 1 else None


def has_fences() -> bool:
    """Whether this Triton puts a fence between `cp.async` and the product that reads what it
    copied."""
    return version() >= FENCED


@lru_cache
def version() -> tuple[int, ...]:
    """Of Triton: its first three numbers."""
    import triton

    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))


def assembler(arch: int) -> str:
    """The ptxas for our kernels: the one that Triton takes, which the user may have named
    (TRITON_PTXAS_PATH). On sm_90, where Triton's own is before SOUND, it is the later one that
    Triton carries for other GPUs, if that is not."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    usual = get_ptxas(arch)
    carried = Path(usual.path).parent == Path(knobs.__file__).parent / "backends" / "nvidia" / "bin"
    if arch // 10 != WGMMA or not carried or _version_numbers(usual) >= SOUND:
        return str(usual.path)
    try:
        later = knobs.nvidia.ptxas_blackwell
    except RuntimeError:  # not every distribution of Triton has it
        return str(usual.path)
    return str(later.path if _version_numbers(later) >= SOUND else usual.path)


def ptxas_release(arch: int) -> str:
    """The version of the ptxas that Triton takes for an architecture at this moment, as 12.9."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(arch).version)


@contextmanager
def assembling(arch: int) -> Iterator[None]:
    """Inside it Triton compiles with `assembler(arch)`, and looks for what it compiled with that
    one before."""
    from triton import knobs
    from triton.backends.nvidia import compiler

    with _turn:
        path = assembler(arch)
        if path == compiler.get_ptxas(arch).path:
            yield
            return
        try:
            with knobs.nvidia.scope():
                knobs.nvidia.ptxas = path
                _clear_ptxas_caches(compiler)
                yield
        finally:
            _clear_ptxas_caches(compiler)


def _clear_ptxas_caches(compiler: Any) -> None:
    """Drops what Triton remembers of its ptxas: the key of its cache, and the PTX that ptxas
    knows."""
    for remembered in (compiler.get_ptxas_version, compiler.get_features):
        remembered.cache_clear()


def choose_assembler(kernel: Any, device: int, arch: int) -> None:
    """Has a `@triton.jit` kernel of ours assembled by `assembler(arch)` when a launch compiles it,
    and leaves those of others alone. Once for each GPU, since Triton sets up a kernel anew for
    each. In Triton's interpreter a kernel is not compiled."""
    if not hasattr(kernel, "device_caches"):
        return
    own_compile = getattr(kernel, "compile", None)
    kernel.device_caches[device]  # sets kernel.compile
    if arch // 10 != WGMMA or driver_version() < DRIVER:
        kernel.compile = own_compile or kernel.compile  # of a GPU before this one, which may be prepared
        return
    own_compile = kernel.compile

    def compile_(*args: Any, **options: Any) -> Any:
        with assembling(arch):
            return own_compile(*args, **options)

    kernel.compile = compile_


@lru_cache
def driver_version() -> int:
    """The CUDA version of the driver, as 13000; 0 where there is none."""
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return 0
    return number.value


def _version_numbers(tool: Any) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")))
