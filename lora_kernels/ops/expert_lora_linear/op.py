"""The frozen linear layers of a mixture of experts, each with a LoRA adapter of its own:

    y[t] = gain[e] ⊙ (W[e] x[t] + scale · B[e] A[e] x[t]) + bias[e]                              (1)

with e the expert of token t; the tokens are sorted by expert. With gain = m / ‖W + scale·BA‖ this
is DoRA. W + scale·BA is never formed.
Sources: LoRA, arXiv:2106.09685, eq. 3; grouped products of experts: MegaBlocks, arXiv:2211.15841.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.ops.derivatives import differentiable, transformed, under_functorch
from lora_kernels.ops.expert_lora_linear.call import Backward, Forward
from lora_kernels.ops.gradients import OWN_DTYPE, gradient_dtype, gradient_kind, requested_gradients, requested_kinds
from lora_kernels.ops.lora_linear.call import Needs, keeps_z
from lora_kernels.ops.lora_linear.op import FLOATS, _any_autocast, autocasts, check_kinds, scaled_b, without_autocast
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.registry import declare
from lora_kernels.ops.scale import traced_scale

OP = "expert_lora_linear"


def expert_lora_linear(
    x: Tensor,
    offsets: Tensor,
    w: Tensor | QuantisedWeight,
    a: Tensor | None,
    b: Tensor | None,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    transposed: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    """Applies formula (1).

    Shapes: x [tokens, in], its rows sorted by expert; offsets [experts], int32 or int64, the end of
    each expert's rows, as `offs` of `torch.nn.functional.grouped_mm`; w [experts, out, in], or with
    `transposed` [experts, in, out]; a [experts, r, in], b [experts, out, r], any strides, both None
    for experts without an adapter; bias and gain [experts, out]. Returns [tokens, out] in the dtype
    of x. Rows from the last offset on belong to no expert: their y and dx are zero. w of an expert
    without tokens is not read. w may be a `QuantisedWeight` of the same three dimensions, whose
    numbers are rounded to the dtype of x once, in both directions; W is not formed.

    With `index` [tokens], int64, x is [rows, in], token t is its row index[t], and it is the tokens
    that are sorted by expert. No permuted copy of x is made, nor kept for backward. dx is then the
    sum over the tokens of each row: of their gradients in the dtype of x, in float32 and rounded
    once.

    x and w share one dtype (float32, bfloat16, float16 or float64); a and b share one, which may be
    another. Sums are taken in float32 (float64 for float64) and rounded once. Under autocast x and
    w are cast to its dtype. Gradients flow to x, a, b, bias, gain and to a tensor `scale`; w is
    frozen. Those of a, b, bias and gain lie as these do, and are zero where an expert has no
    tokens. Further derivatives, forward mode, torch.func and `grad_dtype` of a leaf are as in
    `lora_linear`.

    With `gain`, the gradient of gain reads y, so y must not be changed in place before backward.

    Raises:
        TypeError: a tensor has a dtype that is not supported.
        ValueError: a shape, device or scale does not fit, w requires grad, or, where they are read
            on the CPU, the offsets fall or leave the tokens; the message names the tensor.
        NotImplementedError: the forced backend refuses; the message says why.
    """
    if _any_autocast() and autocasts(x.device.type):
        cast = x.dtype if x.dtype is torch.float64 else torch.get_autocast_dtype(x.device.type)
        with without_autocast(x):
            return expert_lora_linear(x.to(cast), offsets, w.to(cast), a, b, scale, bias, gain, transposed, index)
    _check_arguments(x, offsets, w, a, b, scale, bias, gain, transposed, index)
    if b is None:
        scale = 1.0
    elif isinstance(scale, Tensor):
        b, scale = scaled_b(b, scale, x), 1.0
    factor: Any = traced_scale(scale)
    parts = layout = None
    if isinstance(w, QuantisedWeight):
        w, parts, layout = w.fields()
    call = Forward(x, w, a, b, offsets, factor, bias, gain, transposed, False, False, index, parts, layout)
    if (forward_ad._current_level >= 0 or under_functorch()) and transformed():
        with without_autocast(x):
            return _forward.formula(call)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, a, b, bias, gain)):
        return _ExpertLoRALinear.apply(x, w, a, b, offsets, factor, bias, gain, transposed, index, parts, layout)
    return _forward(call)[0]


def _check_arguments(x, offsets, w, a, b, scale, bias, gain, transposed, index):
    check_kinds(OP, scale, x=x, offsets=offsets, w=w, a=a, b=b, bias=bias, gain=gain, index=index)
    if x.dim() != 2 or w.dim() != 3:
        raise ValueError(f"{OP}: x must have two dimensions and w three, found x {list(x.shape)}, w {list(w.shape)}")
    if isinstance(w, QuantisedWeight) and not w.shape[0]:
        raise ValueError(f"{OP}: a quantised w must have experts, found {list(w.shape)}")
    experts, n_out, n_in = w.shape if not transposed else (w.shape[0], w.shape[2], w.shape[1])
    if x.shape[1] != n_in:
        order = "[experts, in, out]" if transposed else "[experts, out, in]"
        raise ValueError(f"{OP}: x must have {n_in} features (w is {order} {list(w.shape)}), found {list(x.shape)}")
    if offsets.shape != (experts,):
        raise ValueError(
            f"{OP}: offsets must have shape [{experts}], one end for each expert of w, found {list(offsets.shape)}"
        )
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: offsets must be int32 or int64, found {offsets.dtype}")
    if index is not None and (index.dim() != 1 or index.dtype is not torch.int64):
        raise ValueError(f"{OP}: index must be int64 of one dimension, found {index.dtype} {list(index.shape)}")
    if (a is None) != (b is None):
        raise ValueError(f"{OP}: a and b must both be given or both be None, found a {_of(a)}, b {_of(b)}")
    if a is not None:
        rank = a.shape[1] if a.dim() == 3 else 0
        if a.shape != (experts, rank, n_in) or rank < 1:
            raise ValueError(f"{OP}: a must have shape [{experts}, r, {n_in}] with r of at least 1, found {list(a.shape)}")
        if b.shape != (experts, n_out, rank):
            raise ValueError(f"{OP}: b must have shape {[experts, n_out, rank]}, found {list(b.shape)}")
        if a.dtype is not b.dtype or a.dtype not in FLOATS:
            raise TypeError(f"{OP}: a and b must share one floating dtype, found {a.dtype} and {b.dtype}")
    for name, vector in (("bias", bias), ("gain", gain)):
        if vector is None:
            continue
        if vector.shape != (experts, n_out):
            raise ValueError(f"{OP}: {name} must have shape {[experts, n_out]}, found {list(vector.shape)}")
        if vector.dtype not in FLOATS:
            raise TypeError(f"{OP}: {name} must be floating, found {vector.dtype}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{OP}: x must be float32, bfloat16, float16 or float64, found {x.dtype}")
    if w.dtype is not x.dtype:
        raise TypeError(f"{OP}: w must have the dtype of x, {x.dtype}, found {w.dtype}")
    if w.requires_grad and not transformed():
        raise ValueError(f"{OP}: w is frozen and gets no gradient, but it requires grad; call requires_grad_(False)")
    tensors = {"offsets": offsets, "w": w, "a": a, "b": b, "bias": bias, "gain": gain, "index": index}
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{OP}: {name} must be on {x.device} (x), found {t.device}")
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{OP}: scale must be a number or hold one, found {list(scale.shape)}")
    elif not -torch.inf < scale < torch.inf:
        raise ValueError(f"{OP}: scale must be finite, found {scale}")


def _of(t):
    return None if t is None else list(t.shape)


# autograd gets what `Forward` has but for what it keeps
_FIELDS = [name for name in Forward._fields if name not in ("keep_h", "keep_z")]
_LEARNT = [_FIELDS.index(name) for name in Needs._fields]
# for each field its place among the gradients, the last of which is None
_PLACES = [Needs._fields.index(name) if name in Needs._fields else -1 for name in _FIELDS]


class _ExpertLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, a, b, offsets, scale, bias, gain, transposed, index, parts, layout):
        learns_gain = gain is not None and ctx.needs_input_grad[_FIELDS.index("gain")]
        # whether a gain is zero, so that y does not give z back, would be a question to the GPU
        keep_z = learns_gain and (keeps_z(bias, gain, False) or not x.is_cpu)
        call = Forward(x, w, a, b, offsets, scale, bias, gain, transposed, b is not None, keep_z, index, parts, layout)
        y, h, z = _forward(call)
        kept_y = y if learns_gain and not keep_z else None
        kept_h = None if b is None else h
        kept_z = z if keep_z else None
        ctx.save_for_backward(x, w, a, b, offsets, bias, gain, kept_h, kept_y, kept_z, index, *(parts or ()))
        ctx.rest = scale, transposed, layout, [OWN_DTYPE, *map(gradient_kind, (a, b, bias, gain))]
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b, offsets, bias, gain, h, y, z, index, *parts = ctx.saved_tensors
        (scale, transposed, layout, kinds), wants = ctx.rest, ctx.needs_input_grad
        needs = requested_kinds(kinds, [wants[i] for i in _LEARNT])
        call = Backward(dy, x, w, a, b, offsets, scale, bias, gain, transposed, h, y, z, needs, index, parts, layout)
        grads = (*differentiable(_gradients, _formula, call, dy), None)
        return tuple([grads[i] for i in _PLACES])


def _gradients(call):
    with without_autocast(call.dy):
        return requested_gradients(_backward(call), call.needs)


def _formula(call):
    # h anew, for it hangs on x and a
    with without_autocast(call.dy):
        return _backward.formula(call._replace(h=None))


def _fake_forward(call):
    x, (tokens, n_out), b = call.x, (call.tokens, call.n_out), call.b
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(tokens, n_out),
        x.new_empty(tokens, b.shape[2], dtype=wide) if call.keep_h and b is not None else x.new_empty(0),
        x.new_empty(tokens, n_out) if call.keep_z else x.new_empty(0),
    )


def _fake_backward(call):
    dx, *others = call.needs
    like = zip((call.a, call.b, call.bias, call.gain), others, strict=True)
    return (
        call.x.new_empty(call.x.shape if dx else 0),
        *(torch.empty_like(t, dtype=gradient_dtype(t, need)) if need else call.x.new_empty(0) for t, need in like),
    )


_forward = declare("expert_lora_linear_forward", Forward, "(Tensor y, Tensor h, Tensor z)", _fake_forward)
_backward = declare(
    "expert_lora_linear_backward", Backward, "(Tensor dx, Tensor da, Tensor db, Tensor dbias, Tensor dgain)", _fake_backward
)
