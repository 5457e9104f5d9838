"""Whether the call of a module runs more than its class's forward, and hooks that are known only
to bring a module's weights to its call.

The latter are told by their names, so that none of their libraries is imported here.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module

from lora_kernels.integrations.gathered import execution_device
from lora_kernels.nn.quantised import rounds_in_forward

HOOKED = "a hook waits for the call of base_layer, lora_A, lora_B or lora_dropout"
EVERY = "a hook waits for the call of every module"
FSDP1 = "FullyShardedDataParallel"
_ACCELERATE = "accelerate.hooks"
# file and function of the forward hooks of fully_shard and ZeRO-3
_GATHERING = (
    ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState."),
    ("deepspeed.runtime.zero.parameter_offload", "DeepSpeedZeRoOffload._register_deepspeed_module.<locals>."),
)
_TRACKER = ("torch.utils.module_tracker", "ModuleTracker")
_NAMED_IN_PROFILES = ("deepspeed.utils.nvtx", "instrument_w_nvtx.<locals>.wrapped_fn")


def global_hooks_look_inside() -> bool:
    """Whether a global hook may want the calls of a layer's inner modules, or change what they
    give.

    Not ModuleTracker, which keeps the names of the modules that are being called, and not one whose
    attribute `whole_lora_layers` is true.
    """
    for hooks in (_module._global_forward_pre_hooks, _module._global_forward_hooks):
        for hook in hooks.values():
            owner = type(getattr(hook, "__self__", None))
            tracks = (owner.__module__, owner.__qualname__) == _TRACKER
            if not tracks and getattr(hook, "whole_lora_layers", False) is not True:
                return True
    return bool(_module._global_backward_hooks or _module._global_backward_pre_hooks)


def has_hooks(module: nn.Module) -> Any:
    """Whether calling the module runs more than its class's forward, which accelerate and `kernels`
    replace."""
    return (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not is_own(module, "forward") and rounds_in_forward(module) is not None)
    )


def is_own(module: nn.Module, attribute: str) -> bool:
    """Whether the instance holds its class's own bound forward: accelerate leaves it there when its
    hook is removed."""
    held = module.__dict__.get(attribute)
    return type(held) is MethodType and held.__self__ is module and held.__func__ is type(module).forward


def moves_weights(module: Any, x: Tensor | None = None) -> str | None:
    """None if all that runs around the module's forward leaves x and the output as they are; else
    the reason, or "" where it is a hook of the user's."""
    if type(module).__name__ == FSDP1:
        return _own_hooks(module) or _own_hooks(module._fsdp_wrapped_module) or _casts_in_fsdp(module.mixed_precision, x)
    held = vars(module)
    if "_hf_hook" in held:
        if not is_own(module, "_old_forward"):
            return HOOKED
        for hook in _accelerate_hooks(held["_hf_hook"]):
            if (reason := _moves_in_accelerate(hook, x)) is not None:
                return reason
    elif "forward" in held and not is_own(module, "forward") and (reason := rounds_in_forward(module)) is not None:
        return reason or HOOKED
    return _own_hooks(module, x)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before `fully_shard` derived one from it."""
    cls = type(module)
    if len(cls.__bases__) == 2 and cls.__bases__[0].__name__ == "FSDPModule" and cls.__name__.startswith("FSDP"):
        return cls.__bases__[1]
    return cls


def _own_hooks(module: Any, x: Tensor | None = None) -> str | None:
    if module._backward_hooks or module._backward_pre_hooks:
        return HOOKED
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if not _gathers(hook):
            return HOOKED
        policy = getattr(getattr(hook, "__self__", None), "_mp_policy", None)
        if policy is not None and (reason := _casts_in_fsdp(policy, x)) is not None:
            return reason
    return None


def _gathers(hook: Any) -> bool:
    where, name = getattr(hook, "__module__", ""), getattr(hook, "__qualname__", "")
    if (where, name) == _NAMED_IN_PROFILES:
        return any(_gathers(cell.cell_contents) for cell in hook.__closure__)
    return any(where == file and name.startswith(function) for file, function in _GATHERING)


def _casts_in_fsdp(policy: Any, x: Tensor | None) -> str | None:
    """Whether FSDP's mixed precision would cast the layer's input, or its output."""
    casts = x is not None and policy.cast_forward_inputs and policy.param_dtype not in (None, x.dtype)
    if casts or getattr(policy, "output_dtype", None) is not None:
        return "the mixed precision of FSDP casts inputs or outputs of base_layer, lora_A or lora_B"
    return None


def _accelerate_hooks(hook: Any) -> Iterator[Any]:
    if _is_accelerates(hook, "SequentialHook"):
        for each in hook.hooks:
            yield from _accelerate_hooks(each)
    else:
        yield hook


def _is_accelerates(hook: Any, name: str) -> bool:
    return type(hook).__module__ == _ACCELERATE and type(hook).__qualname__ == name


def _moves_in_accelerate(hook: Any, x: Tensor | None) -> str | None:
    if not _is_accelerates(hook, "AlignDevicesHook"):
        return HOOKED
    if x is not None and hook.execution_device is not None and execution_device(hook, x.device.type) != x.device:
        return "accelerate runs base_layer, lora_A or lora_B on another device than the input's"
    return None
