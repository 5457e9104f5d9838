"""Steps that Ctrl-C must not cut in two."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Signals that Python code handles wait in the block. The function that it yields lets those
    that came so far act, so that what one raises can still be undone; the rest act at the end.

    They come to the main thread alone, so elsewhere this does nothing.
    """
    waiting: list[int] = []
    before: dict[int, Handler] = {}
    holding = True

    def hold(number: int, frame: FrameType | None) -> None:
        if holding:
            waiting.append(number)
        else:
            # a block whose end was itself cut short leaves this handler behind
            before[number](number, frame)

    def act() -> None:
        while waiting:
            number = waiting.pop(0)
            before[number](number, None)

    try:
        if threading.current_thread() is threading.main_thread():
            for each in signal.valid_signals():
                handler = signal.getsignal(each)
                if callable(handler):
                    before[each] = handler
                    signal.signal(each, hold)
        yield act
    finally:
        holding = False
        for held, handler in before.items():
            signal.signal(held, handler)
        act()
