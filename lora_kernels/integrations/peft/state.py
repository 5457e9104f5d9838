"""What a call of PEFT's linear layer computes with, read from the layer as it stands."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lora_kernels.integrations.peft.bias import bias_refusal, held_bias, with_lora_bias
from lora_kernels.integrations.peft.factors import RULES, are_covered
from lora_kernels.integrations.peft.hooks import FSDP1, HOOKED, has_hooks
from lora_kernels.nn.flat_parameters import VIEWS, are_attributes, constant
from lora_kernels.nn.quantised import holds_codes
from lora_kernels.ops.lora_linear.op import FLOATS
from lora_kernels.ops.quantised import QuantisedWeight

try:
    from peft.tuners.lora import variants
    from peft.tuners.lora.dora import DoraLinearLayer
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error

# reasons that name a way of their own, see linear.WAYS
SEVERAL = "several adapters are active"
ALORA = "aLoRA without alora_offsets"
ARGUMENTS = "the call has arguments besides the input"
DISABLED = "the adapters are disabled"

PLAIN = (Tensor, nn.Parameter)
READERS: dict[type[nn.Module], Callable[[Any, Any], Any]] = {}
"""By class of a quantised base layer: (layer, base layer) to its `QuantisedWeight`, or a reason.
That of nn.Linear is for weights of a library's own class."""
_ROUNDS = dict.fromkeys(
    ("FP8Linear", "FP8GroupedLinear", "CompressedTensorsFP8Linear"), ", which rounds each input to float8, and so y"
)
"""By name of a class that does not compute x Wᵀ, why."""
_WEIGHTS = (*PLAIN, QuantisedWeight)
_DTYPES = frozenset((w, a, a) for w in FLOATS for a in FLOATS)
# MiCA differs from LoRA only in what it initialises and trains
_COMPUTED_AS_LORA = tuple(v for v in (getattr(variants, "MiCALinearVariant", None),) if v is not None)
ALORA_VARIANT = getattr(variants, "ALoraLinearVariant", None)
_BY_NAME_AS_LORA = (*_COMPUTED_AS_LORA, ALORA_VARIANT)


def read_state(layer: Any, adapter: str | None = None) -> Any:
    """What the layer's next call computes with, (w, bias, a, b, scale, dropout, magnitude), or why
    PEFT must run it: with the active adapter, or with another that has weights here. Of aLoRA this
    is what its tokens after the invocation compute with.

    Reads the modules' own dictionaries: one lookup through nn.Module.__getattr__ costs as much as
    ten of these checks.
    """
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return "an adapter is merged into the base weight"
    children: dict[str, Any] = layer._modules
    adapters = children["lora_A"]._modules
    name = layer._active_adapter if adapter is None else adapter
    if type(name) is not str:
        here = name if len(name) == 1 else [each for each in name if each in adapters]
        if len(here) > 1:
            return SEVERAL
        name = here[0] if here else None
    if name not in adapters:
        return "no active adapter has weights here"
    base, lora_a, lora_b = children["base_layer"], adapters[name], children["lora_B"]._modules[name]
    drop = children["lora_dropout"]._modules[name]
    if has_hooks(base) or has_hooks(lora_a) or has_hooks(lora_b) or has_hooks(drop):
        return HOOKED
    if (type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear) and not are_covered(lora_a, lora_b):
        if FSDP1 in (type_name(lora_a), type_name(lora_b)):
            return HOOKED
        return f"lora_A and lora_B are {type_name(lora_a)} and {type_name(lora_b)}"
    w: Any  # tensors only once their types are looked at
    a: Any
    b: Any
    w, a, b = base._parameters.get("weight"), lora_a._parameters.get("weight"), lora_b._parameters.get("weight")
    if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
        read = READERS.get(type(base))
        w = f"base_layer is {(kind := type_name(base))}{_ROUNDS.get(kind, '')}" if read is None else read(layer, base)
        if type(w) is str:
            return w
    if type(w) not in _WEIGHTS or type(a) not in PLAIN or type(b) not in PLAIN:
        if type(w) not in _WEIGHTS and type(base) is nn.Linear and holds_codes(base):
            w = READERS[nn.Linear](layer, base)
            if type(w) is str:
                return w
        if type(w) is not QuantisedWeight or type(a) not in PLAIN or type(b) not in PLAIN:
            if are_attributes(base, lora_a, lora_b):
                return VIEWS
            return f"the weights of base_layer, lora_A and lora_B are {type_name(w)}, {type_name(a)} and {type_name(b)}"
    if (w.dtype, a.dtype, b.dtype) not in _DTYPES:
        return f"the weights of base_layer, lora_A and lora_B are {w.dtype}, {a.dtype} and {b.dtype}"
    learnt = w.requires_grad
    if learnt:
        w = constant(base, "weight", w)
        if w.requires_grad:
            return "the base weight requires grad"
    if w.is_meta or w.layout is not torch.strided:
        return f"the base weight is {'on the meta device' if w.is_meta else w.layout}"
    own_bias: Any = lora_b._parameters.get("bias")
    if (lora_a._parameters.get("bias") is not None or own_bias is not None) and (reason := bias_refusal(lora_a, own_bias)):
        return reason

    variant, magnitude = layer.lora_variant.get(name), None
    if variant is not None and type(variant) not in (_COMPUTED_AS_LORA if adapter is None else _BY_NAME_AS_LORA):
        if type(variant) is ALORA_VARIANT:
            return ALORA
        if rule := RULES.get(type(variant)):
            factors: Any = rule(layer, name, a, b)
            if type(factors) is str:
                return factors
            a, b = factors
        else:
            magnitude = _magnitude(children, str(name), variant, own_bias)
            if type(magnitude) is str:
                return magnitude
    dropout = 0.0
    if type(drop) is nn.Dropout:
        if drop.training and (magnitude is None or layer.training):
            dropout = drop.p
        if drop.inplace or dropout >= 1.0:
            return f"lora_dropout is {drop}"
    elif type(drop) is not nn.Identity:
        return f"lora_dropout is {type_name(drop)}"
    bias: Any = base._parameters.get("bias")
    if bias is None and type(w) is QuantisedWeight:
        bias = held_bias(base)
    if bias is not None and type(bias) not in PLAIN:
        return f"the bias of base_layer is {type_name(bias)}"
    if learnt and bias is not None:
        bias = constant(base, "bias", bias)
    w = w.t() if layer.fan_in_fan_out else w
    scale = layer.scaling[name]
    if own_bias is not None:
        bias = with_lora_bias(bias, own_bias, scale)
    return w, bias, a, b, scale, dropout, magnitude


def read_codes(layer: Any) -> Any:
    """W of a layer over a quantised base for its next call, or why it cannot be read; None where
    the base's own call computes it: it is of another kind, or has hooks."""
    base = layer._modules["base_layer"]
    read = READERS.get(type(base))
    return None if read is None or type(base) is nn.Linear or has_hooks(base) else read(layer, base)


def _magnitude(children: dict[str, Any], name: str, variant: Any, own_bias: Any) -> Any:
    """DoRA's magnitude [out], or why PEFT must run the variant."""
    dora = children["lora_magnitude_vector"]._modules.get(name)
    if type(variant) is not variants.DoraLinearVariant:
        return f"{type_name(variant)} is not covered"
    if type(dora) is not DoraLinearLayer:
        return HOOKED if type_name(dora) == FSDP1 else f"lora_magnitude_vector holds {type_name(dora)}"
    if has_hooks(dora):
        return HOOKED
    if own_bias is not None:
        return "lora_bias beside DoRA, whose norm would hold it"
    magnitude = dora._parameters.get("weight")
    return magnitude if type(magnitude) in PLAIN else f"lora_magnitude_vector is {type_name(magnitude)}"


def type_name(thing: Any) -> str:
    return "missing" if thing is None else type(thing).__name__
