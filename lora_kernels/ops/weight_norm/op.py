"""DoRA's norm, one number per output feature, without forming BA:

    n = ‖W + scale·BA‖ over the input dimension                                                  (1)
    n² = ‖W‖² + 2·scale·rowsum((W Aᵀ) ⊙ B) + scale²·rowsum((B A Aᵀ) ⊙ B)                         (2)

Sources: DoRA, arXiv:2402.09353, eq. 5 and §4.3; the factored form, arXiv:2603.22276, §2.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.checks import check_adapted_weight
from lora_kernels.ops.derivatives import differentiable, transformed
from lora_kernels.ops.gradients import gradient_dtype, gradient_kind, requested_gradients, requested_kinds
from lora_kernels.ops.lora_linear.op import FLOATS, without_autocast
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.quantised.weight import DTYPES
from lora_kernels.ops.registry import Op, declare
from lora_kernels.ops.scale import traced_scale

MAX_CONDITION = {torch.float32: 4.0, torch.bfloat16: 64.0, torch.float16: 64.0}
"""Cancellation up to which the factored form (2) is within 1e-5 (float32) and 1e-4 (16-bit)."""


def weight_norm(
    w: Tensor | QuantisedWeight, a: Tensor, b: Tensor, scale: float | Tensor = 1.0, w_squared: Tensor | None = None
) -> Tensor:
    """Norm (1) of each row of the adapted weight.

    Shapes: w [out, in], which may be a `QuantisedWeight`, a [r, in], b [out, r]; returns [out] in
    float32 (float64 if w is float64).
    `w_squared` is `row_norm_squared(w)` when the caller has it: w is frozen, so it need not be
    summed again. Sums are float32, never TF32. Rows in which the terms of (2) cancel are summed
    directly as (1). So the error stays below 1e-4 (16-bit w) and 1e-5 (float32 w) of ‖W‖ +
    scale·‖|B| |A|‖. It stays below that of the norm itself, too, unless single elements of W and
    scale·BA cancel. Numbers whose squares leave float32's range are not provided for. Gradients
    flow to a, b and a tensor `scale` (the exact gradient; detach the result for the paper's §4.3).
    The gradient of a zero row is zero. Further derivatives, forward mode, torch.func and
    `grad_dtype` of a leaf are as in `lora_linear`.

    Raises:
        TypeError: a tensor has a dtype that is not supported.
        ValueError: a shape or device does not fit, or w requires grad; the message names the
            tensor.
    """
    _check_arguments(w, a, b, scale, w_squared)
    if isinstance(scale, Tensor):
        wide = torch.promote_types(torch.promote_types(b.dtype, w.dtype), torch.float32)
        b, scale = b.to(wide) * scale.to(wide).reshape(()), 1.0
    factor: Any = traced_scale(scale)
    codes, parts, layout = w.fields() if isinstance(w, QuantisedWeight) else (w, None, None)
    with without_autocast(codes):
        if transformed():
            return _forward.formula(Norm(codes, a, b, factor, w_squared, parts, layout))
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            return _WeightNorm.apply(codes, a, b, factor, w_squared, parts, layout)
        return _forward(Norm(codes, a, b, factor, w_squared, parts, layout))


def row_norm_squared(w: Tensor | QuantisedWeight) -> Tensor:
    """‖W‖² of each row: w [out, in] → [out] in float32 (float64 if w is float64), by the sum that
    `weight_norm` uses."""
    if w.dim() != 2:
        raise ValueError(f"row_norm_squared: w must be [out, in], found {list(w.shape)}")
    if w.dtype not in FLOATS:
        raise TypeError(f"row_norm_squared: w must be floating, found {w.dtype}")
    if isinstance(w, QuantisedWeight):
        return _row_norm_squared(RowNorm(*w.fields()))
    return _row_norm_squared.formula(RowNorm(w)) if transformed() else _row_norm_squared(RowNorm(w.detach()))


def dora_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """DoRA's gain m / n, [out]; 1, with no gradient, where the norm is zero (the layer then keeps
    that row as it is)."""
    zero = norm == 0
    return torch.where(zero, 1.0, magnitude / torch.where(zero, 1.0, norm))


def _check_arguments(w, a, b, scale, w_squared):
    check_adapted_weight("weight_norm", w, a, b, scale, {"w_squared": w_squared})
    if w.requires_grad and not transformed():
        raise ValueError("weight_norm: w is frozen and gets no gradient, but it requires grad; call requires_grad_(False)")
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"weight_norm: scale must be a number or hold one, found {list(scale.shape)}")


class _WeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, a, b, scale, w_squared, parts, layout):
        n = _forward(Norm(w, a, b, scale, w_squared, parts, layout))
        ctx.save_for_backward(w, a, b, n, *(parts or ()))
        ctx.scale, ctx.layout, ctx.kinds = scale, layout, (gradient_kind(a), gradient_kind(b))
        return n

    @staticmethod
    def backward(ctx, dn):
        needs = requested_kinds(ctx.kinds, ctx.needs_input_grad[1:3])
        w, a, b, n, *parts = ctx.saved_tensors
        call = NormBackward(dn, n, w, a, b, ctx.scale, needs, parts, ctx.layout)
        da, db = differentiable_norm(_backward, call)
        return None, da, db, None, None, None, None


def differentiable_norm(backward: Op, call: Any) -> Any:
    """(da, db) of a norm's backward op, None for what is not wanted, with derivatives under
    create_graph."""

    def gradients(call):
        with without_autocast(call.w):
            return requested_gradients(backward(call), call.needs)

    def formula(call):
        with without_autocast(call.w):
            return backward.formula(call)

    return differentiable(gradients, formula, call, call.dn)


class Norm(NamedTuple):
    """The arguments of the forward op."""

    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    w_squared: Tensor | None
    parts: list[Tensor] | None = None
    layout: list[int] | None = None
    """Where W is quantised: w, parts and layout are then `QuantisedWeight.fields()`."""


class NormBackward(NamedTuple):
    """The arguments of the backward op: dn and n [out], and which of da and db are wanted, as in
    `ops.gradients`."""

    dn: Tensor
    n: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    needs: list[int]
    parts: list[Tensor] | None = None
    layout: list[int] | None = None


class RowNorm(NamedTuple):
    """The argument of ‖W‖²."""

    w: Tensor
    parts: list[Tensor] | None = None
    layout: list[int] | None = None


def _fake_norm(call):
    if call.layout:
        _, n_out, _, dtype, *_ = call.layout
        return call.w.new_empty(n_out, dtype=torch.promote_types(DTYPES[dtype], torch.float32))
    return call.w.new_empty(call.w.shape[0], dtype=torch.promote_types(call.w.dtype, torch.float32))


def _fake_backward(call):
    like = zip((call.a, call.b), call.needs, strict=True)
    return tuple(t.new_empty(t.shape, dtype=gradient_dtype(t, need)) if need else call.w.new_empty(0) for t, need in like)


_forward = declare("weight_norm_forward", Norm, "Tensor", _fake_norm)
_backward = declare("weight_norm_backward", NormBackward, "(Tensor da, Tensor db)", _fake_backward)
_row_norm_squared = declare("row_norm_squared", RowNorm, "Tensor", _fake_norm)
