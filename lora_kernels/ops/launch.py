"""Where a kernel for GPUs runs: on the one that holds its tensors or, if that is asked for, in the
simulator."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.registry import not_built, refuses_device, simulates

try:
    from lora_kernels import _cuda

    _no_cuda = None
except ImportError as error:
    _cuda, _no_cuda = None, not_built("_cuda_build_error.txt", error)

CSRC = Path(__file__).parents[2] / "csrc"
LEAST_CAPABILITY = (8, 0)  # of the GPUs: tensor cores that know bfloat16, cp.async
KERNEL_SUFFIX = {torch.bfloat16: "bf16", torch.float16: "f16"}  # in the names of CUDA C++ kernels
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # there, as dtype


SWIZZLE = 128  # of a `Map`, in bytes


@dataclass(frozen=True)
class Map:
    """A field of a struct of CUDA C++ for a `TensorMap` of csrc/common/hopper.cuh: a matrix of 16
    bits with rows at multiples of 16 bytes, copied in boxes [rows, columns] of at most 256 by
    64."""

    tensor: Tensor
    box: tuple[int, int]


@dataclass(frozen=True)
class Launch:
    """One launch of a `@triton.jit` kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None
    early: bool = False

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def options(self) -> dict[str, Any]:
        """What Triton is asked for beside the arguments."""
        found: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        found |= {"launch_pdl": True} if self.early else {}
        return found | ({"maxnreg": self.registers} if self.registers and torch.version.hip is None else {})


_recorder: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside it kernels are not launched but noted: what an op would run, for these arguments."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def architecture(t: Tensor) -> int:
    """90 for sm_90 and so on: of the GPU that holds a tensor or, for one on the CPU, of that which
    is simulated. AMD's are none of them: 0."""
    if t.is_cuda:
        return _gpu_properties(t.device.index)[0]
    simulator = sys.modules.get("lora_kernels.ptxsim.device")
    simulated = simulator.current.get() if simulator else None
    return simulated.arch if simulated else 80


def multiprocessors(t: Tensor) -> int | None:
    """Of the GPU that holds a tensor; None where it is simulated."""
    return _gpu_properties(t.device.index)[1] if t.is_cuda else None


def gpu_name(t: Tensor) -> str | None:
    """The name of the GPU that holds a tensor; None where it is simulated."""
    return _gpu_properties(t.device.index)[2] if t.is_cuda else None


@lru_cache
def _gpu_properties(index: int) -> tuple[int, int, str]:
    major, minor = torch.cuda.get_device_capability(index)
    count = torch.cuda.get_device_properties(index).multi_processor_count
    return 0 if torch.version.hip is not None else 10 * major + minor, count, torch.cuda.get_device_name(index)


def tile_tickets(device: torch.device, count: int) -> Tensor:
    """Counters of programs that share a tile, all zero, int32 [count]; a kernel leaves them zero.

    Kept for each stream, on which launches follow each other. A CUDA graph, which may be replayed
    on any, gets its own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    place = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _tickets.get(place)
    if held is None or len(held) < count:
        held = _tickets[place] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return held[:count]


_tickets: dict[tuple[torch.device, int], Tensor] = {}
_assembled: set[tuple[int, int]] = set()  # kernels and GPUs whose ptxas is chosen


@refuses_device
def refuse_device(t: Tensor) -> str | None:
    """Why kernels for GPUs cannot run on a tensor, or None."""
    if simulates():
        return None if t.is_cpu else f"it is simulated on the CPU, and the tensors are on {t.device}"
    if not t.is_cuda:
        here = "the tensors are" if torch.cuda.is_available() else "torch finds no GPU here and the tensors are"
        return f"its kernels run on a GPU; {here} on {t.device}; use_backend(..., simulate=True) simulates one"
    capability = torch.cuda.get_device_capability(t.device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        return f"its kernels need compute capability 8.0, {torch.cuda.get_device_name(t.device)} has {capability}"
    return None


def launch_triton(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], makes: Sequence[Tensor], *, changes: Sequence[Tensor] = (),
    warps: int = 4, stages: int = 3, registers: int | None = None, early: bool = False,
) -> None:  # fmt: skip
    """Runs a `@triton.jit` kernel, which fills the tensors `makes`, may write those in `changes`,
    and changes no other.

    `args` has its parameters by name, those of `tl.constexpr` too. Nothing runs if the grid is
    empty. `early`: it may start before the launch before it has ended, and waits for that itself
    (from sm_90). `registers`: of a thread, at most; without a limit ptxas chooses a lower one, for
    more blocks on a multiprocessor, and may spill for it. AMD has no such option.
    """
    if 0 in grid:
        return
    one = Launch(kernel, grid, args, warps, stages, registers, early)
    if (recorder := _recorder.get()) is not None:
        recorder.append(one)
        return
    if simulates():
        # there where the simulator was built
        from lora_kernels.ptxsim.triton_ptx import simulate_triton

        simulate_triton(kernel, grid, args, [*makes, *changes], poisoned=makes, warps=warps, stages=stages, early=early)
        return
    device = (makes or changes)[0].device
    with torch.cuda.device(device):
        _choose_assembler(kernel, device.index)
        kernel[grid](**args, **one.options())


def compiled_on(one: Launch, device: torch.device) -> Any:
    """What Triton makes of a launch, loaded on a GPU and not run.

    Raises whatever Triton does where it does not compile, or wants more than the GPU has.
    """
    with torch.cuda.device(device):
        _choose_assembler(one.kernel, torch.cuda.current_device())
        made = one.kernel.warmup(**one.args, grid=one.grid, **one.options())
        made._init_handles()
    return made


def _choose_assembler(kernel: Any, index: int) -> None:
    if (id(kernel), index) not in _assembled:
        from lora_kernels.ops.triton_compiler import choose_assembler  # which imports this module

        choose_assembler(kernel, index, _gpu_properties(index)[0])
        _assembled.add((id(kernel), index))


def refuse_cuda(t: Tensor, source: str) -> str | None:
    """The same for a kernel of CUDA C++: of the module _cuda, or in the simulator of
    csrc/`source`."""
    if simulates():
        if not (CSRC / source).is_file():
            return f"csrc/{source} is not here; a checkout of the repository has it"
        return refuse_device(t)
    return refuse_device(t) or refuse_binary(architecture(t), source)


@lru_cache
def refuse_binary(arch: int, source: str = "") -> str | None:
    """Why the module _cuda has no code for a GPU, of one source if that is named."""
    if _no_cuda:
        return _no_cuda
    if own := re.search(r"_sm(\d+)a\.cu$", source):  # as in cmake/cuda.cmake
        has = int(own[1]) == arch and {own[1], f"{own[1]}a"} & {*_cuda.ARCHITECTURES.split()}
        return None if has else f"{source} is for sm_{own[1]}a alone, and {cuda_build()}"
    binaries, texts = ([int(each.rstrip("af")) for each in kind.split()] for kind in (_cuda.ARCHITECTURES, _cuda.PTX))
    if any(each // 10 == arch // 10 and each <= arch for each in binaries) or any(each <= arch for each in texts):
        return None
    return f"built for sm_{', sm_'.join(map(str, binaries))}, not for sm_{arch}; TORCH_CUDA_ARCH_LIST says for which GPUs"


def cuda_build() -> str:
    """Of the module _cuda: for which GPUs it was built, or why it is not there."""
    return _no_cuda or f"built for sm_{', sm_'.join(_cuda.ARCHITECTURES.split())}"


def launch_cuda(
    source: str, kernel: str, grid: tuple[int, ...], threads: int, args: dict[str, Any], makes: Sequence[Tensor], shared: int,
    *, changes: Sequence[Tensor] = (), early: bool = False,
) -> None:  # fmt: skip
    """Runs a kernel with C linkage of csrc/`source`, which fills the tensors `makes`, may write
    those in `changes`, and changes no other. `args` are the fields of its struct by name and in its
    order: a tensor or None for a pointer, int for 64 bits, float for 32, a `Map`. The simulator
    compares them with the source. `shared` is in bytes. Nothing runs if the grid is empty. `early`
    as in `launch_triton`.

    Raises:
        RuntimeError: CUDA refused the launch; the message has the kernel, the launch and the
            arguments.
    """
    if 0 in grid:
        return
    if simulates():
        from lora_kernels.ptxsim.cuda_structs import check_fields
        from lora_kernels.ptxsim.nvcc import simulate_cuda
        from lora_kernels.ptxsim.tensor_map import TensorMap

        check_fields(CSRC / source, kernel, tuple(args))
        fields = tuple(TensorMap(a.tensor, a.box, SWIZZLE) if isinstance(a, Map) else a for a in args.values())
        writes = [*makes, *changes]
        simulate_cuda(CSRC / source, kernel, grid, threads, [fields], writes, shared, poisoned=makes, early=early)
        return
    x, y, z = (*grid, 1, 1)[:3]
    device = (makes or changes)[0].device.index
    stream = torch.cuda.current_stream(device).cuda_stream
    try:
        fields = tuple([_map_fields(a) if isinstance(a, Map) else a for a in args.values()])
        early = early and _gpu_properties(device)[0] >= 90
        _cuda.launch(_cuda.kernels[kernel], x, y, z, threads, shared, early, device, stream, fields)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; arguments: {', '.join(map(_described, args, args.values()))}") from None


def _described(name: str, value: Any) -> str:
    value = value.tensor if isinstance(value, Map) else value
    return f"{name} {list(value.shape)} {str(value.dtype)[6:]}" if isinstance(value, Tensor) else f"{name} {value}"


def _map_fields(m: Map) -> tuple[Any, ...]:
    """What `_cuda.tensor_map` is told, its tensor first."""
    t = m.tensor
    rows, columns = t.shape
    return (t, t.dtype is torch.bfloat16, rows, columns, t.stride(0), *m.box)


def vector_fields(name: str, v: Tensor | None) -> dict[str, Any]:
    """The fields of a `Vector` of csrc/common/tiles.cuh: its data, and its dtype by number."""
    data, code = (None, 0) if v is None else (v.contiguous(), DTYPE_CODES[v.dtype])
    return {f"{name}.data": data, f"{name}.dtype": code}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 16, most: int = 64) -> int:
    """The smallest power of two that is at least n, between `least` and `most`."""
    return max(least, min(most, 1 << max(n - 1, 0).bit_length()))
