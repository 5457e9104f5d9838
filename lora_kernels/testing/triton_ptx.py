"""Triton kernels to PTX without a GPU."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.testing.ptxsim import Kernel, Run

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What Triton made of a kernel for one architecture."""

    ptx: str
    shared: int
    """Dynamic shared memory in bytes."""
    warps: int
    arguments: tuple[str, ...]
    """The parameters that are left at run time."""

    def given(self, args: dict[str, Any], kernel: Kernel) -> list[Any]:
        """The arguments of a launch; Triton adds pointers to scratch memory, which are null where there is none."""
        values = [args[name] for name in self.arguments]
        return values + [0] * (len(kernel.parameters) - len(values))


def compile_triton(function: Any, args: dict[str, Any], arch: int = 80, warps: int = 4, stages: int = 3) -> Compiled:
    """Compiles a `@triton.jit` function for these arguments, as a launch with them would.

    Tensors and numbers are arguments at run time, whose divisibility by 16 is known to the compiler as in a launch; a
    number whose parameter is annotated `tl.constexpr` is a constant. `arch` is 80 for sm_80 and so on.
    """
    constants, signature, divisible = {}, {}, []
    for position, parameter in enumerate(function.params):
        value = args[parameter.name]
        if parameter.is_constexpr:
            constants[parameter.name], signature[parameter.name] = value, "constexpr"
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            divisible += [position] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [position] if value % 16 == 0 else []
    return _compiled(function, tuple(signature.items()), tuple(constants.items()), tuple(divisible), arch, warps, stages)


@functools.cache
def _compiled(
    function: Any, signature: Any, constants: Any, divisible: tuple[int, ...], arch: int, warps: int, stages: int
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=function, signature=dict(signature), constexprs=dict(constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})
    names = tuple(name for name, kind in signature if kind != "constexpr")
    return Compiled(made.asm["ptx"], made.metadata.shared, warps, names)


def simulate_triton(
    function: Any, grid: tuple[int, ...], args: dict[str, Any], writes: Any, *, arch: int = 80, warps: int = 4, stages: int = 3,
    **options: Any,
) -> Run:  # fmt: skip
    """Runs a Triton kernel's real PTX on CPU tensors; `options` are those of `ptxsim.Kernel.launch`."""
    made = compile_triton(function, args, arch, warps, stages)
    kernel = _kernel(made.ptx)
    given = made.given(args, kernel)
    return kernel.launch(grid, (made.warps * 32,), given, writes, shared=made.shared, **options)


@functools.cache
def _kernel(ptx: str) -> Kernel:
    return Kernel(ptx)
