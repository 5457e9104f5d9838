"""PEFT's `lora_bias`: the bias of lora_B, which counts as the adapter does, scale times."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.flat_parameters import constant
from lora_kernels.ops.scale import traced_scale

ON_META = "the adapter's weights are on the meta device; once they are loaded it runs on the kernels"
_PLAIN = (Tensor, nn.Parameter)


def bias_refusal(lora_a: nn.Module, own: Any) -> str | None:
    """Why these biases are PEFT's; None where `with_lora_bias` has what they add."""
    if lora_a._parameters["bias"] is not None:
        return "lora_A has a bias"
    if type(own) not in _PLAIN:
        return f"the bias of lora_B is {type(own).__name__}"
    return ON_META if own.is_meta else None


def held_bias(base: Any) -> Any:
    """The bias of a base layer as it is held: of HQQ not as a parameter, and then it learns
    nothing."""
    if "bias" in base._parameters:
        return base._parameters["bias"]
    bias = base.__dict__.get("bias")
    return bias.detach() if isinstance(bias, Tensor) else bias


def base_bias(base: Any) -> Tensor | None:
    """The bias of a base layer; a frozen one has no grad, though FSDP's view of it may say so."""
    bias = held_bias(base)
    return constant(base, "bias", bias) if bias is not None and bias.requires_grad else bias


def with_lora_bias(bias: Tensor | None, own: Tensor, scale: float | Tensor) -> Tensor:
    """bias + scale · own, [out], in float32 or wider, so that the layer's output alone is
    rounded; both get their gradients. Of an adapter that has yet to be loaded only its own
    bias."""
    if own.is_meta:
        return own
    wide = torch.promote_types(own.dtype, torch.float32)
    own = own if own.dtype is wide else own.to(wide)
    scale = traced_scale(scale)
    if isinstance(scale, Tensor):
        own, scale = own * scale, 1.0
    if bias is None:
        return own if scale == 1.0 else own * scale
    return torch.add(bias, own, alpha=scale)
