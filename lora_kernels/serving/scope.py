"""Which batch a call belongs to: by context, by generator, by thread."""

import asyncio
import contextlib
import inspect
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import thread as executors
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet, ref

from lora_kernels.serving.frame import Frame

if TYPE_CHECKING:
    from lora_kernels.serving.batch import Batch

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
OTHERS = (
    "the model was called without adapters= while a pool.batch is open {where}; say adapters=[None, ...] for the base,"
    " or run the call in that context (contextvars.copy_context().run)"
)


class Opening:
    """An entered batch: who entered it."""

    __slots__ = "batch", "before", "code", "frame", "generator", "task", "thread"

    def __init__(self, batch: "Batch", frame: Any, before: Frame | None) -> None:
        self.batch, self.thread, self.before = ref(batch), threading.get_ident(), before
        self.generator = frame if frame.f_code.co_flags & _GENERATOR else None
        self.task = None if self.generator is None else _task()
        # by number: a reference would keep what the caller's variables hold
        self.frame, self.code = id(frame), frame.f_code


class Scope:
    """Of one pool: the frame that is current in a context, and the batches that are open."""

    def __init__(self) -> None:
        self.current: ContextVar[Frame | None] = ContextVar("frame", default=None)
        self.streams: ContextVar[tuple[Opening, ...]] = ContextVar("streams", default=())
        """Those that a generator has entered in this context, or in one that it was copied from."""
        self.openings: list[Opening] = []
        self.generators = 0
        """How many of them a generator has entered."""
        self.block: Any = None
        """Of the model itself, where it sends rows to experts."""
        self.unsure = True
        """Whether layers may see what nothing is known of."""
        self.why = ""
        """What a model raised when it was tried on other sequences."""
        self.detached = False
        scopes.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scope":
        """A copy of a served model has slots that no pool keeps: it is nobody's."""
        copy = memo[id(self)] = Scope()
        copy.detached = True
        return copy

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a served model cannot be pickled, since its layers are those of its pool; unserve(model) first")

    def open(self, batch: "Batch") -> Opening:
        """Makes a batch current for its caller."""
        opening = Opening(batch, _caller(sys._getframe(2)), self.current.get())
        frame = batch.requests.frame()
        if self.generators:
            frame.around = self.generators_around()
        self.openings.append(opening)
        if threading.Thread.start is not _start or ThreadPoolExecutor.submit is not _submit:
            _inherit()
        if opening.generator is None:
            self.current.set(frame)
        else:
            self.generators += 1
            self.streams.set((*(each for each in self.streams.get() if each in self.openings), opening))
        return opening

    def shut(self, opening: Opening) -> None:
        """Ends what `open` began, in whichever context."""
        self.forget(opening)
        now = self.current.get()
        if opening.generator is None and now is not None:
            batch = opening.batch()
            if batch is not None and now.batch is batch.requests:
                self.current.set(opening.before)

    def which(self, openings: list[Opening]) -> int:
        """The one that the caller entered last."""
        caller = id(_caller(sys._getframe(2)))
        return max((i for i, each in enumerate(openings) if each.frame == caller), default=len(openings) - 1)

    def forget(self, opening: Opening) -> None:
        if opening in self.openings:
            self.openings.remove(opening)
            self.generators -= opening.generator is not None

    def resolve(self) -> Frame | None:
        """The frame that a call belongs to, or None: the base.

        Raises:
            RuntimeError: it runs beside an open batch and cannot be bound to it.
        """
        frame = self.current.get()
        if not self.openings or (frame is not None and not self.generators):
            return frame
        return self._among_open(frame, True)

    def quietly(self) -> Frame | None:
        frame = self.current.get()
        if not self.openings or (frame is not None and not self.generators):
            return frame
        return self._among_open(frame, False)

    def generators_around(self) -> tuple[Any, ...]:
        """The generators on this thread's stack that have a batch open."""
        generators = [each.generator for each in self.openings if each.generator is not None]
        return tuple(frame for frame in _stack(sys._getframe(1)) if frame in generators) if generators else ()

    def _among_open(self, frame: Frame | None, strict: bool) -> Frame | None:
        openings = [(each, batch) for each in self.openings if (batch := each.batch()) is not None]
        stack = list(_stack(sys._getframe(1)))
        generators = {each.generator: batch for each, batch in openings if each.generator is not None}
        inner = next((each for each in stack if each in generators), None) if generators else None
        if inner is not None and (frame is None or inner not in frame.around):
            found = generators[inner].requests.frame()
            found.around = tuple(each for each in stack if each in generators)
            return found
        frame = frame or _thread.frames.get(self)
        if frame is not None or not strict:
            return frame
        me, numbers = threading.get_ident(), {id(each): each.f_code for each in stack}
        running: set[Any] | None = None
        for each in self.streams.get():
            if each in self.openings and (each.thread != me or each.task is not _task()):
                raise RuntimeError(OTHERS.format(where="in a generator"))
        for each, _ in openings:
            if each.generator is not None:
                if running is None:
                    others = [top for thread, top in sys._current_frames().items() if thread != me]
                    running = {one for top in others for one in _stack(top)}
                if each.generator in running:
                    raise RuntimeError(OTHERS.format(where="in another thread"))
            elif each.thread != me:
                raise RuntimeError(OTHERS.format(where="in another thread"))
            elif numbers.get(each.frame) is each.code:
                raise RuntimeError(OTHERS.format(where="around it, in another context"))
        return None


class _Thread(threading.local):
    """What a call took along into its thread, where it runs in a context of its own there."""

    def __init__(self) -> None:
        self.frames: dict[Scope, Frame] = {}


_thread = _Thread()
scopes: "WeakSet[Scope]" = WeakSet()
_lock = threading.RLock()


def _task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _stack(frame: Any) -> Any:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _caller(frame: Any) -> Any:
    """Who holds a batch that this frame enters: what contextlib enters, its user holds."""
    library = contextlib.__file__
    while frame.f_back is not None:
        by_library = frame.f_code.co_filename == library
        resumed = frame.f_code.co_flags & _GENERATOR and frame.f_back.f_code.co_filename == library
        if not by_library and not resumed:
            break
        frame = frame.f_back
    return frame


def _inherit() -> None:
    """From now on threads and executors take open batches along."""
    for owner, name, ours in _PATCHES:
        if getattr(owner, name) is not ours:
            with _lock:
                _before[ours] = getattr(owner, name)
                setattr(owner, name, ours)


def _as_before() -> None:
    """Threads and executors are Python's own again, if no batch is open."""
    with _lock:
        for owner, name, ours in _PATCHES:
            if getattr(owner, name) is ours and not any(scope.openings for scope in list(scopes)):
                setattr(owner, name, _before[ours])


def _bindings() -> list[tuple[Scope, Frame]]:
    found = ((scope, scope.quietly()) for scope in list(scopes))
    return [(scope, frame) for scope, frame in found if frame is not None]


def _bound(call: Any, bindings: list[tuple[Scope, Frame]]) -> Any:
    def call_bound(*args: Any, **kwargs: Any) -> Any:
        tokens = [(scope, scope.current.set(frame)) for scope, frame in bindings]
        before, _thread.frames = _thread.frames, dict(bindings)
        try:
            return call(*args, **kwargs)
        finally:
            _thread.frames = before
            for scope, token in tokens:
                scope.current.reset(token)

    return call_bound


def _start(thread: threading.Thread) -> None:
    # an executor's worker outlives the batch: its tasks are bound instead
    worker = getattr(thread, "_target", None) is executors._worker
    bindings = [] if worker else _bindings()
    if bindings:
        thread.run = _bound(thread.run, bindings)  # type: ignore[method-assign]
    _as_before()
    _before[_start](thread)


def _submit(executor: ThreadPoolExecutor, call: Any, /, *args: Any, **kwargs: Any) -> Any:
    bindings = _bindings()
    _as_before()
    return _before[_submit](executor, _bound(call, bindings) if bindings else call, *args, **kwargs)


_before: dict[Any, Any] = {_start: threading.Thread.start, _submit: ThreadPoolExecutor.submit}
_PATCHES = ((threading.Thread, "start", _start), (ThreadPoolExecutor, "submit", _submit))
