"""Triton's interpreter, mended and strict: the meaning of a kernel, tile by tile, without a
compiler.

Mended, since the stock interpreter multiplies the bit patterns of bfloat16 and knows no TF32
(triton-lang/triton #11584): bfloat16 arithmetic, casts, constants, atomics and dots; TF32 dots
truncate their operands; dots of float32 in parts of bfloat16. A dot adds in the order of the depth,
in float32, so that a row's bits do not depend on what other rows are there.
Strict: every access lies inside a tensor that was given, only those in `writes` change, int32
arithmetic does not overflow, and no two programs touch one element, one of them writing, unless an
atomic orders them. Not seen, since programs run one after another and have no threads: what needs a
barrier inside a program, the number of warps and stages, shared memory. The simulator (ptxsim) sees
those. Tried with Triton 3.6 to 3.9; triton_versions.py has what differs between them, and refuses
others.
"""

import contextlib
import dataclasses
import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import interpreter as native
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from lora_kernels.testing.interpreter_memory import InterpreterMemory, InterpreterViolation
from lora_kernels.testing.triton_versions import EXPECTED, SINCE_3_9, check_version

BF16 = np.dtype(ml_dtypes.bfloat16)
Handle = stock.TensorHandle


def interpret(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], writes: Sequence[Tensor], *, seed: int | None = None,
    overflow: bool = True, programs: Sequence[tuple[int, int, int]] | None = None,
) -> None:  # fmt: skip
    """Runs a `@triton.jit` function on CPU tensors. Programs run in order, or in an order drawn
    from `seed`; or only `programs`, for grids and tensors that are too big for all of them.

    Raises:
        InterpreterViolation: an access, a race or an overflow as above, or a `tl.device_assert`
            that fails.
        RuntimeError: this version of Triton has another interpreter than those that are mended.
    """
    check_version()
    sizes = (*grid, 1, 1)[:3]
    places = list(programs or ((x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])))
    if seed is not None:
        random.Random(seed).shuffle(places)
    function = stock.InterpretedFunction(kernel.fn).rewrite()
    constants = {p.name for p in kernel.params if p.is_constexpr}
    memory = InterpreterMemory(_tensors(args), writes)
    with _mended_interpreter(memory, overflow) as builder, _interpreted_language(function):
        given = {name: value if name in constants else stock._implicit_cvt(value) for name, value in args.items()}
        try:
            builder.set_grid_dim(*sizes)
            for place in places:
                builder.set_grid_idx(*place)
                memory.program = place
                function(**given)
        except InterpreterViolation:
            raise
        # Triton's own: its sanitizer of overflow, device_assert, a descriptor's alignment
        except AssertionError as error:
            raise InterpreterViolation(f"program {memory.program}: {error}") from error


def _tensors(args: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments and in tuples there, as `layers[0].w` in a named one; that of
    a TensorDescriptor is its base."""
    flat: dict[str, Any] = {}
    for name, value in args.items():
        if isinstance(value, tuple):
            labels = [f".{field}" for field in getattr(value, "_fields", ())] or [f"[{i}]" for i in range(len(value))]
            flat |= _tensors({f"{name}{label}": each for label, each in zip(labels, value, strict=True)})
        else:
            flat[name] = getattr(value, "base", value)
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


@contextmanager
def _interpreted_language(function: Any) -> Iterator[None]:
    """Inside it tl's functions are the interpreter's, also those that are jit functions
    themselves."""
    stack = contextlib.ExitStack()

    def patch_function(function: Any) -> Any:
        scope = stock._patch_lang(function)
        stack.callback(scope.restore)
        # that of 3.6 needs an older NumPy
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        return function

    def call_interpreted(self: Any, *args: Any, **kwargs: Any) -> Any:
        rewritten = stock.InterpretedFunction(self.fn).rewrite()
        if rewritten not in entered:
            entered.add(patch_function(rewritten))
        return rewritten(*args, **kwargs)

    entered: set[Any] = set()
    before = JITFunction.__call__
    with stack:
        for name in ("gdc_wait", "gdc_launch_dependents"):  # one launch is over before the next
            stack.callback(setattr, tl.extra.cuda, name, getattr(tl.extra.cuda, name))
            setattr(tl.extra.cuda, name, lambda: None)
        JITFunction.__call__ = call_interpreted
        stack.callback(setattr, JITFunction, "__call__", before)
        patch_function(function)
        yield


def _multiply(x: np.ndarray, y: np.ndarray, sums: np.ndarray) -> np.ndarray:
    for k in range(x.shape[-1]):
        sums = sums + x[..., :, k, None] * y[..., k, None, :]
    return sums


def _in_parts(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """x y as Triton takes it in `count` parts of bfloat16 each, the small products first; NaN of an
    infinity's rest is 0."""
    parts: list[list[np.ndarray]] = []
    for value in (x, y):
        parts.append([])
        for _ in range(count):
            parts[-1].append(value.astype(BF16).astype(np.float32))
            value = value - parts[-1][-1]
    sums = np.zeros((*x.shape[:-1], y.shape[-1]), np.float32)
    for order in range(count - 1, -1, -1):
        sums = np.where(np.isnan(sums), np.float32(0), sums)
        for i in range(order + 1):
            sums = _multiply(parts[0][i], parts[1][order - i], sums)
    return sums


def _to_tf32(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _by_name(method: Any, stock_method: Any) -> Any:
    """`method` with those of stock_method's arguments that it names."""
    signature, names = inspect.signature(stock_method), inspect.signature(method).parameters

    def call_by_name(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        return method(*(given[name] for name in names))

    return call_by_name


@contextmanager
def _mended_interpreter(memory: InterpreterMemory, overflow: bool) -> Iterator[Any]:
    """Inside it the interpreter computes in bfloat16 and asks `memory` about every access."""
    builder, cls = stock.interpreter_builder, stock.InterpreterBuilder
    original = {name: cls.__dict__[name] for name in EXPECTED}
    stock_dtype, options = stock._get_np_dtype, builder.options
    parts = {ir.INPUT_PRECISION.BF16x3: 2, ir.INPUT_PRECISION.BF16x6: 3}
    allowed = (*options.allowed_dot_input_precisions, "bf16x3", "bf16x6")
    casts = ["si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"]
    old_casts = {f"create_{name}": cls.__dict__[f"create_{name}"] for name in casts}
    old_bf16 = cls.__dict__.get("get_bf16")

    def np_dtype(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return BF16 if scalar == tl.bfloat16 else stock_dtype(kind)

    def fetch_values(ptrs: Any, mask: Any, other: Any) -> Any:
        kind = ptrs.get_element_ty()
        dtype = np_dtype(kind)
        rest = np.zeros(ptrs.data.shape, dtype) if other is None else np.ascontiguousarray(other.data)
        if dtype != BF16:
            return Handle(native.load(ptrs.data, mask, rest, dtype), kind)
        bits = native.load(ptrs.data, mask, rest.view(np.uint16), np.dtype(np.uint16))
        return Handle(bits.view(BF16), kind)

    def store_values(ptrs: Any, data: np.ndarray, mask: Any) -> Any:
        return native.store(ptrs.data, np.ascontiguousarray(data).view(np.uint16) if data.dtype == BF16 else data, mask)

    def masked_load(ptrs: Any, mask: Any, other: Any) -> Any:
        inside = np.asarray(mask.data)
        memory.check_access(ptrs.data, inside, np_dtype(ptrs.get_element_ty()).itemsize, "load")
        return fetch_values(ptrs, inside, other)

    def masked_store(ptrs: Any, value: Any, mask: Any) -> Any:
        inside = np.asarray(mask.data)
        memory.check_access(ptrs.data, inside, value.data.dtype.itemsize, "store", value.data)
        return store_values(ptrs, value.data, inside)

    def cast_value(self: Any, src: Any, dst_type: Any) -> Any:
        return Handle(src.data.astype(np_dtype(dst_type)), dst_type.scalar)

    def float_to_float(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if 8 in (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth):
            return original["create_fp_to_fp"](self, src, dst_type, rounding_mode)
        return cast_value(self, src, dst_type)

    def dot_product(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y, total = a.data, b.data, d.data
        if x.dtype.kind in "iu":
            product = np.matmul(x.astype(np.int64), y.astype(np.int64))
            return Handle((product + total).astype(total.dtype), d.dtype.scalar)
        if 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth) or x.dtype == np.float64:
            return original["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
        if a.dtype == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            x, y = _to_tf32(x), _to_tf32(y)
        x, y, sums = x.astype(np.float32), y.astype(np.float32), total.astype(np.float32)
        if a.dtype == tl.float32 and input_precision in parts:
            sums = sums + _in_parts(x, y, parts[input_precision])
        else:
            sums = _multiply(x, y, sums)
        return Handle(sums.astype(total.dtype), d.dtype.scalar)

    def fused_multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype.itemsize == 8:
            return original["create_fma"](self, x, y, z)
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return Handle(exact.astype(z.data.dtype), z.dtype.scalar)

    def absolute(self: Any, arg: Any) -> Any:
        return Handle(np.abs(arg.data), arg.dtype.scalar)

    def atomic_rmw(self: Any, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        memory.check_access(ptr.data, mask.data, val.data.dtype.itemsize, "atomic")
        memory.synchronise(ptr.data, mask.data, sem)
        if val.data.dtype != BF16:
            return original["create_atomic_rmw"](self, rmwOp, ptr, val, mask, sem, scope)
        if rmwOp not in (ir.ATOMIC_OP.FADD, ir.ATOMIC_OP.ADD):
            raise NotImplementedError(f"the mended interpreter has no bfloat16 atomic {rmwOp}")
        before, one, half = np.zeros_like(val.data), np.ones(1, bool), np.dtype(np.uint16)
        for i in zip(*np.nonzero(np.broadcast_to(mask.data, val.data.shape)), strict=True):
            place = np.array([ptr.data[i]], np.uint64)
            held = native.load(place, one, np.zeros(1, np.uint16), half).view(BF16)
            before[i] = held[0]
            native.store(place, (held + val.data[i]).astype(BF16).view(np.uint16), one)
        return Handle(before, val.dtype.scalar)

    def atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        everywhere = np.ones(ptr.data.shape, bool)
        memory.check_access(ptr.data, everywhere, val.data.dtype.itemsize, "atomic")
        memory.synchronise(ptr.data, everywhere, sem)
        return original["create_atomic_cas"](self, ptr, cmp, val, sem, scope)

    def atomic_load(ptr: Any, mask: Any, sem: Any) -> Any:
        memory.check_access(ptr.data, mask.data, np_dtype(ptr.get_element_ty()).itemsize, "atomic load")
        memory.synchronise(ptr.data, mask.data, sem)
        return fetch_values(ptr, mask.data, None)

    def atomic_store(ptr: Any, val: Any, mask: Any, sem: Any) -> Any:
        memory.check_access(ptr.data, mask.data, val.data.dtype.itemsize, "atomic")
        memory.synchronise(ptr.data, mask.data, sem, replaces=True)
        return store_values(ptr, val.data, mask.data)

    def atomic_poll(ptr: Any, expected: Any, timeout_ns: Any, sem: Any) -> Any:
        everywhere = np.ones(ptr.data.shape, bool)
        memory.check_access(ptr.data, everywhere, expected.data.dtype.itemsize, "atomic load")
        found = fetch_values(ptr, everywhere, None).data == expected.data
        memory.synchronise(ptr.data, found, sem)
        if not found.all() and not isinstance(timeout_ns, Handle):
            memory.raise_violation("waits for a value that no program before it stored")
        return Handle(found, tl.int1)

    new = {
        "create_masked_load": masked_load, "create_masked_store": masked_store, "cast_impl": cast_value,
        "create_fp_to_fp": float_to_float, "create_dot": dot_product, "create_fma": fused_multiply_add,
        "create_fabs": absolute, "create_atomic_rmw": atomic_rmw, "create_atomic_cas": atomic_cas,
    }  # fmt: skip
    if SINCE_3_9:
        new |= {"create_atomic_load": atomic_load, "create_atomic_store": atomic_store, "create_atomic_poll": atomic_poll}
    try:
        stock._get_np_dtype = np_dtype
        for name, method in new.items():
            setattr(cls, name, _by_name(method, original[name]))
        for name in old_casts:
            setattr(cls, name, cast_value)
        cls.get_bf16 = lambda self, value: Handle(np.array([value], BF16), tl.bfloat16)
        builder.options = dataclasses.replace(
            options, debug=True, sanitize_overflow=overflow, allowed_dot_input_precisions=allowed
        )
        yield builder
    finally:
        stock._get_np_dtype, builder.options = stock_dtype, options
        for name, method in {**original, **old_casts}.items():
            setattr(cls, name, method)
        if old_bf16 is None:
            del cls.get_bf16
        else:
            cls.get_bf16 = old_bf16
