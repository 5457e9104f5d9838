"""PEFT's LoRA linear layer with a forward on our kernels. Importing this file imports PEFT.

PEFT owns the layer: its parameters, names and methods stay, and any of them may change between two
calls. So each call reads the state anew, and what the kernels do not cover goes to PEFT's forward.
All that is remembered is DoRA's norm, under the bits it was computed from.
"""

from collections import Counter
from collections.abc import Iterable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import peft
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.integrations.report import Survey
from lora_kernels.ops import NormCache, dora_gain, lora_linear, weight_norm
from lora_kernels.ops.lora_linear.op import FLOATS

try:
    from peft.tuners.lora import variants
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.layer import Linear, LoraLayer
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = frozenset((w, a, a) for w in FLOATS for a in FLOATS)
# MiCA differs from LoRA only in what it initialises and trains
_COMPUTED_AS_LORA = tuple(v for v in (getattr(variants, "MiCALinearVariant", None),) if v is not None)
_compiling = torch.compiler.is_compiling
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
# one for each layer, whichever adapter is active: its key is what it was computed from
_norms: WeakKeyDictionary[nn.Module, NormCache] = WeakKeyDictionary()
_fallbacks: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()


class FusedLinear(Linear):
    """peft.tuners.lora.layer.Linear; a call that the kernels cover runs there, any other in PEFT's
    own forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = run_fused(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


def run_fused(layer: Linear, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What the kernels give for a call of PEFT's layer, or None where PEFT's own forward must run;
    the reason is counted."""
    state: Any = "the call has arguments besides the input" if args or kwargs else read_state(layer)
    reason = state if type(state) is str else _input_refusal(layer, x, state)
    if reason is not None:
        if not _compiling():
            _fallbacks.setdefault(layer, Counter())[reason] += 1
        return None
    w, bias, a, b, scale, dropout, magnitude = state
    gain = None if magnitude is None else _cached_gain(layer, w, a, b, scale, magnitude)
    return lora_linear(x, w, a, b, scale, bias, gain, dropout)


def read_state(layer: Any) -> Any:
    """What the layer's next call computes with, (w, bias, a, b, scale, dropout, magnitude), or why
    PEFT must run it.

    Reads the modules' own dictionaries: one lookup through nn.Module.__getattr__ costs as much as
    ten of these checks.
    """
    if layer._disable_adapters:
        return "the adapters are disabled"
    if layer.merged_adapters:
        return "an adapter is merged into the base weight"
    children: dict[str, Any] = layer._modules
    adapters = children["lora_A"]._modules
    name = layer._active_adapter
    if type(name) is not str:
        here = name if len(name) == 1 else [each for each in name if each in adapters]
        if len(here) > 1:
            return "several adapters are active"
        name = here[0] if here else None
    if name not in adapters:
        return "no active adapter has weights here"
    base, lora_a, lora_b = children["base_layer"], adapters[name], children["lora_B"]._modules[name]
    drop = children["lora_dropout"]._modules[name]
    if _has_hooks(base) or _has_hooks(lora_a) or _has_hooks(lora_b) or _has_hooks(drop):
        return "a hook waits for the call of base_layer, lora_A, lora_B or lora_dropout"
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"lora_A and lora_B are {_type_name(lora_a)} and {_type_name(lora_b)}"
    if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
        return f"base_layer is {_type_name(base)}"
    w: Any  # tensors only once their types are looked at
    a: Any
    b: Any
    w, a, b = base._parameters.get("weight"), lora_a._parameters.get("weight"), lora_b._parameters.get("weight")
    if type(w) not in _PLAIN or type(a) not in _PLAIN or type(b) not in _PLAIN:
        return f"the weights of base_layer, lora_A and lora_B are {_type_name(w)}, {_type_name(a)} and {_type_name(b)}"
    if (w.dtype, a.dtype, b.dtype) not in _DTYPES:
        return f"the weights of base_layer, lora_A and lora_B are {w.dtype}, {a.dtype} and {b.dtype}"
    if w.requires_grad:
        return "the base weight requires grad"
    if w.is_meta or w.layout is not torch.strided:
        return f"the base weight is {'on the meta device' if w.is_meta else w.layout}"
    if lora_a._parameters["bias"] is not None or lora_b._parameters["bias"] is not None:
        return "lora_bias adds a bias to lora_B"

    variant, magnitude = layer.lora_variant.get(name), None
    if variant is not None and type(variant) not in _COMPUTED_AS_LORA:
        dora = children["lora_magnitude_vector"]._modules.get(name)
        if type(variant) is not variants.DoraLinearVariant or type(dora) is not DoraLinearLayer or _has_hooks(dora):
            return f"{_type_name(variant)} is not covered"
        magnitude = dora._parameters["weight"]
        if type(magnitude) not in _PLAIN:
            return f"lora_magnitude_vector is {_type_name(magnitude)}"
    dropout = 0.0
    if type(drop) is nn.Dropout:
        if drop.training and (magnitude is None or layer.training):
            dropout = drop.p
        if drop.inplace or dropout >= 1.0:
            return f"lora_dropout is {drop}"
    elif type(drop) is not nn.Identity:
        return f"lora_dropout is {_type_name(drop)}"
    bias: Any = base._parameters["bias"]
    if bias is not None and type(bias) not in _PLAIN:
        return f"the bias of base_layer is {_type_name(bias)}"
    w = w.t() if layer.fan_in_fan_out else w
    return w, bias, a, b, layer.scaling[name], dropout, magnitude


def _has_hooks(module: nn.Module) -> Any:
    """Whether calling the module runs more than its class's forward, which accelerate and `kernels`
    replace."""
    return (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not _is_own(module, "forward"))
    )


def _is_own(module: nn.Module, attribute: str) -> bool:
    """Whether the instance holds its class's own bound forward: accelerate leaves it there when its
    hook is removed."""
    held = module.__dict__.get(attribute)
    return type(held) is MethodType and held.__self__ is module and held.__func__ is type(module).forward


def _type_name(thing: Any) -> str:
    return "missing" if thing is None else type(thing).__name__


def _input_refusal(layer: Linear, x: Tensor, state: Any) -> str | None:
    """Why this input goes to PEFT's forward, which also raises its own error where it cannot take
    it."""
    w, a = state[0], state[2]
    if not _compiling():
        if type(x) not in _PLAIN:
            return f"the input is {_type_name(x)}"
        if _functorch_level() is not None or _tracing() is not None or forward_ad._current_level >= 0:
            return "a functional transform, a trace or forward-mode differentiation is under way"
        if _has_any_global_hook():
            return "a hook waits for the call of every module"
    if x.dtype is not w.dtype or (x.dtype is not a.dtype and not layer.cast_input_dtype_enabled):
        same = (x.dtype is torch.float64) == (w.dtype is torch.float64)
        if not (torch.is_autocast_enabled(x.device.type) and x.dtype in FLOATS and same):
            return f"the input is {x.dtype}, its casting is {'on' if layer.cast_input_dtype_enabled else 'off'}"
    return None


def _cached_gain(layer: Linear, w: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, magnitude: Tensor) -> Tensor:
    if _compiling():
        with torch.no_grad():
            norm = weight_norm(w, a, b, scale)
        return dora_gain(magnitude.to(norm.dtype), norm)
    cache = _norms.get(layer)
    if cache is None:
        cache = _norms[layer] = NormCache()
    return cache.gain(w, a, b, scale, magnitude)


def forget(layer: nn.Module) -> None:
    """Drops the layer's norm and gain."""
    _norms.pop(layer, None)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers of every kind, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def class_refusal(layer: nn.Module) -> str | None:
    """Why the layer can never become a FusedLinear; None if it can or is one."""
    if type(layer) not in (Linear, FusedLinear):
        return f"{_type_name(layer)} layers are not covered"
    held = "_old_forward" if "_hf_hook" in layer.__dict__ else "forward"
    if held in layer.__dict__ and not _is_own(layer, held):
        return "its forward is replaced on the instance"
    return None


def survey_layer(name: str, layer: nn.Module, survey: Survey) -> None:
    """Adds to the survey what the layer's next call would do if it were a FusedLinear."""
    state: Any = class_refusal(layer) or read_state(layer)
    if isinstance(state, str):
        survey.left[name] = state
        return
    w, bias, a, b, scale, dropout, magnitude = state
    if a.is_meta or b.is_meta or (magnitude is not None and magnitude.is_meta):
        survey.left[name] = "the adapter's weights are on the meta device; once they are loaded it runs on the kernels"
    else:
        survey.add_layer(name, w, bias, a, b, scale, dropout, magnitude is not None)


def set_class(layers: Iterable[nn.Module], cls: type[nn.Module]) -> None:
    """Makes each layer a Linear or a FusedLinear, all or none of them; nothing else changes."""
    before = [(layer, type(layer)) for layer in layers]
    try:
        for layer, _ in before:
            _set_class(layer, cls)
    except BaseException:
        for layer, old in before:
            _set_class(layer, old)
        raise


def _set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    if type(layer) is cls:
        return
    # accelerate keeps the bound forward of the class that the layer had when its hook came
    bound = [attribute for attribute in ("_old_forward", "forward") if _is_own(layer, attribute)]
    layer.__class__ = cls
    for attribute in bound:
        layer.__dict__[attribute] = MethodType(cls.forward, layer)
    _fallbacks.pop(layer, None)
    _norms.pop(layer, None)


def fallbacks(layer: nn.Module) -> dict[str, int]:
    """How many calls of the layer went to PEFT's forward since it was fused, by reason."""
    return dict(_fallbacks.get(layer, {}))
