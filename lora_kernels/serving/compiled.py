"""What a compiled model leaves to Python: at each call, outside its graphs."""

import sys
from collections.abc import Callable
from typing import Any

import torch


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class _Outside:
    """`call`, which Dynamo does not look into once there is a Dynamo; it takes a second to import,
    so nothing here is the first to."""

    call = staticmethod(call)


outside = _Outside()


def prepare() -> None:
    """Before a call that may be compiled."""
    if outside.call is call and "torch._dynamo" in sys.modules:
        outside.call = torch.compiler.disable(call)
