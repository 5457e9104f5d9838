"""Modules that compute with a layer's weight without calling the layer: an adapter there has no
effect, in silence.

Torch's own encoder does so in eval mode, and can be kept off it. Of others the source says so:
Mamba's and WavLM's fused kernels, nn.MultiheadAttention.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

# what makes the condition of a fast path false, and leaves the other path as it is
_SWITCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_KEPT = "_before_lora_kernels"
_METADATA = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "data", "data_ptr", "is_cuda"}
_QUESTIONS = {"isinstance", "hasattr", "getattr"}
_SET_UP = ("init", "reset", "tie")


def fast_paths(model: nn.Module, is_layer: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The encoders of torch, by name, that would read the weight of such a layer past it."""
    kinds = tuple(kind for kind, *_ in _SWITCHES)
    encoders = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in encoders.items() if any(map(is_layer, module.modules()))}


def leave_fast_path(encoder: nn.Module) -> None:
    """Keeps an encoder on the path that calls its layers; it may be there already."""
    for kind, switch, off in _SWITCHES:
        if isinstance(encoder, kind) and _KEPT not in vars(encoder):
            setattr(encoder, _KEPT, (switch, getattr(encoder, switch)))
            setattr(encoder, switch, off)


def restore_fast_path(encoder: nn.Module) -> None:
    """Undoes `leave_fast_path`."""
    if _KEPT in vars(encoder):
        switch, before = getattr(encoder, _KEPT)
        setattr(encoder, switch, before)
        delattr(encoder, _KEPT)


def is_off_fast_path(module: nn.Module) -> bool:
    """Whether `leave_fast_path` keeps it there."""
    return _KEPT in vars(module)


def reader_of(model: nn.Module, name: str) -> str | None:
    """The class of a module that computes with the weight of model's layer `name` without calling
    it, as far as its source tells; None for the encoders that `leave_fast_path` handles."""
    kinds = tuple(kind for kind, *_ in _SWITCHES)
    of_class: Any = weights_read
    parts = name.split(".")
    for i in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:i]))
        if not isinstance(owner, kinds) and ".".join(parts[i:]) in of_class(type(owner)):
            return type(owner).__name__
    return None


@cache
def weights_read(kind: Any) -> frozenset[str]:
    """The submodules whose `weight` a module's methods compute with: "out_proj", "a.b"."""
    found: set[str] = set()
    for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(each).items():
            function = inspect.unwrap(function) if callable(function) else None
            if isinstance(function, FunctionType) and not any(word in name for word in _SET_UP):
                # its names tell at once what its source, which takes milliseconds, might say
                if "weight" in function.__code__.co_names:
                    found.update(_weights_of_self(function))
    return frozenset(found)


def _weights_of_self(function: FunctionType) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # made at run time
        return
    used = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
            continue
        path, *rest = ast.unparse(node.value).partition("self.")
        user = used[node]
        only_asked = (isinstance(user, ast.Attribute) and user.attr in _METADATA) or (
            isinstance(user, ast.Call) and isinstance(user.func, ast.Name) and user.func.id in _QUESTIONS
        )
        # a slice is Bloom's, which takes it only where a config asks for slow exactness
        if not path and rest[0] and not only_asked and not isinstance(user, ast.Subscript):
            yield rest[1]
