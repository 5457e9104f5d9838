"""Triton's interpreter, mended and strict: the meaning of a kernel, tile by tile, without a compiler.

Mended, since the stock interpreter multiplies the bit patterns of bfloat16 and knows no TF32 (triton-lang/triton #11584):
bfloat16 arithmetic, casts, constants, atomics and dots; TF32 dots truncate their operands; dots of float32 in parts of
bfloat16. A dot adds in the order of the depth, in float32, so that a row's bits do not depend on what other rows are there.
Strict: every access lies inside a tensor that was given, only those in `writes` change, int32 arithmetic does not
overflow, and no two programs touch one element, one of them writing, unless an atomic orders them.
Not seen, since programs run one after another and have no threads: what needs a barrier inside a program, the number of
warps and stages, shared memory. The simulator (ptxsim) sees those.
Tried with Triton 3.6 to 3.9; triton_versions.py has what differs between them, and refuses others.
"""

import contextlib
import dataclasses
import inspect
import mmap
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

from lora_kernels.testing.triton_versions import EXPECTED, SINCE_3_9, check_version

BF16 = np.dtype(ml_dtypes.bfloat16)
Handle = stock.TensorHandle


class InterpreterViolation(AssertionError):
    """The kernel did what it must not; the message names the tensor, the element and the program."""


def interpret(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], writes: Sequence[Tensor], *, seed: int | None = None,
    overflow: bool = True, programs: Sequence[tuple[int, int, int]] | None = None,
) -> None:  # fmt: skip
    """Runs a `@triton.jit` function on CPU tensors. Programs run in order, or in an order drawn from `seed`; or only
    `programs`, for grids and tensors that are too big for all of them.

    Raises:
        InterpreterViolation: an access, a race or an overflow as above, or a `tl.device_assert` that fails.
        RuntimeError: this version of Triton has another interpreter than those that are mended.
    """
    check_version()
    sizes = (*grid, 1, 1)[:3]
    places = list(programs or ((x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])))
    if seed is not None:
        random.Random(seed).shuffle(places)
    function = stock.InterpretedFunction(kernel.fn).rewrite()
    constants = {p.name for p in kernel.params if p.is_constexpr}
    memory = _Memory(_tensors(args), writes)
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
        except AssertionError as error:  # Triton's own: its sanitizer of overflow, device_assert, a descriptor's alignment
            raise InterpreterViolation(f"program {memory.program}: {error}") from error


def _tensors(args: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments and in tuples there; that of a TensorDescriptor is its base."""
    flat: dict[str, Any] = {}
    for name, value in args.items():
        flat |= {f"{name}[{i}]": each for i, each in enumerate(value)} if isinstance(value, tuple) else {name: value}
    bases = {name: getattr(value, "base", value) for name, value in flat.items()}
    return {name: value for name, value in bases.items() if isinstance(value, Tensor)}


class _Memory:
    """The tensors of a launch, and which program wrote and read each element last."""

    def __init__(self, tensors: dict[str, Tensor], writes: Sequence[Tensor]) -> None:
        changed = {t.data_ptr() for t in writes}
        spans = [(t.data_ptr(), _byte_span(t), name, t.element_size()) for name, t in tensors.items() if t.numel()]
        self.spans = sorted({span[0]: span for span in spans}.values())
        self.first = np.array([at for at, *_ in self.spans], np.uint64)
        self.last = np.array([at + size for at, size, *_ in self.spans], np.uint64)
        self.writable = [at in changed for at, *_ in self.spans]
        # the program that wrote or read, as a number and 1, and its clock then; MANY programs for reads
        self.wrote, self.read = [], []
        for (_, size, _, unit), writable in zip(self.spans, self.writable, strict=True):
            count = size // unit if writable else 0
            self.wrote.append(_access_marks(count))
            self.read.append(_access_marks(count))
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._clocks: dict[int, int] = {}
        self._known: dict[int, dict[int, int]] = {}
        self._released: dict[int, dict[int, int]] = {}
        self.program = (0, 0, 0)

    MANY = -1

    def raise_violation(self, text: str) -> None:
        raise InterpreterViolation(f"program {self.program}: {text}")

    def check_access(
        self, pointers: np.ndarray, mask: np.ndarray, size: int, kind: str, values: np.ndarray | None = None
    ) -> None:
        """Checks one tile's access; kind is load, store, atomic or atomic load."""
        used = np.broadcast_to(mask, pointers.shape).astype(bool)  # the product of masks may be an integer
        at = pointers[used].astype(np.uint64)
        if not at.size:
            return
        which = np.searchsorted(self.first, at, side="right").astype(np.int64) - 1
        outside = (which < 0) | (at + np.uint64(size) > self.last[np.maximum(which, 0)])
        if outside.any():
            i = int(np.argmax(outside))
            place = int(at[i])
            base, span, name, _ = min(self.spans, key=lambda s: s[0] - place if place < s[0] else max(place - s[0] - s[1], 0))
            self.raise_violation(
                f"{kind} out of bounds, {name}{place - base:+d} of {span} bytes ({int(outside.sum())} elements)"
            )
        me = self._numbers.setdefault(self.program, len(self._numbers) + 1)
        for i in np.unique(which):
            base, _, name, unit = self.spans[i]
            if kind in ("store", "atomic") and not self.writable[i]:
                self.raise_violation(f"{kind} to {name}, which is not among the tensors it writes")
            if not self.writable[i]:
                continue
            elements = ((at[which == i] - np.uint64(base)) // np.uint64(unit)).astype(np.int64)
            if kind == "store" and values is not None:
                self._same_values(name, elements, np.broadcast_to(values, pointers.shape)[used][which == i])
            if kind in ("load", "store"):
                self._ordered(self.wrote[i], elements, me, f"{kind} of {name}", "written")
            if kind == "store":
                self._ordered(self.read[i], elements, me, f"store of {name}", "read")
                self.wrote[i][elements] = (me, self._clocks.get(me, 0))
                self.read[i][elements] = 0
            elif kind == "load":
                before = self.read[i][elements, 0]
                self.read[i][elements, 0] = np.where((before == 0) | (before == me), me, self.MANY)
                self.read[i][elements, 1] = self._clocks.get(me, 0)

    def _same_values(self, name: str, elements: np.ndarray, values: np.ndarray) -> None:
        order = np.argsort(elements, kind="stable")
        elements, values = elements[order], np.ascontiguousarray(values[order]).view(f"u{values.itemsize}")
        twice = (elements[1:] == elements[:-1]) & (values[1:] != values[:-1])
        if twice.any():
            self.raise_violation(f"stores two values to element {int(elements[1:][twice][0])} of {name} at once")

    def _ordered(self, marks: np.ndarray, elements: np.ndarray, me: int, what: str, how: str) -> None:
        others = marks[elements]
        suspect = (others[:, 0] != 0) & (others[:, 0] != me)
        for (other, clock), element in zip(others[suspect], elements[suspect], strict=True):
            if other == self.MANY or self._known.get(me, {}).get(int(other), -1) < clock:
                names = {number: program for program, number in self._numbers.items()}
                by = "several programs" if other == self.MANY else f"program {names[int(other)]}"
                self.raise_violation(f"{what} element {int(element)}: a race, it is {how} by {by}")

    def synchronise(self, pointers: np.ndarray, mask: np.ndarray, order: Any, *, replaces: bool = False) -> None:
        """An atomic passes on what its program did before, and brings what was passed on there."""
        me = self._numbers.setdefault(self.program, len(self._numbers) + 1)
        known = self._known.setdefault(me, {})
        for address in pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].ravel().tolist():
            if replaces:  # a store, not a read and a write: what was passed on before is gone
                self._released[int(address)] = {}
            there = self._released.setdefault(int(address), {})
            if order in (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE):
                for program, clock in there.items():
                    known[program] = max(known.get(program, -1), clock)
            if order in (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE):
                clock = self._clocks.get(me, 0)
                for program, seen in {**known, me: clock}.items():
                    there[program] = max(there.get(program, -1), seen)
                self._clocks[me] = clock + 1


@contextmanager
def _interpreted_language(function: Any) -> Iterator[None]:
    """Inside it tl's functions are the interpreter's, also those that are jit functions themselves."""
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


def _byte_span(t: Tensor) -> int:
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _access_marks(count: int) -> np.ndarray:
    """Zeros [count, 2], of which only what is touched takes memory."""
    if count < 2**28:
        return np.zeros((count, 2), np.int64)
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python before 3.13 has no name for; Triton is for Linux alone
    held = mmap.mmap(-1, 16 * count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return np.frombuffer(held, np.int64).reshape(count, 2)


def _multiply(x: np.ndarray, y: np.ndarray, sums: np.ndarray) -> np.ndarray:
    for k in range(x.shape[-1]):
        sums = sums + x[..., :, k, None] * y[..., k, None, :]
    return sums


def _in_parts(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """x y as Triton takes it in `count` parts of bfloat16 each, the small products first; NaN of an infinity's rest is 0."""
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
def _mended_interpreter(memory: _Memory, overflow: bool) -> Iterator[Any]:
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
