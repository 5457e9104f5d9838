"""The kinds of PEFT's LoRA layers that `fuse` covers, and the change of a layer's class."""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, NamedTuple

import peft
from torch import nn

from lora_kernels.integrations.gathered import as_called, gathered_weights
from lora_kernels.integrations.peft.adapters import ON_META, on_meta
from lora_kernels.integrations.peft.attention import FusedMultiheadAttention, MultiheadAttention, survey_attention
from lora_kernels.integrations.peft.conv import CONV_KINDS, survey_conv
from lora_kernels.integrations.peft.devices import device_refusal
from lora_kernels.integrations.peft.embedding import Embedding, FusedEmbedding, survey_embedding
from lora_kernels.integrations.peft.hooks import is_own
from lora_kernels.integrations.peft.linear import FusedLinear, forget_all, other_way
from lora_kernels.integrations.peft.parameters import FusedParamWrapper, ParamWrapper, survey_parameter
from lora_kernels.integrations.peft.quantised import QUANTISED_KINDS
from lora_kernels.integrations.peft.state import read_state, type_name
from lora_kernels.integrations.report import Survey

try:
    from peft.tuners.lora.layer import Linear, LoraLayer
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error


class Kind(NamedTuple):
    """A class of PEFT's and how `fuse` treats its layers."""

    stock: type[nn.Module]
    fused: type[nn.Module]
    """A subclass of `stock` that overrides `forward` alone."""
    survey: Callable[[str, Any, Survey], None]
    """Adds to the survey what the layer's next call would do if it were fused."""


def _survey_linear(name: str, layer: nn.Module, survey: Survey) -> None:
    state: Any = read_state(layer)
    if isinstance(state, str):
        state = other_way(state, lambda way: state if way.read is None else way.read(layer))
    if isinstance(state, str):
        survey.left[name] = state
        return
    w, bias, a, b, scale, dropout, magnitude = state
    if (reason := device_refusal(w)) is not None:
        survey.left[name] = reason
    elif on_meta((a, b, magnitude)):
        survey.left[name] = ON_META
    else:
        survey.add_layer(name, w, bias, a, b, scale, dropout, magnitude is not None)


KINDS = (
    Kind(Linear, FusedLinear, _survey_linear),
    Kind(Embedding, FusedEmbedding, survey_embedding),
    Kind(MultiheadAttention, FusedMultiheadAttention, survey_attention),
    *(Kind(stock, fused, survey_conv) for stock, fused in CONV_KINDS),
    *(Kind(stock, fused, _survey_linear) for stock, fused in QUANTISED_KINDS),
    Kind(ParamWrapper, FusedParamWrapper, survey_parameter),
)
FUSED = tuple(kind.fused for kind in KINDS)
FUSED_LINEAR = (FusedLinear, *(fused for _, fused in QUANTISED_KINDS))
_KIND_OF = {cls: kind for kind in KINDS for cls in (kind.stock, kind.fused)}


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers of every kind, by name; the out_proj of a MultiheadAttention is a part of
    that layer."""
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    parts = {id(layer.get_base_layer().out_proj) for layer in found.values() if isinstance(layer, MultiheadAttention)}
    return {name: layer for name, layer in found.items() if id(layer) not in parts}


def class_refusal(layer: nn.Module) -> str | None:
    """Why the layer's class can never be changed; None if it can or was."""
    if type(layer) not in _KIND_OF:
        return f"{type_name(layer)} layers are not covered"
    held = "_old_forward" if "_hf_hook" in layer.__dict__ else "forward"
    if held in layer.__dict__ and not is_own(layer, held):
        return "its forward is replaced on the instance"
    return None


def survey_layers(model: nn.Module, layers: dict[str, nn.Module], survey: Survey) -> None:
    """Adds to the survey what the next call of each layer of a model would do if it were fused."""
    stand_ins = gathered_weights(model)
    for name, layer in layers.items():
        with as_called(layer, stand_ins):
            _survey_layer(name, layer, survey)


def _survey_layer(name: str, layer: nn.Module, survey: Survey) -> None:
    reason = class_refusal(layer)
    if reason is None:
        _KIND_OF[type(layer)].survey(name, layer, survey)
    else:
        survey.left[name] = reason


def fuse_classes(layers: Iterable[nn.Module]) -> None:
    """Gives each layer its fused class, all or none of them; nothing else changes."""
    _set_classes([(layer, _KIND_OF[type(layer)].fused) for layer in layers])


def restore_classes(layers: Iterable[nn.Module]) -> None:
    """Gives each layer PEFT's class back, all or none of them."""
    _set_classes([(layer, _KIND_OF[type(layer)].stock) for layer in layers])


def _set_classes(wanted: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    before = [(layer, type(layer)) for layer, _ in wanted]
    try:
        for layer, cls in wanted:
            _set_class(layer, cls)
    except BaseException:
        for layer, old in before:
            _set_class(layer, old)
        raise


def _set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    if type(layer) is cls:
        return
    # accelerate keeps the bound forward of the class that the layer had when its hook came
    bound = [attribute for attribute in ("_old_forward", "forward") if is_own(layer, attribute)]
    layer.__class__ = cls
    for attribute in bound:
        layer.__dict__[attribute] = MethodType(cls.forward, layer)
    forget_all(layer)
