"""DoRA's norm of the experts of a layer, one number per expert and output feature:

    n[e] = ‖W[e] + scale · B[e] A[e]‖ over the input dimension                                   (1)

by `weight_norm`'s factored form, W read once and BA never formed.
Source: DoRA, arXiv:2402.09353, eq. 5 and §4.3.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.derivatives import transformed
from lora_kernels.ops.gradients import gradient_dtype, gradient_kind, requested_kinds
from lora_kernels.ops.lora_linear.op import FLOATS, check_kinds, without_autocast
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.quantised.weight import DTYPES
from lora_kernels.ops.registry import declare
from lora_kernels.ops.scale import traced_scale
from lora_kernels.ops.weight_norm.op import Norm, NormBackward, differentiable_norm

OP = "expert_weight_norm"


def expert_weight_norm(
    w: Tensor | QuantisedWeight,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor = 1.0,
    w_squared: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Norm (1) of each row of each adapted weight.

    Shapes: w [experts, out, in], or with `transposed` [experts, in, out], which may be a
    `QuantisedWeight`; a [experts, r, in], b [experts, out, r], any strides; returns [experts, out]
    in float32 (float64 if w is float64).
    `w_squared` [experts, out] is ‖W‖² of each row, when the caller has it. Sums, errors, gradients
    (to a, b and a tensor `scale`) and further derivatives are as in `weight_norm`; those of a and b
    lie as these do.

    Raises:
        TypeError: a tensor has a dtype that is not supported.
        ValueError: a shape or device does not fit, or w requires grad; the message names the
            tensor.
    """
    _check_arguments(w, a, b, scale, w_squared, transposed)
    if isinstance(scale, Tensor):
        wide = torch.promote_types(torch.promote_types(b.dtype, w.dtype), torch.float32)
        b, scale = b.to(wide) * scale.to(wide).reshape(()), 1.0
    factor: Any = traced_scale(scale)
    codes, parts, layout = w.fields() if isinstance(w, QuantisedWeight) else (w, None, None)
    with without_autocast(codes):
        if transformed():
            return _forward.formula(ExpertNorm(codes, a, b, factor, w_squared, transposed, parts, layout))
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            return _ExpertWeightNorm.apply(codes, a, b, factor, w_squared, transposed, parts, layout)
        return _forward(ExpertNorm(codes, a, b, factor, w_squared, transposed, parts, layout))


def _check_arguments(w, a, b, scale, w_squared, transposed):
    check_kinds(OP, scale, w=w, a=a, b=b, w_squared=w_squared)
    if w.dim() != 3 or a.dim() != 3:
        raise ValueError(f"{OP}: w and a must have three dimensions, found w {list(w.shape)}, a {list(a.shape)}")
    experts, n_out, n_in = w.shape
    if transposed:
        n_out, n_in = n_in, n_out
    if isinstance(w, QuantisedWeight) and not experts:
        raise ValueError(f"{OP}: a quantised w must have experts, found {list(w.shape)}")
    rank = a.shape[1]
    if a.shape != (experts, rank, n_in) or rank < 1:
        raise ValueError(f"{OP}: a must have shape [{experts}, r, {n_in}] with r of at least 1, found {list(a.shape)}")
    for name, t, shape in (("b", b, (experts, n_out, rank)), ("w_squared", w_squared, (experts, n_out))):
        if t is not None and t.shape != shape:
            raise ValueError(f"{OP}: {name} must have shape {list(shape)}, found {list(t.shape)}")
    for name, t in (("a", a), ("b", b), ("w_squared", w_squared)):
        if t is not None and t.device != w.device:
            raise ValueError(f"{OP}: {name} must be on {w.device} (w), found {t.device}")
    if w.dtype not in FLOATS:
        raise TypeError(f"{OP}: w must be float32, bfloat16, float16 or float64, found {w.dtype}")
    if a.dtype is not b.dtype or a.dtype not in FLOATS:
        raise TypeError(f"{OP}: a and b must share one floating dtype, found {a.dtype} and {b.dtype}")
    if w.requires_grad and not transformed():
        raise ValueError(f"{OP}: w is frozen and gets no gradient, but it requires grad; call requires_grad_(False)")
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"{OP}: scale must be a number or hold one, found {list(scale.shape)}")


class _ExpertWeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, a, b, scale, w_squared, transposed, parts, layout):
        n = _forward(ExpertNorm(w, a, b, scale, w_squared, transposed, parts, layout))
        ctx.save_for_backward(w, a, b, n, *(parts or ()))
        ctx.rest = scale, transposed, layout, (gradient_kind(a), gradient_kind(b))
        return n

    @staticmethod
    def backward(ctx, dn):
        scale, transposed, layout, kinds = ctx.rest
        w, a, b, n, *parts = ctx.saved_tensors
        needs = requested_kinds(kinds, ctx.needs_input_grad[1:3])
        call = ExpertNormBackward(dn, n, w, a, b, scale, transposed, needs, parts, layout)
        da, db = differentiable_norm(_backward, call)
        return None, da, db, None, None, None, None, None


class ExpertNorm(NamedTuple):
    """The arguments of the forward op."""

    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    w_squared: Tensor | None
    transposed: bool
    parts: list[Tensor] | None = None
    layout: list[int] | None = None
    """Where W is quantised: w, parts and layout are then `QuantisedWeight.fields()`."""

    def members(self, weights: Iterable[Any]) -> Iterator[Norm]:
        """Each expert as a call of its own, with its W [out, in]."""
        for e, (w, a, b) in enumerate(zip(weights, self.a, self.b, strict=True)):
            yield Norm(w, a, b, self.scale, None if self.w_squared is None else self.w_squared[e])


class ExpertNormBackward(NamedTuple):
    """The arguments of the backward op: dn and n [experts, out], and which of da and db are wanted,
    as in `ops.gradients`."""

    dn: Tensor
    n: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    needs: list[int]
    parts: list[Tensor] | None = None
    layout: list[int] | None = None

    def members(self, weights: Iterable[Any]) -> Iterator[NormBackward]:
        """Each expert as a call of its own, with its W [out, in]."""
        for dn, n, w, a, b in zip(self.dn, self.n, weights, self.a, self.b, strict=True):
            yield NormBackward(dn, n, w, a, b, self.scale, self.needs)


def _fake_norm(call):
    dtype = DTYPES[call.layout[3]] if call.layout else call.w.dtype
    return call.w.new_empty(call.b.shape[:2], dtype=torch.promote_types(dtype, torch.float32))


def _fake_backward(call):
    like = zip((call.a, call.b), call.needs, strict=True)
    return tuple(torch.empty_like(t, dtype=gradient_dtype(t, need)) if need else call.w.new_empty(0) for t, need in like)


_forward = declare("expert_weight_norm_forward", ExpertNorm, "Tensor", _fake_norm)
_backward = declare("expert_weight_norm_backward", ExpertNormBackward, "(Tensor da, Tensor db)", _fake_backward)
