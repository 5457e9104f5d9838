"""PEFT's convolutions with a forward of few passes over their output:

    y = gain ⊙ (W * x + scaling · B (A * drop(x))) + bias                                        (1)

The product with B is added in place, on the layout that the convolution gave, and 1×1 convolutions
are no exception. DoRA's norm is that of W and A flattened to [out, in · window] and [r, in ·
window]: BA is not formed, and the norm is kept as that of a linear layer is.
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
from lora_kernels.integrations.peft.hooks import has_hooks
from lora_kernels.integrations.peft.linear import cached_gain, count_fallback
from lora_kernels.integrations.peft.state import PLAIN, type_name
from lora_kernels.integrations.report import Survey
from lora_kernels.ops.lora_linear.op import without_autocast

try:
    from peft.tuners.lora import variants
    from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer
    from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DORA = {
    variants.DoraConv1dVariant: DoraConv1dLayer,
    variants.DoraConv2dVariant: DoraConv2dLayer,
    variants.DoraConv3dVariant: DoraConv3dLayer,
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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
        if lora_b._parameters["bias"] is not None:
            return "lora_bias adds a bias to lora_B"
        if _window(lora_a) != _window(base):
            return "lora_A and base_layer have different windows"
        terms.append((lora_a, lora_b, drop, layer.scaling[name]))
        variant = layer.lora_variant.get(name)
        if variant is None:
            continue
        dora = children["lora_magnitude_vector"]._modules.get(name)
        if type(dora) is not _DORA.get(type(variant)) or has_hooks(dora):
            return f"{type_name(variant)} is not covered"
        if len(names) > 1:
            return "several adapters are active, one of them DoRA"
        if type(base) not in _CONVOLUTIONS or has_hooks(base) or base.groups > 1 or base.padding_mode != "zeros":
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
        y = _add(y if fresh else y.clone(), lora_a(drop(x)), lora_b, lora_b.weight, scale)
        fresh = True
    return y.to(dtype)


def _dora(layer: Any, x: Tensor, base: Any, term: tuple[Any, Any, Any, Any], magnitude: Tensor) -> Tensor:
    lora_a, lora_b, drop, scale = term
    w, bias, axes = base.weight, base.bias, (1, -1, *(1,) * (x.dim() - 2))
    gain = cached_gain(layer, *_flattened(w, lora_a.weight), lora_b.weight.flatten(1), scale, magnitude.flatten())
    wide = gain.view(axes)
    cast = layer._cast_input_dtype(x, lora_a.weight.dtype)
    if _drops(layer, drop):
        # PEFT drops the input of the rescaled base, too
        y = base(x)
        dtype, cast = y.dtype, drop(cast)
        y = y + (wide - 1) * base._conv_forward(cast, w.to(cast.dtype), None)
    else:
        z = base._conv_forward(x, w, None)
        dtype = z.dtype
        if bias is not None and bias.dtype is dtype is gain.dtype:
            y = torch.addcmul(bias.view(axes), z, wide)
        else:
            y = z * wide
            y = y if bias is None else y.add_(bias.view(axes))
    b = lora_b.weight * gain.view(-1, 1, *axes[2:])
    return _add(y, lora_a(cast), lora_b, b, scale).to(dtype)


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


def _add(y: Tensor, h: Tensor, lora_b: Any, b: Tensor, scale: Any) -> Tensor:
    """y + scale · B h, in place but for the compiler: y [n, out, …], h [n, r, …], b [out, r, …]."""
    if isinstance(scale, Tensor):
        b, scale = b * scale, 1.0
    wide = torch.promote_types(torch.promote_types(y.dtype, h.dtype), b.dtype)
    if torch.is_autocast_enabled(y.device.type) and b.dtype is not torch.float64:
        # a convolution's result tells what autocast computes with
        wide = torch.promote_types(y.dtype, h.dtype)
    y, h, b = y.to(wide), h.to(wide), b.to(wide)
    if torch.compiler.is_compiling():
        return y + lora_b._conv_forward(h, b, None) * scale
    if lora_b.groups > 1 or h.numel() == 0:
        return y.add_(lora_b._conv_forward(h, b, None), alpha=scale)
    if torch.is_grad_enabled() and (y.requires_grad or h.requires_grad or b.requires_grad):
        return _AddProduct.apply(y, h, b.flatten(1), scale)
    return _add_product(y, h, b.flatten(1), scale)


def _is_channels_last(t: Tensor) -> bool:
    form = _CHANNELS_LAST.get(t.dim())
    return form is not None and not t.is_contiguous() and t.is_contiguous(memory_format=form)


def _tokens(t: Tensor) -> Tensor:
    """[n, c, …] as rows of c features; a view of a channels-last tensor."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def _add_product(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    if _is_channels_last(y):
        y.movedim(1, -1).view(-1, y.shape[1]).addmm_(_tokens(h), b.t(), alpha=scale)
    elif y.is_contiguous():
        y.flatten(2).baddbmm_(b.expand(len(y), *b.shape), h.flatten(2), alpha=scale)
    else:
        with without_autocast(y):
            y.add_(torch.matmul(b, h.flatten(2)).view(y.shape), alpha=scale)
    return y


class _AddProduct(torch.autograd.Function):
    """Adds in place, as autograd cannot through a view: it would copy the whole gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h, b)
        ctx.scale = scale
        ctx.mark_dirty(y)
        return _add_product(y, h, b, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        h, b = ctx.saved_tensors
        dh = db = None
        _, wants_h, wants_b, _ = ctx.needs_input_grad
        with without_autocast(dy):
            b = b * ctx.scale
            if _is_channels_last(dy):
                flat = _tokens(dy)
                if wants_h:
                    dh = (flat @ b).view(h.shape[0], *h.shape[2:], h.shape[1]).movedim(-1, 1)
                if wants_b:
                    db = (flat.t() @ _tokens(h)) * ctx.scale
            else:
                flat = dy.flatten(2)
                if wants_h:
                    dh = torch.matmul(b.t(), flat).view(h.shape)
                if wants_b:
                    db = torch.bmm(flat, h.flatten(2).transpose(1, 2)).sum(0) * ctx.scale
        return dy, dh, db, None


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
    else:
        survey.fused[name] = "torch"
