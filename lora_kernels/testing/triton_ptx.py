"""Triton kernels to PTX without a GPU."""

import functools
import math
import re
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.testing.ptxsim import Kernel, Run, TensorMap
from lora_kernels.testing.ptxsim.device import current

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
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
    arguments: tuple[str, ...]
    """The parameters that are left at run time."""
    scratch: int = 0
    """Bytes of global memory that each block needs beside its arguments, for the maps of tensors."""
    maps: tuple[Any, ...] = ()
    """What Triton says of each tensor descriptor among the arguments; nothing where they are not maps."""
    cubin: bytes = b""
    amdgcn: str = ""
    columns: int = 0
    """Of tensor memory, on sm_100."""

    def given(self, args: dict[str, Any], kernel: Kernel, scratch: Any = 0) -> list[Any]:
        """The arguments of a launch; Triton adds pointers to scratch memory, which are null where there is none."""
        values, maps = [], iter(self.maps)
        for name in self.arguments:
            values += _expanded(args[name], next(maps, None)) if _is_descriptor(args[name]) else [args[name]]
        rest = len(kernel.parameters) - len(values)
        return values + [scratch, 0][:rest]


def _is_descriptor(value: Any) -> bool:
    return hasattr(value, "block_shape") and hasattr(value, "base")


def _expanded(descriptor: Any, form: Any) -> list[Any]:
    """The parameters that stand for a `TensorDescriptor`, as Triton's launcher passes them."""
    shape, strides = list(descriptor.shape), list(descriptor.strides)
    if form is None:
        return [descriptor.base, *shape, *strides, descriptor.padding == "nan", descriptor.round_f32_to_tf32, *shape, *strides]
    tensor = descriptor.base.as_strided(shape, strides)
    return [TensorMap(tensor, form["block_size"], (0, 32, 64, 128)[form["swizzle"]]), *shape, *strides]


def compile_triton(function: Any, args: dict[str, Any], arch: int | str = 80, warps: int = 4, stages: int = 3) -> Compiled:
    """Compiles a `@triton.jit` function for these arguments, as a launch with them would.

    Tensors and numbers are arguments at run time, whose divisibility by 16 is known to the compiler as in a launch; the
    number 1, None and what is annotated `tl.constexpr` are constants; of parameters in `do_not_specialize` only the type
    is known. `arch` is 80 for sm_80 and so on, or "gfx942".
    """
    names = [parameter.name for parameter in function.params]
    if missing := [name for name in names if name not in args]:
        raise TypeError(f"{function.__name__}: no argument for {', '.join(missing)}")
    constants, signature, divisible = {}, {}, []
    for position, parameter in enumerate(function.params):
        value = args[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            constants[parameter.name], signature[parameter.name] = value, "constexpr"
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            divisible += [position] if value.data_ptr() % 16 == 0 else []
        elif _is_descriptor(value):
            signature[parameter.name] = f"tensordesc<{_TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
            divisible += [position] if special and value % 16 == 0 else []
    # with their types, for 0 and False are equal and one kernel is not the other
    kinds = tuple((name, type(value).__name__, value) for name, value in constants.items())
    with _lock:
        return _compiled(function, tuple(signature.items()), kinds, tuple(divisible), arch, warps, stages)


@functools.cache
def _compiled(
    function: Any, signature: Any, constants: Any, divisible: tuple[int, ...], arch: int | str, warps: int, stages: int
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=function, signature=dict(signature), constexprs={name: value for name, _, value in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )  # fmt: skip
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    code, told = made.asm, made.metadata
    threads = re.search(r"\.reqntid\s+(\d+)", code.get("ptx", ""))
    return Compiled(
        ptx=code.get("ptx", ""), shared=told.shared, warps=int(threads[1]) // 32 if threads else warps,
        arguments=tuple(name for name, kind in signature if kind != "constexpr"),
        scratch=getattr(told, "global_scratch_size", 0), maps=tuple(getattr(told, "tensordesc_meta", None) or ()),
        cubin=code.get("cubin", b""), amdgcn=code.get("amdgcn", ""), columns=getattr(told, "tmem_size", 0),
    )  # fmt: skip


def simulate_triton(
    function: Any, grid: tuple[int, ...], args: dict[str, Any], writes: Any, *, arch: int | None = None, warps: int = 4,
    stages: int = 3, **options: Any,
) -> Run:  # fmt: skip
    """Runs a Triton kernel's real PTX on CPU tensors; `options` are those of `ptxsim.Kernel.launch`.

    `arch` is by default that of `ptxsim.device`, and 80 outside of one.
    """
    sim = current.get()
    arch = arch or (sim.arch if sim else 80)
    made = compile_triton(function, args, arch, warps, stages)
    kernel = _kernel(made.ptx)
    scratch = aligned(made.scratch * math.prod(grid))
    given = made.given(args, kernel, scratch if made.scratch else 0)
    own = [scratch] if made.scratch else []
    options["poisoned"] = [*options.get("poisoned", ()), *own]
    return kernel.launch(grid, (made.warps * 32,), given, writes, shared=made.shared, **options)


def aligned(size: int) -> Tensor:
    """Bytes at an address that is a multiple of 128, as a map of a tensor wants it."""
    held = torch.empty(size + 128, dtype=torch.uint8)
    first = -held.data_ptr() % 128
    return held[first : first + size]


@functools.cache
def _kernel(ptx: str) -> Kernel:
    return Kernel(ptx)
