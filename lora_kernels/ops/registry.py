"""The one place that joins ops to backends; which backend runs is decided here alone.

An op is declared once: the structure of its arguments, a NamedTuple, and its fake (shapes only). A
backend adds an implementation and a refusal, which says in words why it cannot take some arguments;
both get that structure and read it by name. A call runs the first backend, in PREFERENCE order,
that accepts it.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from textwrap import indent
from typing import Any, get_type_hints

import torch
from torch import Tensor

from lora_kernels.ops.scale import add_tensor_scale

BACKENDS = ("reference", "cpu", "triton", "cuda")
ON_GPU = ("triton", "cuda")
NONE = "it has no such kernel"
# the end of the note that setup.py leaves where a part was not wanted
LEFT_OUT = "=0 when the package was built"
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_library = torch.library.Library("lora_kernels", "DEF")
_implementations: dict[str, dict[str, "Implementation"]] = {}
_structures: dict[str, Callable[..., Any]] = {}  # of an op's arguments
_refuse_device: Callable[[Tensor], str | None] = lambda t: None  # noqa: E731
_missing: dict[str, str] = {}
_there: set[str] = set()  # backends that some op has
_warned: set[tuple[str, str]] = set()
_forced: ContextVar[str | None] = ContextVar("forced_backend", default=None)
_simulated: ContextVar[bool] = ContextVar("simulated", default=False)
_recorder: ContextVar["Explanation | None"] = ContextVar("recorder", default=None)


class FallbackWarning(UserWarning):
    """A call ran on the reference although a faster backend exists for its device."""


@dataclass(frozen=True)
class Implementation:
    run: Callable[[Any], Any]
    refusal: Callable[[Any], str | None]
    """Why these arguments cannot run here, in words for the user; None if they can."""


@dataclass(frozen=True)
class Decision:
    """Which backend ran one op, and why each other one did not."""

    op: str
    chosen: str
    others: dict[str, str]
    plan: Any = None
    """Which of its kernels the backend took and why, if it has several: a `dispatch.Plan`."""
    tiles: tuple[str, ...] = ()
    """Those of its kernels that were measured on this GPU."""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"] + [f"    {name}: {reason}" for name, reason in self.others.items()]
        return "\n".join(lines)


@dataclass
class Explanation:
    """Every decision taken while a call ran, in order."""

    decisions: list[Decision] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for decision in self.decisions:
            lines.append(str(decision))
            if decision.plan is not None:
                lines.append(indent(str(decision.plan), "    "))
            lines += [f"    {tile}" for tile in decision.tiles]
        return "\n".join(lines) or "no lora_kernels op ran"


class Op:
    """A declared op. Eager calls go straight to the backend; those that something watches (a
    compiler, a tracer, selective checkpointing, a tensor subclass) go through the dispatcher, whose
    kernel is this same choice: the same bits. A `scale` that a compiler holds as a symbol is a
    tensor there, of an overload of its own (`scale.py`)."""

    def __init__(self, name: str, overload: torch._ops.OpOverload, of_symbol: torch._ops.OpOverload | None = None) -> None:
        self.name = name
        self._overload, self._of_symbol = overload, of_symbol

    def __call__(self, call: Any) -> Any:
        if torch.compiler.is_compiling() or _modes() or _functorch() is not None or not _are_plain_tensors(call[:4]):
            if not torch.compiler.is_compiling() and _modes():
                import_module("lora_kernels.ops.flops").tell_counters()
            if self._of_symbol is not None and isinstance(call.scale, Tensor):
                return self._of_symbol(*call)
            return self._overload(*call)
        return choose_implementation(self.name, call).run(call)

    def formula(self, call: Any) -> Any:
        """The reference on these arguments, whatever would run: torch's own ops, which autograd,
        forward mode and torch.func differentiate."""
        return _implementations[self.name]["reference"].run(call)


_PLAIN = {Tensor, torch.nn.Parameter, type(None), float, int, bool}


def _are_plain_tensors(values: Iterable[Any]) -> bool:
    """Whether every tensor is torch's own, those in lists too."""
    if _PLAIN.issuperset(map(type, values)):
        return True
    return all(_are_plain_tensors(v) if type(v) is list else type(v) in _PLAIN for v in values)


_modes, _functorch = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack


def declare(
    name: str, structure: Callable[..., Any], results: str, fake: Callable[[Any], Any], changes: Iterable[str] = ()
) -> Op:
    """Declares an op, whose argument is a `structure`: a NamedTuple, of whose fields torch's schema
    is made. `results` as in a schema, e.g. "(Tensor y, Tensor h)"; "()" where the op changes the
    arguments that `changes` names.

    A backend may return None for a result, or in a list of results, that the arguments say nobody
    wants; traced calls get an empty tensor there. Library.define and impl rather than
    torch.library.custom_op, which costs several times as much per call.
    """
    gives = results != "()"

    def run(*args: Any) -> Any:
        call = structure(*args)
        result = choose_implementation(name, call).run(call)
        return _empty_for_none(result, call[0]) if gives else None

    _structures[name] = structure
    _library.define(f"{name}({_schema_arguments(structure, tuple(changes))}) -> {results}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{name}", lambda *args: fake(structure(*args)), lib=_library)
    packet = getattr(torch.ops.lora_kernels, name)
    if get_type_hints(structure).get("scale") is not float:
        return Op(name, packet.default)
    add_tensor_scale(_library, name, f"({_schema_arguments(structure, tuple(changes))}) -> {results}", structure, run, fake)
    return Op(name, packet.default, packet.scale_tensor)


_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]", list[float]: "float[]", list[int]: "int[]",
    list[Tensor] | None: "Tensor[]?", list[int] | None: "int[]?",
}  # fmt: skip


def _schema_arguments(structure: Any, changes: tuple[str, ...]) -> str:
    """The arguments of torch's schema; of those that are changed each has an alias of its own."""
    arguments = []
    for field_, annotation in get_type_hints(structure).items():
        text = _TYPES[annotation]
        if field_ in changes:
            text = text.replace("Tensor", f"Tensor({'abcdef'[changes.index(field_)]}!)")
        default = structure._field_defaults
        arguments.append(f"{text} {field_}" + (f"={default[field_]}" if field_ in default else ""))
    return ", ".join(arguments)


def _empty_for_none(result: Any, like: Tensor) -> Any:
    if result is None:
        return like.new_empty(0)
    return result if isinstance(result, Tensor) else type(result)(_empty_for_none(each, like) for each in result)


def implements(
    name: str, backend: str, refusal: Callable[[Any], str | None] = lambda _: None
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Adds a backend to an op; decorates the function that runs it."""

    def register(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        _implementations.setdefault(name, {})[backend] = Implementation(run, refusal)
        return run

    return register


def refuses_device(refusal: Callable[[Tensor], str | None]) -> Callable[[Tensor], str | None]:
    """Decorates the function that says why no kernel for GPUs runs where a tensor is."""
    global _refuse_device
    _refuse_device = refusal
    return refusal


def load_backends(package: str) -> None:
    """Imports each backend file of an op; one that is not there or cannot be imported is kept as a
    reason."""
    for backend in BACKENDS:
        module = f"{package}.{backend}"
        try:
            import_module(module)
            _there.add(backend)
        except ImportError as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != module:
                _missing.setdefault(backend, _not_built(error))


def _not_built(error: ImportError) -> str:
    if error.name and not error.name.startswith("lora_kernels"):
        return str(error)
    return not_built("_build_error.txt", error)


def not_built(note: str, error: ImportError) -> str:
    """Why an extension is not there: what its build left in a file of the package, or else the
    error of its import."""
    file = Path(__file__).parent.parent / note
    if file.is_file():
        return f"not built: {file.read_text(encoding='utf-8').strip()}"
    return f"not built: {error}; `pip install .` in the repository builds it"


@contextmanager
def use_backend(backend: str, simulate: bool = False) -> Iterator[None]:
    """Runs every op inside the block on one backend, or raises with the reason why it cannot.

    It holds for this thread and, from torch 2.13 on, for a backward that autograd runs for it in
    its own, a GPU's; `explain`, too. Not for what checkpointing computes anew there:
    LORA_KERNELS_BACKEND holds everywhere.

    With `simulate`, the kernels for GPUs ("triton", "cuda") run on CPU tensors: their real PTX,
    with every check of `lora_kernels.ptxsim` and some thousand times slower than a GPU.
    `ptxsim.device(...)` around it counts what they do and chooses the architecture.

    Raises:
        ValueError: no backend has that name, or it has no PTX to simulate.
        ImportError: what the simulator needs is not there.
    """
    _check_name(backend)
    if simulate:
        if backend not in ON_GPU:
            raise ValueError(f"simulate is for {' and '.join(ON_GPU)}, found {backend!r}")
        from lora_kernels import ptxsim  # noqa: F401  # what it needs is not everywhere
    tokens = _forced.set(backend), _simulated.set(simulate)
    try:
        yield
    finally:
        _forced.reset(tokens[0])
        _simulated.reset(tokens[1])


def forced_backend() -> str | None:
    """That of `use_backend` or LORA_KERNELS_BACKEND, if there is one."""
    return _forced.get() or _FROM_ENVIRONMENT


def is_watched() -> bool:
    """Whether a backend is forced, `explain` asks, or something looks at the ops that run."""
    return bool(_modes() or _forced.get() or _FROM_ENVIRONMENT or _recorder.get() is not None) or _functorch() is not None


def simulates() -> bool:
    """Whether kernels for GPUs run in the simulator."""
    return _simulated.get()


def explain(call: Callable[..., Any] | Tensor, *args: Any, **kwargs: Any) -> Explanation:
    """Runs `call(*args, **kwargs)` and says which backend each op took and why the others did not.

    `call` is an op (`lora_linear`), a layer or a whole model. `explain(x, layer)`, the tensor
    first, is the same as `explain(layer, x)`. Of a backend that has several kernels for one op it
    also says which one ran: the candidates with their bytes, launches and time, and what decided
    (`lora_kernels.ops.dispatch`).

    Raises:
        TypeError: there is nothing to call.
    """
    if isinstance(call, Tensor):
        if not args or not callable(args[0]):
            raise TypeError("explain: one of its first two arguments must be callable")
        return explain(args[0], call, *args[1:], **kwargs)
    explanation = Explanation()
    token = _recorder.set(explanation)
    try:
        call(*args, **kwargs)
    finally:
        _recorder.reset(token)
    return explanation


def note_plan(plan: Any) -> None:
    """Called by a backend while it runs: `explain` shows this plan, of a function what it gives."""
    recorder = _recorder.get()
    if recorder is not None and recorder.decisions:
        made = plan() if callable(plan) else plan
        recorder.decisions[-1] = replace(recorder.decisions[-1], plan=made)


def note_tile(text: str) -> None:
    """The same of a tile that was measured on this GPU."""
    recorder = _recorder.get()
    if recorder is not None and recorder.decisions:
        last = recorder.decisions[-1]
        recorder.decisions[-1] = replace(last, tiles=(*last.tiles, *[text] * (text not in last.tiles)))


def missing_backends() -> dict[str, str]:
    """The backends that cannot run at all on this machine, each with its reason."""
    return {b: "this version has no such kernels" for b in BACKENDS if b not in _there} | _missing


def refusals(name: str, args: tuple[Any, ...]) -> dict[str, str | None]:
    """For each backend of an op, why it refuses these arguments; None if it accepts them."""
    found: dict[str, str | None] = dict.fromkeys(BACKENDS, NONE)
    found.update(missing_backends())
    call = _structures[name](*args)
    for backend, implementation in _implementations[name].items():
        # where the tensors are comes first: another dtype would not help on a machine without a GPU
        elsewhere = _refuse_device(call[0]) if backend in ON_GPU else None
        found[backend] = elsewhere or implementation.refusal(call)
    return found


def choose_implementation(name: str, call: Any) -> Implementation:
    """The implementation that runs a call, a structure as `declare` has it.

    Raises:
        NotImplementedError: the forced backend refuses, or no backend accepts; the message gives
            each reason.
    """
    implementations = _implementations[name]
    forced = forced_backend()
    x = call[0]
    order = (forced,) if forced else PREFERENCE.get("cpu" if x.is_cpu else x.device.type, ("reference",))
    for backend in order:
        implementation = implementations.get(backend)
        if implementation is not None and implementation.refusal(call) is None:
            # float64 is the reference's own: no kernel computes it
            if backend == "reference" and not forced and len(order) > 1 and x.dtype is not torch.float64:
                _warn_of_fallback(name, order, call)
            if _recorder.get() is not None:
                _record_decision(name, f"{backend} (simulated)" if simulates() else backend, call, bool(forced))
            return implementation
    reasons = refusals(name, call)
    if forced:
        raise NotImplementedError(f"{name} cannot run on {forced}: {reasons[forced]}")
    raise NotImplementedError(f"{name}: no backend accepts these arguments: {reasons}")


def _record_decision(name: str, chosen: str, args: tuple[Any, ...], forced: bool) -> None:
    recorder = _recorder.get()
    assert recorder is not None
    reasons = refusals(name, args)
    order = PREFERENCE.get(args[0].device.type, ("reference",))
    others = {}
    for backend in BACKENDS:
        if backend == chosen.split()[0]:
            continue
        reason = reasons[backend]
        if reason is None:
            reason = f"{chosen} is forced" if forced else f"{chosen} comes first"
            if backend not in order:
                reason = f"does not run on {args[0].device.type}"
        others[backend] = reason
    recorder.decisions.append(Decision(name, chosen, others))


def warn_of_missing() -> None:
    """Says once, when the package is imported, that the CPU's kernels are not there; nothing if
    that was asked for."""
    reason = _missing.get("cpu")
    if reason and not reason.endswith(LEFT_OUT):
        _warned.add(("", f"cpu: {reason}"))
        message = f"lora_kernels runs on the slow reference on CPUs. cpu: {reason}"
        warnings.warn(message, FallbackWarning, stacklevel=3)


def _warn_of_fallback(name: str, order: tuple[str, ...], args: tuple[Any, ...]) -> None:
    reasons = refusals(name, args)
    reason = "; ".join(f"{b}: {reasons[b]}" for b in order if b != "reference")
    # whatever the op and its arguments
    absent = all(b in _missing for b in order if b != "reference")
    key = "" if absent else name, reason
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"{name} runs on the slow reference. {reason}", FallbackWarning, stacklevel=5)


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, found {backend!r}")


_FROM_ENVIRONMENT = os.environ.get("LORA_KERNELS_BACKEND") or None
if _FROM_ENVIRONMENT:
    _check_name(_FROM_ENVIRONMENT)
