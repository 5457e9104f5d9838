"""PEFT's convolutions with a forward of few passes over their output:

    y = gain ⊙ (W * x + scaling · (B (A * drop(x)) + c)) + bias                                  (1)

with c the bias of lora_B, LoRA's alone. The product with B is added in place, on the layout that
the convolution gave, and 1×1 convolutions are no exception. DoRA's norm is that of W and A
flattened to [out, in · window] and [r, in · window]: BA is not formed, and the norm is kept as that
of a linear layer is. Of a grouped convolution it is PEFT's, taken in each call.
"""

from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn

from lora_kernels.integrations.peft.adapters import (
    ON_META,
    active_names,
    call_refusal,
    factors_refusal,
    frozen_refusal,
    layer_refusal,
    on_meta,
)
from lora_kernels.integrations.peft.devices import device_refusal
from lora_kernels.integrations.peft.hooks import has_hooks
from lora_kernels.integrations.peft.linear import cached_gain, count_fallback
from lora_kernels.integrations.peft.state import PLAIN, type_name
from lora_kernels.integrations.report import Survey
from lora_kernels.ops import dora_gain
from lora_kernels.ops.scale import traced_scale

try:
    from peft.tuners.lora import variants
    from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer
    from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error

# elements of W, and of the output, below which PEFT's norm and passes cost less than our gain
_SMALL_DORA, _FEW_OUTPUTS = 1 << 15, 1 << 17
_SMALL = 1 << 15  # elements of y below which a pass over them costs less than one more op on B
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DORA = {
    variants.DoraConv1dVariant: DoraConv1dLayer,
    variants.DoraConv2dVariant: DoraConv2dLayer,
    variants.DoraConv3dVariant: DoraConv3dLayer,
}


class ConvState(NamedTuple):
    """What a call computes with."""

    base: Any
    terms: list[tuple[Any, Any, Any, Any]]
    """(lora_A, lora_B, dropout, scaling) of each active adapter."""
    magnitude: Tensor | None


def read_conv(layer: Any) -> ConvState | str:
    """What the layer's next call computes with, or why PEFT must run it."""
    if refusal := layer_refusal(layer):
        return refusal
    children: dict[str, Any] = layer._modules
    base, all_a, all_b = children["base_layer"], children["lora_A"]._modules, children["lora_B"]._modules
    if not isinstance(base, _CONVOLUTIONS):
        return f"base_layer is {type_name(base)}"
    if type(base._parameters.get("weight")) not in PLAIN:
        return f"the base weight is {type_name(base._parameters.get('weight'))}"
    names = active_names(layer, all_a)
    if not names:
        return "no active adapter has weights here"
    terms, magnitude = [], None
    for name in names:
        lora_a, lora_b, drop = all_a[name], all_b[name], children["lora_dropout"]._modules[name]
        if type(lora_b) not in _CONVOLUTIONS or has_hooks(lora_b) or not isinstance(lora_a, _CONVOLUTIONS):
            return f"lora_A and lora_B are {type_name(lora_a)} and {type_name(lora_b)}, or a hook waits for lora_B"
        if refusal := factors_refusal(lora_a._parameters.get("weight"), lora_b._parameters.get("weight")):
            return refusal
        own_bias = lora_b._parameters["bias"]
        if own_bias is not None and type(own_bias) not in PLAIN:
            return f"the bias of lora_B is {type_name(own_bias)}"
        if _window(lora_a) != _window(base):
            return "lora_A and base_layer have different windows"
        terms.append((lora_a, lora_b, drop, layer.scaling[name]))
        variant = layer.lora_variant.get(name)
        if variant is None:
            continue
        if own_bias is not None:
            return "lora_bias beside DoRA, whose norm would hold it"
        dora = children["lora_magnitude_vector"]._modules.get(name)
        if type(dora) is not _DORA.get(type(variant)) or has_hooks(dora):
            return f"{type_name(variant)} is not covered"
        if len(names) > 1:
            return "several adapters are active, one of them DoRA"
        if type(base) not in _CONVOLUTIONS or has_hooks(base) or base.padding_mode != "zeros":
            return f"base_layer is {base}, or a hook waits for its call"
        magnitude = dora._parameters["weight"]
        if type(magnitude) not in PLAIN:
            return f"lora_magnitude_vector is {type_name(magnitude)}"
        if refusal := frozen_refusal(base._parameters.get("weight")):
            return refusal
    return ConvState(base, terms, magnitude)


def _window(conv: Any) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation


def _forward(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What formula (1) gives for a call, or None where PEFT's own forward must run; the reason is
    counted."""
    state: Any = "the call has arguments besides the input" if args or kwargs else read_conv(layer)
    reason = state if type(state) is str else call_refusal(x)
    if reason is None and x.dim() != state.base.weight.dim():
        reason = f"the input has {x.dim()} dimensions"
    elif reason is None and state.magnitude is not None and torch.is_grad_enabled():
        reason = dora_gradients_refusal(x, state.base.weight, state.magnitude)
    if reason is not None:
        count_fallback(layer, reason)
        return None
    base, terms, magnitude = state
    if magnitude is not None:
        return _dora(layer, x, base, terms[0], magnitude)
    y = base(x)
    dtype = y.dtype
    # others may hold the output of a hooked or foreign layer
    fresh = type(base) in _CONVOLUTIONS and not has_hooks(base)
    for lora_a, lora_b, drop, scale in terms:
        x = layer._cast_input_dtype(x, lora_a.weight.dtype)
        y = _add(y if fresh else y.clone(), lora_a(drop(x)), lora_b, scale)
        fresh = True
        if lora_b.bias is not None:
            y.add_(lora_b.bias.mul(scale).to(y.dtype).view(-1, *(1,) * (y.dim() - 2)))
    return y.to(dtype)


def dora_gradients_refusal(x: Tensor, w: Tensor, magnitude: Tensor) -> str | None:
    """Why a call of DoRA with gradients goes to PEFT's forward, which is faster on such sizes."""
    if magnitude.dtype in (torch.bfloat16, torch.float16):
        return "gradients of a 16-bit magnitude cost PEFT less"
    outputs = x.numel() // max(x.shape[1], 1) * w.shape[0]
    few = w.numel() < _SMALL_DORA and outputs < _FEW_OUTPUTS
    return "gradients of DoRA on a small convolution cost PEFT less" if few else None


def _dora(layer: Any, x: Tensor, base: Any, term: tuple[Any, Any, Any, Any], magnitude: Tensor) -> Tensor:
    lora_a, lora_b, drop, scale = term
    w, bias, axes = base.weight, base.bias, (1, -1, *(1,) * (x.dim() - 2))
    if base.groups > 1:
        gain = _grouped_gain(w, lora_a.weight, lora_b.weight, scale, magnitude.flatten())
    else:
        gain = cached_gain(layer, *_flattened(w, lora_a.weight), lora_b.weight.flatten(1), scale, magnitude.flatten())
    cast = layer._cast_input_dtype(x, lora_a.weight.dtype)
    if _drops(layer, drop):
        # PEFT drops the input of the rescaled base, too
        y, cast = base(x), drop(cast)
        z, wide = base._conv_forward(cast, w.to(cast.dtype), None), gain.view(axes)
        h, b = lora_a(cast), lora_b.weight * (gain * scale).view(-1, 1, *axes[2:])
        rest = y + (wide - 1) * z
        return rest.add_(lora_b._conv_forward(h, b.to(h.dtype), None)).to(y.dtype)
    z, rest = base._conv_forward(x, w, None), None if bias is None else bias.view(axes)
    dtype = z.dtype
    z = _add(z, lora_a(cast), lora_b, scale)
    # a 16-bit magnitude has no more digits to give
    gain = gain.to(torch.promote_types(z.dtype, magnitude.dtype)).view(axes)
    if rest is None:
        return (z * gain).to(dtype)
    if rest.dtype is z.dtype is gain.dtype:
        return torch.addcmul(rest, z, gain).to(dtype)
    return (z * gain).add_(rest).to(dtype)


def _drops(layer: Any, drop: Any) -> bool:
    """Whether PEFT's DoRA drops anything of this call's input."""
    if not layer.training or isinstance(drop, nn.Identity):
        return False
    return type(drop) is not nn.Dropout or (drop.training and drop.p > 0)


def _flattened(w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """W [out, in · window] without a copy, if it can be, and A [r, in · window] in its order."""
    if not w.is_contiguous():
        last = (0, *range(2, w.dim()), 1)
        w, a = w.permute(last), a.permute(last)
    return w.flatten(1), a.flatten(1)


def _grouped_gain(w: Tensor, a: Tensor, b: Tensor, scale: Any, magnitude: Tensor) -> Tensor:
    """m / ‖W + scale · Δ‖, [out]. Δ has the numbers of B as [out / groups, r] times A, in the shape
    of W [out, in / groups, …], as in PEFT."""
    with torch.no_grad():
        wide = torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32)
        delta = b.to(wide).reshape(-1, a.shape[0]) @ a.to(wide).flatten(1)
        norm = (w.to(wide) + delta.view(w.shape) * scale).flatten(1).norm(dim=1)
    return dora_gain(magnitude.to(norm.dtype), norm)


def _add(y: Tensor, h: Tensor, lora_b: Any, scale: Any) -> Tensor:
    """y + scale · B h, in place where the dtype allows: y [n, out, …], h [n, r, …], B [out, r,
    1…]."""
    b, scale = lora_b.weight, traced_scale(scale)
    if isinstance(scale, Tensor):
        b, scale = b * scale, 1.0
    wide = torch.promote_types(y.dtype, h.dtype)
    y, h, b = y.to(wide), h.to(wide), b.to(wide)
    wants_grad = torch.is_grad_enabled() and (y.requires_grad or h.requires_grad or b.requires_grad)
    if wants_grad or lora_b.groups > 1 or h.numel() == 0 or torch.compiler.is_compiling():
        # backward of a small convolution is faster than that of products over views
        if y.numel() < _SMALL:
            return y.add_(lora_b._conv_forward(h, b, None), alpha=scale)
        return y.add_(lora_b._conv_forward(h, b * scale, None))
    b = b.flatten(1)
    if y.is_contiguous():
        y.flatten(2).baddbmm_(b.expand(y.shape[0], *b.shape), h.flatten(2), alpha=scale)
        return y
    rows = y.movedim(1, -1)
    if rows.is_contiguous():
        rows.flatten(0, -2).addmm_(h.movedim(1, -1).reshape(-1, h.shape[1]), b.t(), alpha=scale)
        return y
    return y.add_(torch.matmul(b, h.flatten(2)).view(y.shape), alpha=scale)


class FusedConv1d(Conv1d):
    """peft.tuners.lora.layer.Conv1d; a call that formula (1) covers runs there, any other in PEFT's
    own forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = _forward(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


class FusedConv2d(Conv2d):
    """peft.tuners.lora.layer.Conv2d, as FusedConv1d."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = _forward(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


class FusedConv3d(Conv3d):
    """peft.tuners.lora.layer.Conv3d, as FusedConv1d."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = _forward(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


CONV_KINDS = ((Conv1d, FusedConv1d), (Conv2d, FusedConv2d), (Conv3d, FusedConv3d))


def survey_conv(name: str, layer: Any, survey: Survey) -> None:
    """Adds to the survey what the layer's next call would do if it were fused."""
    state = read_conv(layer)
    if isinstance(state, str):
        survey.left[name] = state
    elif on_meta(t for a, b, *_ in state.terms for t in (a.weight, b.weight, state.magnitude)):
        survey.left[name] = ON_META
    elif reason := device_refusal(state.base.weight):
        survey.left[name] = reason
    else:
        survey.fused[name] = "torch"
