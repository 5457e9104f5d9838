"""Calls of a LoRA layer with the hooks of its inner modules run around the kernels.

PEFT calls the inner modules one after another. Here they are called inside one another, each with
the layer's input, and the kernels run innermost, where all of the weights are. What runs around
them must be known to leave input and output as they are (`hooks.moves_weights`).

For the time of a call an inner module's forward is another. One thread at a time calls a layer so,
and what others call meanwhile is the module's own.
"""

from collections.abc import Callable, Iterator
from threading import RLock, get_ident
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.integrations.peft.groups import KEY as SIBLINGS
from lora_kernels.integrations.peft.hooks import EVERY, FSDP1, HOOKED, has_hooks, moves_weights, plain_class
from lora_kernels.integrations.peft.linear import WAYS, Way, input_refusal, other_way, run_fused, share_kept
from lora_kernels.integrations.peft.parallel import is_parallel, read_parallel, run_shards
from lora_kernels.integrations.peft.state import read_state
from lora_kernels.nn.base import HOOKS
from lora_kernels.nn.flat_parameters import VIEWS, registered
from lora_kernels.ops.lora_linear.layouts import is_strided

_REPLACED = ("forward", "_old_forward", "_hf_hook")
_GROUPS = ("lora_dropout", "lora_A", "lora_B", "lora_magnitude_vector")
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def lock_of(layer: nn.Module) -> Any:
    """Held while inner modules of the layer have another forward."""
    return _locks.setdefault(layer, RLock())


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
    if reason := input_refusal(layer, x, (x, None, x)):
        return reason
    with lock_of(layer):
        return _refusal(layer, x) or _run_inside(layer, x)


def _run_inside(layer: Any, x: Tensor) -> Tensor:
    def innermost(x: Tensor) -> Tensor:
        bare = _bare_layer(layer)
        y = run_fused(bare, x, (), {})
        return _stock_forward(bare, x) if y is None else y

    modules = [module for *_, module in _hooked(layer)]
    if x.dim() == 2 or not is_strided(x) or any(type(v).__name__ != "DoraLinearVariant" for v in layer.lora_variant.values()):
        return call_inside(modules, x, innermost)
    # what FSDP hangs on an output that is a view is lost once that is changed in place
    y = call_inside(modules, x.reshape(-1, x.shape[-1]), innermost)
    return y.view(*x.shape[:-1], y.shape[-1])


def read_hooked(layer: Any) -> Any:
    """The state inside the hooks, or a reason."""
    if is_parallel(layer):
        return read_parallel(layer)
    with lock_of(layer):
        if reason := _refusal(layer, None):
            return reason
        bare = _bare_layer(layer)
    state = read_state(bare)
    return other_way(state, lambda way: state if way.read is None else way.read(bare))


def run_views(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a call whose weights are FSDP's views, or why PEFT must run it."""
    with lock_of(layer), registered(layer):
        y = run_fused(layer, x, args, kwargs)
    return _stock_forward(layer, x, *args, **kwargs) if y is None else y


def _stock_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """PEFT's own."""
    stock: Any = next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("peft."))
    return stock.forward(layer, x, *args, **kwargs)


def _refusal(layer: Any, x: Tensor | None) -> str | None:
    """Why the hooks on the layer's inner modules cannot run around the kernels, for an input or for
    any."""
    for _, _, module in _hooked(layer):
        if reason := moves_weights(module, x):
            return reason
    return None


def _bare_layer(layer: Any) -> Any:
    """The layer with the same parameters, and no hooks on its inner modules; alone, since the
    weights of its siblings are not there."""
    bare: Any = _copy(layer, type(layer))
    vars(bare).pop(SIBLINGS, None)
    children = vars(bare)["_modules"] = dict(layer._modules)
    for group in _GROUPS:
        copy = children[group] = _copy(layer._modules[group], type(layer._modules[group]))
        vars(copy)["_modules"] = dict(copy._modules)
    for modules, name, module in list(_hooked(bare)):
        modules[name] = _without_hooks(module)
    share_kept(layer, bare)
    return bare


def _copy(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Another module with the same attributes."""
    copy: nn.Module = cls.__new__(cls)
    vars(copy).update(vars(module))
    return copy


def _hooked(layer: Any) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """The inner modules that the layer's next call may call and that have hooks, each with its
    place."""
    children = layer._modules
    places = [(children, "base_layer")]
    for group in _GROUPS:
        modules = children[group]._modules
        places += [(modules, name) for name in layer.active_adapters if name in modules]
    for modules, name in places:
        module = modules[name]
        if has_hooks(module) or type(module).__name__ == FSDP1 or plain_class(module) is not type(module):
            yield modules, name, module


def _without_hooks(module: nn.Module) -> nn.Module:
    module = _wrapped(module)
    bare = _copy(module, plain_class(module))
    for hooks in HOOKS[:-1]:
        vars(bare)[hooks] = {}
    for attribute in _REPLACED:
        vars(bare).pop(attribute, None)
    return bare


def _wrapped(module: Any) -> nn.Module:
    return module._fsdp_wrapped_module if type(module).__name__ == FSDP1 else module


def call_inside(modules: list[nn.Module], x: Tensor, innermost: Callable[[Tensor], Tensor]) -> Tensor:
    """innermost(x) inside the calls of all modules: each one's forward is that of the next. Wants
    the lock of their layer."""
    if not modules:
        return innermost(x)
    first, rest, thread = modules[0], modules[1:], get_ident()
    inner = _wrapped(first)
    owner = vars(inner)
    slot = "_old_forward" if "_hf_hook" in owner else "forward"
    held = owner.get(slot)
    own = MethodType(type(inner).forward, inner) if held is None else held

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        return call_inside(rest, x, innermost) if get_ident() == thread else own(x, *args, **kwargs)

    owner[slot] = forward
    try:
        return first(x)
    finally:
        if held is None:
            owner.pop(slot, None)
        else:
            owner[slot] = held


WAYS[HOOKED] = Way(run_hooked, read_hooked)
WAYS[VIEWS] = Way(run_views)
