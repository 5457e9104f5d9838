"""The versions of Triton whose interpreter triton_interpreter.py mends, and what differs between
them.

`make test-slow` runs the tests with each of them.
"""

import inspect
from collections.abc import Iterator

import triton
from triton.runtime import interpreter as stock

TRIED = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
# 3.9 has one parameter for both hints of a cache, and new atomics. What 3.6 has otherwise:
# `__index__` in triton_interpreter.py
SINCE_3_9 = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9)
_HINTS = ("cache_policy",) if SINCE_3_9 else ("cache_modifier", "eviction_policy")
# what is replaced, with the parameters that it has
EXPECTED: dict[str, tuple[str, ...]] = {
    "create_masked_load": ("self", "ptrs", "mask", "other", *_HINTS, "is_volatile"),
    "create_masked_store": ("self", "ptrs", "value", "mask", *_HINTS),
    "cast_impl": ("self", "src", "dst_type"),
    "create_fp_to_fp": ("self", "src", "dst_type", "rounding_mode"),
    "create_dot": ("self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"),
    "create_fma": ("self", "x", "y", "z"),
    "create_fabs": ("self", "arg"),
    "create_atomic_rmw": ("self", "rmwOp", "ptr", "val", "mask", "sem", "scope"),
    "create_atomic_cas": ("self", "ptr", "cmp", "val", "sem", "scope"),
}
if SINCE_3_9:
    EXPECTED |= {
        "create_atomic_load": ("self", "ptr", "mask", "sem", "scope"),
        "create_atomic_store": ("self", "ptr", "val", "mask", "sem", "scope"),
        "create_atomic_poll": ("self", "ptr", "expected", "timeout_ns", "sem", "scope"),
    }
# the functions of libtriton that touch memory: only what is replaced may call them
_TOUCHES = {"load", "store", "atomic_rmw", "atomic_cas"}


def check_version() -> None:
    """Raises RuntimeError, naming the version, if Triton's interpreter is not one that
    triton_interpreter.py mends."""
    for problem in _problems():
        raise RuntimeError(f"triton {triton.__version__}: {problem}")


def _problems() -> Iterator[str]:
    for name, wanted in EXPECTED.items():
        method = getattr(stock.InterpreterBuilder, name, None)
        found = tuple(inspect.signature(method).parameters) if method else None
        if found != wanted:
            yield f"InterpreterBuilder.{name} has parameters {found}, what is mended has {wanted}"
    for name, method in vars(stock.InterpreterBuilder).items():
        if name not in EXPECTED and _TOUCHES & set(getattr(getattr(method, "__code__", None), "co_names", ())):
            yield f"InterpreterBuilder.{name} touches memory and is not mended"
    for name in ("_get_np_dtype", "_implicit_cvt", "_patch_lang", "InterpretedFunction", "interpreter_builder"):
        if not hasattr(stock, name):
            yield f"triton.runtime.interpreter has no {name}"
    if triton.__version__.split(".")[:2] not in [version.split(".")[:2] for version in TRIED]:
        yield f"what is mended was tried with {', '.join(TRIED)} only"
