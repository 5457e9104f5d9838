"""VeLoRA in training, which is LoRA whose backward sees a projection of x alone:

    y = x Wᵀ + bias + scale · h Bᵀ,   h = drop(x) Aᵀ                                             (1)

h and its gradients are PEFT's own function, which keeps the projection. Its product with B is added
to x Wᵀ in place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.integrations.peft.adapters import active_names
from lora_kernels.integrations.peft.bias import base_bias
from lora_kernels.integrations.peft.factors import VELORA
from lora_kernels.integrations.peft.linear import WAYS, Way, input_refusal
from lora_kernels.integrations.peft.state import ARGUMENTS, read_state
from lora_kernels.ops import QuantisedWeight
from lora_kernels.ops.lora_linear.op import autocasts

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
    w, bias, a, b, scale, dropout, _ = state
    if reason := input_refusal(layer, x, state):
        return reason
    if torch.compiler.is_compiling() or autocasts(x.device.type):
        return f"{VELORA}, under autocast or a compiler"
    (name,) = active_names(layer, layer._modules["lora_A"]._modules)
    # what is changed in place must be no view
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    dropped = rows if rows.dtype is a.dtype else rows.to(a.dtype)
    if dropout > 0.0:
        dropped = F.dropout(dropped, dropout)
    VeloraLinearVariant._maybe_update_embed(layer, name, dropped)
    groups, back = layer.lora_velora_num_groups[name], layer.lora_velora_scale[name]
    h = VeloraFunction.apply(dropped, a, None, layer.lora_velora_embed[name], groups, back)
    y = F.linear(rows, w, bias)
    dtype = y.dtype
    if isinstance(scale, Tensor):
        b, scale = b * scale, 1.0
    if dtype is not b.dtype:
        wide = torch.promote_types(dtype, b.dtype)
        y, h, b = y.to(wide), h.to(wide), b.to(wide)
    y = y.addmm_(h, b.t(), alpha=scale)
    y = y if y.dtype is dtype else y.to(dtype)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[1])


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
    # else it is the base's own
    return state if state[1] is base_bias(layer._modules["base_layer"]) else "lora_bias beside VeLoRA"


if VeloraFunction is not None:
    WAYS[VELORA] = Way(run_velora, read_velora)
