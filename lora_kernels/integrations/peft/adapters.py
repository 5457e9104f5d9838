"""What the kinds of PEFT's layers share: which calls none of them takes, and of those besides the
linear one the active adapters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.integrations.peft.bias import ON_META as ON_META
from lora_kernels.integrations.peft.devices import NO_CPU_KERNELS, device_refusal
from lora_kernels.integrations.peft.hooks import EVERY, global_hooks_look_inside
from lora_kernels.integrations.peft.state import DISABLED, PLAIN, type_name
from lora_kernels.ops.lora_linear.op import FLOATS

_compiling = torch.compiler.is_compiling
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state


def layer_refusal(layer: Any) -> str | None:
    """Why PEFT's own forward must run, whatever the adapters are."""
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return "an adapter is merged into the base weight"
    return None


def active_names(layer: Any, adapters: Any) -> list[str]:
    """The active adapters that have weights here, in PEFT's order."""
    names = layer._active_adapter
    return [name for name in ([names] if type(names) is str else names) if name in adapters]


def factors_refusal(a: Any, b: Any) -> str | None:
    """Why A and B go to PEFT's forward."""
    if type(a) not in PLAIN or type(b) not in PLAIN:
        return f"the weights of A and B are {type_name(a)} and {type_name(b)}"
    if a.dtype is not b.dtype or a.dtype not in FLOATS:
        return f"the weights of A and B are {a.dtype} and {b.dtype}"
    return None


def frozen_refusal(w: Any) -> str | None:
    """Why DoRA's norm cannot be taken of this base weight."""
    if type(w) not in PLAIN:
        return f"the base weight is {type_name(w)}"
    if w.dtype not in FLOATS or w.layout is not torch.strided or w.is_meta:
        return f"the base weight is {'on the meta device' if w.is_meta else f'{w.dtype} and {w.layout}'}"
    return "the base weight requires grad" if w.requires_grad else None


def call_refusal(x: Any) -> str | None:
    """Why a call with this input goes to PEFT's forward, whatever the layer."""
    if not _compiling():
        if type(x) not in PLAIN:
            return f"the input is {type_name(x)}"
        if (reason := watcher_refusal()) is not None:
            return reason
    return device_refusal(x) if NO_CPU_KERNELS or not x.is_cpu else None


def watcher_refusal() -> str | None:
    """Why any call goes to PEFT's forward now: something wants to see what runs there."""
    if _functorch_level() is not None or _tracing() is not None or forward_ad._current_level >= 0:
        return "a functional transform, a trace or forward-mode differentiation is under way"
    return EVERY if _has_any_global_hook() and global_hooks_look_inside() else None


def on_meta(tensors: Any) -> bool:
    """Whether an adapter's weights were not loaded yet."""
    return any(isinstance(t, Tensor | nn.Parameter) and t.is_meta for t in tensors)
