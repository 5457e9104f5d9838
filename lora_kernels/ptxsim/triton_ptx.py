"""Triton kernels to PTX without a GPU."""

import functools
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ptxsim import Kernel, Run, TensorMap
from lora_kernels.ptxsim.device import current

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
_lock = threading.Lock()  # Triton's compiler is not for several threads


@dataclass(frozen=True)
class Compiled:
    """What Triton made of a kernel for one architecture."""

    ptx: str
    """Empty for AMD's chips."""
    shared: int
    """Dynamic shared memory in bytes."""
    warps: int
    """Of a block, those that Triton adds to specialise them included."""
    arguments: tuple[tuple[Any, ...], ...]
    """The parameters that are left at run time: ("x",), or ("layers", 1, 0) for one in a tuple."""
    scratch: int = 0
    """Bytes of global memory that each block needs beside its arguments, for the maps of
    tensors."""
    maps: tuple[Any, ...] = ()
    """What Triton says of each tensor descriptor among the arguments; nothing where they are not
    maps."""
    cubin: bytes = b""
    amdgcn: str = ""
    columns: int = 0
    """Of tensor memory, on sm_100."""

    def launch_arguments(self, args: dict[str, Any], kernel: Kernel, scratch: Any = 0) -> list[Any]:
        """The arguments of a launch; Triton adds pointers to scratch memory, which are null where
        there is none."""
        values: list[Any] = []
        maps = iter(self.maps)
        for path in self.arguments:
            value: Any = functools.reduce(getitem, path, args)
            values += _expanded(value, next(maps, None)) if _is_descriptor(value) else [value]
        rest = len(kernel.parameters) - len(values)
        return values + [scratch, 0][:rest]


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """An argument changed; of a tuple, which may be a named one, each of its members."""
    if not isinstance(value, tuple):
        return change(value)
    members = [map_leaves(each, change) for each in value]
    return type(value)(*members) if hasattr(value, "_fields") else tuple(members)


def _is_descriptor(value: Any) -> bool:
    return hasattr(value, "block_shape") and hasattr(value, "base")


def _expanded(descriptor: Any, form: Any) -> list[Any]:
    """The parameters that stand for a `TensorDescriptor`, as Triton's launcher passes them."""
    shape, strides = list(descriptor.shape), list(descriptor.strides)
    if form is None:
        return [descriptor.base, *shape, *strides, descriptor.padding == "nan", descriptor.round_f32_to_tf32, *shape, *strides]
    tensor = descriptor.base.as_strided(shape, strides)
    return [TensorMap(tensor, form["block_size"], (0, 32, 64, 128)[form["swizzle"]]), *shape, *strides]


def compile_triton(
    function: Any, args: dict[str, Any], arch: int | str = 80, warps: int = 4, stages: int = 3, registers: int | None = None
) -> Compiled:
    """Compiles a `@triton.jit` function for these arguments, as a launch with them would.

    Tensors and numbers are arguments at run time, whose divisibility by 16 is known to the compiler
    as in a launch. The number 1, None and what is annotated `tl.constexpr` are constants. Of
    parameters in `do_not_specialize` only the type is known. A tuple, of tuples too, is so many
    arguments. `arch` is 80 for sm_80 and so on, or "gfx942", where `registers` says nothing.
    """
    names = [parameter.name for parameter in function.params]
    if missing := [name for name in names if name not in args]:
        raise TypeError(f"{function.__name__}: no argument for {', '.join(missing)}")
    constants, signature, divisible = [], [], []
    for position, parameter in enumerate(function.params):
        given = args[parameter.name]
        # Triton specialises what is in a tuple in any case
        special = isinstance(given, tuple) or not parameter.do_not_specialize
        type_of = partial(_argument_type, constant=parameter.is_constexpr, special=special)
        for path, value in _leaves(given, (position,)):
            kind = type_of(value)
            # with its type, for 0 and False are equal and one kernel is not the other
            constants += [(path, type(value).__name__, value)] if kind == "constexpr" else []
            divisible += [path] if kind != "constexpr" and _is_divisible(value, special) else []
        signature.append((parameter.name, map_leaves(given, type_of)))
    with _lock:
        return _compiled(function, tuple(signature), tuple(constants), tuple(divisible), arch, warps, stages, registers)


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Where each member of an argument is, and it."""
    if not isinstance(value, tuple):
        yield path, value
        return
    for place, each in enumerate(value):
        yield from _leaves(each, (*path, place))


def _argument_type(value: Any, constant: bool, special: bool) -> str:
    """Triton's name of what a launch would pass."""
    if constant or value is None or (special and type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if _is_descriptor(value):
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"


def _is_divisible(value: Any, special: bool) -> bool:
    """Whether its divisibility by 16 is told to the compiler."""
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return special and isinstance(value, int) and value % 16 == 0


@functools.cache
def _compiled(
    function: Any, signature: Any, constants: Any, divisible: tuple[Any, ...], arch: int | str, warps: int, stages: int,
    registers: int | None,
) -> Compiled:  # fmt: skip
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=function, signature=dict(signature), constexprs={path: value for path, _, value in constants},
        attrs={path: [["tt.divisibility", 16]] for path in divisible},
    )  # fmt: skip
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    limit = {"maxnreg": registers} if registers and target.backend == "cuda" else {}
    made = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages, **limit})
    code, told = made.asm, made.metadata
    threads = re.search(r"\.reqntid\s+(\d+)", code.get("ptx", ""))
    return Compiled(
        ptx=code.get("ptx", ""), shared=told.shared, warps=int(threads[1]) // 32 if threads else warps,
        arguments=tuple(_runtime_parameters(signature)),
        scratch=getattr(told, "global_scratch_size", 0), maps=tuple(getattr(told, "tensordesc_meta", None) or ()),
        cubin=code.get("cubin", b""), amdgcn=code.get("amdgcn", ""), columns=getattr(told, "tmem_size", 0),
    )  # fmt: skip


def _runtime_parameters(signature: Any) -> Iterator[tuple[Any, ...]]:
    for name, kinds in signature:
        yield from (path for path, kind in _leaves(kinds, (name,)) if kind != "constexpr")


def simulate_triton(
    function: Any, grid: tuple[int, ...], args: dict[str, Any], writes: Any, *, arch: int | None = None, warps: int = 4,
    stages: int = 3, **options: Any,
) -> Run:  # fmt: skip
    """Runs a Triton kernel's real PTX on CPU tensors; `options` are those of
    `ptxsim.Kernel.launch`.

    `arch` is by default that of `ptxsim.device`, and 80 outside of one.
    """
    sim = current.get()
    arch = arch or (sim.arch if sim else 80)
    made = compile_triton(function, args, arch, warps, stages)
    kernel = _cached_kernel(made.ptx)
    scratch = aligned(made.scratch * math.prod(grid))
    given = made.launch_arguments(args, kernel, scratch if made.scratch else 0)
    own = [scratch] if made.scratch else []
    options["poisoned"] = [*options.get("poisoned", ()), *own]
    return kernel.launch(grid, (made.warps * 32,), given, writes, shared=made.shared, **options)


def aligned(size: int) -> Tensor:
    """Bytes at an address that is a multiple of 128, as a map of a tensor wants it."""
    held = torch.empty(size + 128, dtype=torch.uint8)
    first = -held.data_ptr() % 128
    return held[first : first + size]


@functools.cache
def _cached_kernel(ptx: str) -> Kernel:
    return Kernel(ptx)
