"""Whether the call of a module runs more than its class's forward."""

from types import MethodType
from typing import Any

from torch import nn


def has_hooks(module: nn.Module) -> Any:
    """Whether calling the module runs more than its class's forward, which accelerate and `kernels`
    replace."""
    return (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not is_own(module, "forward"))
    )


def is_own(module: nn.Module, attribute: str) -> bool:
    """Whether the instance holds its class's own bound forward: accelerate leaves it there when its
    hook is removed."""
    held = module.__dict__.get(attribute)
    return type(held) is MethodType and held.__self__ is module and held.__func__ is type(module).forward
