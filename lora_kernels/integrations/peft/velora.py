"""VeLoRA in training, which is LoRA whose backward sees a projection of x alone:

    y = x Wᵀ + bias + scale · h Bᵀ,   h = drop(x) Aᵀ                                             (1)

h and its gradients are PEFT's own function, which keeps the projection. Its product with B is added
to x Wᵀ in place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.integrations.peft.factors import VELORA
from lora_kernels.integrations.peft.linear import WAYS, Way, input_refusal
from lora_kernels.integrations.peft.state import ARGUMENTS, read_state
from lora_kernels.ops import QuantisedWeight

try:
    from peft.tuners.lora.variants import VeloraLinearVariant
    from peft.tuners.lora.velora import VeloraFunction
except ImportError:
    VeloraLinearVariant = VeloraFunction = None  # type: ignore[assignment, misc]


def run_velora(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a call, or why PEFT must run it."""
    if args or kwargs:
        return ARGUMENTS
    state = read_velora(layer)
    if type(state) is str:
        return state
    w, bias, a, b, scale, _, _ = state
    if reason := input_refusal(layer, x, state):
        return reason
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return f"{VELORA}, under autocast or a compiler"
    (name,) = layer.active_adapters
    dropped = layer.lora_dropout[name](layer._cast_input_dtype(x, a.dtype))
    VeloraLinearVariant._maybe_update_embed(layer, name, dropped)
    groups, back = layer.lora_velora_num_groups[name], layer.lora_velora_scale[name]
    h = VeloraFunction.apply(dropped, a, None, layer.lora_velora_embed[name], groups, back)
    # what is changed in place must be no view
    y = F.linear(x.reshape(-1, x.shape[-1]), w, bias)
    dtype, wide = y.dtype, torch.promote_types(y.dtype, b.dtype)
    if isinstance(scale, Tensor):
        b, scale = b * scale, 1.0
    y = y.to(wide).addmm_(h.reshape(-1, h.shape[-1]).to(wide), b.to(wide).t(), alpha=scale)
    return y.to(dtype).view(*x.shape[:-1], y.shape[1])


def read_velora(layer: Any) -> Any:
    """The state of LoRA with the same weights, or a reason."""
    plain = layer.__class__.__new__(layer.__class__)
    vars(plain).update(vars(layer), lora_variant={})
    state: Any = read_state(plain)
    if type(state) is str:
        # the ways of other reasons know nothing of the projection
        return f"{state}, in training of VeLoRA" if state in WAYS else state
    if isinstance(state[0], QuantisedWeight):
        return "VeLoRA over a quantised base"
    has_bias = any(lora_b.bias is not None for lora_b in layer.lora_B.values())
    return "lora_bias beside VeLoRA" if has_bias else state


if VeloraFunction is not None:
    WAYS[VELORA] = Way(run_velora, read_velora)
