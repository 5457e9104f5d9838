"""Several active adapters of one layer, in PEFT's order, as diffusers' `set_adapters` makes them:

    y₀ = W x + bias
    LoRA:               yᵢ = yᵢ₋₁ + sᵢ (Bᵢ Aᵢ dropᵢ(x) + cᵢ)
    DoRA, none dropped: yᵢ = gᵢ ⊙ (yᵢ₋₁ - bias + sᵢ Bᵢ Aᵢ x) + bias                              (1)
    DoRA with dropout:  yᵢ = yᵢ₋₁ + (gᵢ - 1) ⊙ W dropᵢ(x) + gᵢ ⊙ sᵢ Bᵢ Aᵢ dropᵢ(x)

with cᵢ the bias of Bᵢ.

Adapters without dropout up to the first DoRA are one adapter, their ranks side by side. What (1)
leaves follows in plain torch, without a norm or a base product computed twice.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.integrations.peft.bias import base_bias, with_lora_bias
from lora_kernels.integrations.peft.linear import WAYS, Way, cached_gain, input_refusal
from lora_kernels.integrations.peft.state import ALORA_VARIANT, SEVERAL, read_state
from lora_kernels.nn.quantised_base import product_of_codes
from lora_kernels.ops import QuantisedWeight, lora_linear
from lora_kernels.ops.lora_linear.op import autocasts

# tokens; below it the adapters' copies cost more than passes over the output
JOIN_FROM = 2


class Part(NamedTuple):
    """One adapter: what `read_state` gives of it, and what several of them do not share."""

    a: Tensor
    b: Tensor
    scale: float | Tensor
    dropout: float
    magnitude: Tensor | None
    own_bias: Tensor | None
    owner: Any
    """The module of its magnitude, under which its norm is kept."""


def read_parts(layer: Any) -> Any:
    """(w, bias, the active adapters in PEFT's order), or why PEFT must run them."""
    base = layer._modules["base_layer"]
    parts: list[Part] = []
    for name in layer._active_adapter:
        if name not in layer.lora_A._modules:
            continue
        state: Any = read_state(layer, name)
        if type(state) is str:
            return state
        if ALORA_VARIANT is not None and type(layer.lora_variant.get(name)) is ALORA_VARIANT:
            return "aLoRA among several adapters"
        w, _, a, b, scale, dropout, magnitude = state
        own_bias = layer.lora_B._modules[name]._parameters.get("bias")
        owner = None if magnitude is None else layer.lora_magnitude_vector._modules[name]
        parts.append(Part(a, b, scale, dropout, magnitude, own_bias, owner))
    if any(part.a.dtype is not parts[0].a.dtype for part in parts):
        return f"adapters of {parts[0].a.dtype} and other dtypes are active together"
    if any(part.own_bias is not None for part in parts) and any(part.magnitude is not None for part in parts):
        return "lora_bias and DoRA are active together"
    return w, base_bias(base), parts


def run_several(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a call, or why PEFT must run it."""
    found = read_parts(layer)
    if type(found) is str:
        return found
    w, bias, parts = found
    if reason := input_refusal(layer, x, (w, bias, parts[0].a)):
        return reason
    lead, rest = _split(parts, x.numel() < JOIN_FROM * x.shape[-1])
    gain, magnitude = None, lead[-1].magnitude
    if magnitude is not None:
        last = lead[-1]
        gain = cached_gain(last.owner, w, last.a, last.b, last.scale, magnitude)
    w, joined_bias, a, b, scale, dropout = _joined(w, bias, lead)
    y = lora_linear(x, w, a, b, scale, joined_bias, gain, dropout)
    dtype = y.dtype
    for part in rest:
        y = _followed(y, x.to(part.a.dtype), w, bias, part)
    return y.to(dtype)


def read_several(layer: Any) -> Any:
    """The state of the one call of `lora_linear`, or a reason."""
    found = read_parts(layer)
    if type(found) is str:
        return found
    w, bias, parts = found
    lead, _ = _split(parts, False)
    return (*_joined(w, bias, lead), lead[-1].magnitude)


def _split(parts: list[Part], few: bool) -> tuple[list[Part], list[Part]]:
    """Those that are computed with W at once, and those that follow one by one; of few tokens all
    but the first."""
    if all(part.magnitude is None for part in parts):
        if few:
            return parts[:1], parts[1:]
        # a sum, of any order
        parts = sorted(parts, key=lambda part: part.dropout > 0)
    count = 0
    while count < len(parts) and parts[count].dropout == 0.0:
        count += 1
        if parts[count - 1].magnitude is not None:
            break
    count = max(count, 1)
    return parts[:count], parts[count:]


def _joined(w: Tensor, bias: Tensor | None, parts: list[Part]) -> Any:
    """One part, or several that drop nothing and of which the last alone may be DoRA's, as a state
    without its magnitude."""
    for part in parts:
        if part.own_bias is not None:
            bias = with_lora_bias(bias, part.own_bias, part.scale)
    if len(parts) == 1:
        return w, bias, *parts[0][:4]
    scales = [part.scale for part in parts]
    a, bs, scale = torch.cat([part.a for part in parts]), [part.b for part in parts], scales[0]
    if not all(type(each) is float and each == scale for each in scales):
        # a 16-bit B times its scale would be rounded once more
        wide = torch.promote_types(a.dtype, torch.float32)
        a, bs, scale = a.to(wide), [b.to(wide) * s for b, s in zip(bs, scales, strict=True)], 1.0
    return w, bias, a, torch.cat(bs, 1), scale, 0.0


def _followed(y: Tensor, x: Tensor, w: Tensor | QuantisedWeight, bias: Tensor | None, part: Part) -> Tensor:
    """One step of formula (1)."""
    if not torch.is_grad_enabled() and _is_added_in_place(y, x, part):
        h = F.linear(x.reshape(-1, x.shape[-1]), part.a)
        y.view(-1, y.shape[-1]).addmm_(h, part.b.t(), alpha=cast(float, part.scale))
        return y
    dropped = F.dropout(x, part.dropout) if part.dropout > 0.0 else x
    delta = F.linear(F.linear(dropped, part.a), part.b, part.own_bias) * part.scale
    if part.magnitude is None:
        return y + delta
    gain = cached_gain(part.owner, w, part.a, part.b, part.scale, part.magnitude)
    if part.dropout > 0.0:
        if isinstance(w, QuantisedWeight):
            base = product_of_codes(dropped, w.to(dropped.dtype))
        else:
            base = F.linear(dropped, w.to(dropped.dtype))
    else:
        base = y if bias is None else y - bias
    return y + (gain - 1) * base + gain * delta


def _is_added_in_place(y: Tensor, x: Tensor, part: Part) -> bool:
    """Whether one GEMM adds the part to y, which nobody else holds yet."""
    return (
        part.magnitude is None
        and part.dropout == 0.0
        and part.own_bias is None
        and type(part.scale) is float
        and not torch.compiler.is_compiling()  # a symbol would become a constant of the graph
        and x.dtype is y.dtype
        and y.is_contiguous()
        and not autocasts(x.device.type)
    )


WAYS[SEVERAL] = Way(run_several, read_several)
