"""Calls of a LoRA layer with the hooks of its inner modules run around the kernels.

PEFT calls the inner modules one after another. Here they are called inside one another, each with
the layer's input, and the kernels run innermost, where all of the weights are. What runs around
them must be known to leave input and output as they are (`hooks.moves_weights`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.integrations.peft.groups import KEY as SIBLINGS
from lora_kernels.integrations.peft.hooks import EVERY, FSDP1, HOOKED, has_hooks, moves_weights, plain_class
from lora_kernels.integrations.peft.linear import WAYS, Linear, Way, input_refusal, other_way, run_fused
from lora_kernels.integrations.peft.parallel import is_parallel, read_parallel, run_shards
from lora_kernels.integrations.peft.state import read_state
from lora_kernels.nn.base import HOOKS
from lora_kernels.nn.flat_parameters import VIEWS, registered
from lora_kernels.ops.lora_linear.layouts import is_strided

_REPLACED = ("forward", "_old_forward", "_hf_hook")


def run_hooked(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a call with the hooks of the layer's inner modules run around it, or why PEFT
    must run it."""
    if args or kwargs or torch.compiler.is_compiling():
        return HOOKED
    # it would see calls of inner modules with the layer's input and output
    if _has_any_global_hook():
        return EVERY
    if is_parallel(layer):
        return run_shards(layer, x)
    # the dtypes of weights that are elsewhere are looked at inside
    if reason := input_refusal(layer, x, (x, None, x)) or _refusal(layer, x):
        return reason

    def innermost(x: Tensor) -> Tensor:
        # the weights of a sibling are not there
        siblings = vars(layer).pop(SIBLINGS, None)
        try:
            with stripped(layer):
                y = run_fused(layer, x, (), {})
                return Linear.forward(layer, x) if y is None else y
        finally:
            if siblings is not None:
                vars(layer)[SIBLINGS] = siblings

    modules = [module for *_, module in _hooked(layer)]
    if x.dim() == 2 or not is_strided(x) or any(type(v).__name__ != "DoraLinearVariant" for v in layer.lora_variant.values()):
        return _call_inside(modules, x, innermost)
    # what FSDP hangs on an output that is a view is lost once that is changed in place
    y = _call_inside(modules, x.reshape(-1, x.shape[-1]), innermost)
    return y.view(*x.shape[:-1], y.shape[-1])


def read_hooked(layer: Any) -> Any:
    """The state inside the hooks, or a reason."""
    if is_parallel(layer):
        return read_parallel(layer)
    if reason := _refusal(layer, None):
        return reason
    with stripped(layer):
        state = read_state(layer)
        return other_way(state, lambda way: state if way.read is None else way.read(layer))


def run_views(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a call whose weights are FSDP's views, or why PEFT must run it."""
    with registered(layer):
        y = run_fused(layer, x, args, kwargs)
    return Linear.forward(layer, x, *args, **kwargs) if y is None else y


def _refusal(layer: Any, x: Tensor | None) -> str | None:
    """Why the hooks on the layer's inner modules cannot run around the kernels, for an input or for
    any."""
    for _, _, module in _hooked(layer):
        if reason := moves_weights(module, x):
            return reason
    return None


@contextmanager
def stripped(layer: Any) -> Iterator[None]:
    """Inside it the layer's inner modules have the same parameters and no hooks."""
    places = list(_hooked(layer))
    for modules, name, module in places:
        modules[name] = _without_hooks(module)
    try:
        yield
    finally:
        for modules, name, module in places:
            modules[name] = module


def _hooked(layer: Any) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """The inner modules that the layer's next call may call and that have hooks, each with its
    place."""
    children = layer._modules
    places = [(children, "base_layer")]
    for group in ("lora_dropout", "lora_A", "lora_B", "lora_magnitude_vector"):
        modules = children[group]._modules
        places += [(modules, name) for name in layer.active_adapters if name in modules]
    for modules, name in places:
        module = modules[name]
        if has_hooks(module) or type(module).__name__ == FSDP1 or plain_class(module) is not type(module):
            yield modules, name, module


def _without_hooks(module: nn.Module) -> nn.Module:
    module = _wrapped(module)
    cls = plain_class(module)
    bare: nn.Module = cls.__new__(cls)
    vars(bare).update(vars(module))
    for hooks in HOOKS[:-1]:
        vars(bare)[hooks] = {}
    for attribute in _REPLACED:
        vars(bare).pop(attribute, None)
    return bare


def _wrapped(module: Any) -> nn.Module:
    return module._fsdp_wrapped_module if type(module).__name__ == FSDP1 else module


def _call_inside(modules: list[nn.Module], x: Tensor, innermost: Callable[[Tensor], Tensor]) -> Tensor:
    """innermost(x) inside the calls of all modules: each one's forward is that of the next."""
    if not modules:
        return innermost(x)
    first, rest = modules[0], modules[1:]
    owner = vars(_wrapped(first))
    slot = "_old_forward" if "_hf_hook" in owner else "forward"
    held = owner.get(slot)
    owner[slot] = lambda x, *_, **__: _call_inside(rest, x, innermost)
    try:
        return first(x)
    finally:
        if held is None:
            owner.pop(slot, None)
        else:
            owner[slot] = held


WAYS[HOOKED] = Way(run_hooked, read_hooked)
WAYS[VIEWS] = Way(run_views)
