"""A layer is changed in one thread while another calls it: each call computes with the layer as it
was before the change, or as it is after.

A change is counted when it begins and when it has ended. A call that finds another count than it
began with computed with parts of both, and computes again. So calls take no lock and do not wait
for one another.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

TRIES = 3  # before a call waits for whoever changes the layer
_writing = threading.RLock()  # one change at a time, in the whole process: they are rare and short


class Changing(Protocol):
    _changes: int
    """Odd while somebody changes the layer."""


Call = TypeVar("Call", bound=Callable[..., Any])


@contextmanager
def changing(*layers: Changing) -> Iterator[None]:
    """Around the statements that change what a layer computes."""
    with _writing:
        begun = [layer for layer in layers if layer._changes % 2 == 0]  # the others are in a change already
        for layer in begun:
            layer._changes += 1
        try:
            yield
        finally:
            for layer in begun:
                layer._changes += 1


def of_one_state(forward: Call) -> Call:
    """Decorates the forward of a layer. While it is compiled there is one thread."""

    @functools.wraps(forward)
    def call(self: Changing, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        before = self._changes
        if before % 2 == 0:
            try:
                y = forward(self, *args, **kwargs)
            except Exception:
                if self._changes == before:
                    raise
            else:
                if self._changes == before:
                    return y
        return call_of_one_state((self,), lambda: forward(self, *args, **kwargs))

    return call  # type: ignore[return-value]


def call_of_one_state(layers: Sequence[Changing], compute: Callable[[], Any]) -> Any:
    """compute(), which reads the layers, again until nobody changed them meanwhile."""
    for _ in range(TRIES):
        with _writing:
            before = [layer._changes for layer in layers]
        try:
            y = compute()
        except Exception:
            if [layer._changes for layer in layers] == before:
                raise
        else:
            if [layer._changes for layer in layers] == before:
                return y
    with _writing:
        return compute()
