"""A frozen linear layer with a LoRA adapter, in one pass:

    y = gain ⊙ (x Wᵀ + scale · drop(x) Aᵀ Bᵀ) + bias                                             (1)

With gain = m / ‖W + scale·BA‖, one number per output feature, this is DoRA.
Sources: LoRA, arXiv:2106.09685, eq. 3; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353, eq. 5.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.ops.derivatives import differentiable, transformed, under_functorch
from lora_kernels.ops.dropout import draw_seed
from lora_kernels.ops.gradients import OWN_DTYPE, gradient_dtype, gradient_kind, requested_gradients, requested_kinds
from lora_kernels.ops.lora_linear.call import Backward, Forward, Needs, keeps_z
from lora_kernels.ops.lora_linear.layouts import is_strided, strided_input
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.registry import declare
from lora_kernels.ops.scale import traced_scale

try:
    from lora_kernels.ops.cpu_tensors import valid_lora_linear
    from lora_kernels.ops.lora_linear.plain import plain_forward
except ImportError:
    valid_lora_linear = plain_forward = None

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DROPOUT_SEMANTICS = ("peft", "lora_only")
_any_autocast = torch._C._is_any_autocast_enabled
_compiling = torch.compiler.is_compiling


def lora_linear(
    x: Tensor,
    w: Tensor | QuantisedWeight,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    dropout_semantics: str = "peft",
    seed: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> Tensor:
    """Applies formula (1).

    Shapes: x [..., in], w [out, in], a [r, in], b [out, r], bias [out], gain [out]; returns [...,
    out] in the dtype of x. x and w share one dtype (float32, bfloat16, float16 or float64); a and b
    share one, which may be another. Sums are taken in float32 (float64 for float64) and rounded
    once; but of many tokens on a GPU, where a library GEMM adds to the adapter's term ("addmm" in
    `explain`), that is rounded before. Under autocast x and w are cast to its dtype. Gradients flow
    to x, a, b, bias, gain and to a tensor `scale`; w is frozen. Under create_graph the gradients
    have derivatives in turn, of any order, by the reference's formula. So do forward mode and
    torch.func (jvp, vmap, grad, …), in which w has a gradient, too. Gradients of a 16-bit a, b,
    bias or gain come, and add up in its `grad`, in float32 and unrounded where its `grad_dtype` is
    float32. That is torch's setting, for leaves. A compiled graph rounds them first; so is b's with
    a tensor `scale`.

    Dropout, with probability `dropout`, acts on the input of A. `dropout_semantics` matters only
    with `gain`: "peft" also drops the input of the rescaled base, as PEFT's DoRA does,
        y = x Wᵀ + (gain - 1) ⊙ (drop(x) Wᵀ) + gain ⊙ scale · drop(x) Aᵀ Bᵀ + bias,
    "lora_only" is formula (1) and one GEMM cheaper. The mask is a function of `seed` (int64 []),
    drawn from torch's default CPU generator when not given; it is the same on every backend and
    never stored. A CUDA graph replays the mask of a seed on the CPU; one on the GPU is read anew.

    w may be int8 with `w_scale` [out], floating: then W = w_scale ⊙ w, one scale for each row, as
    bitsandbytes' `SCB` / 127 is. W is not formed: w is read as bytes, and the gradient of x is that
    of W. w_scale gets none. Or w is a `QuantisedWeight` of the dtype of x, whose numbers are
    rounded to that dtype once, in both directions; W is not formed either.

    A nested x gives a nested result, mkldnn one of its kind, and a sparse one is made dense.

    With `gain`, the gradient of gain reads y, so y must not be changed in place before backward.

    Raises:
        TypeError: a tensor has a dtype that is not supported.
        ValueError: a shape, device, dropout or scale does not fit, or w requires grad; the message
            names the tensor.
        NotImplementedError: the forced backend refuses; the message says why.
    """
    # a quick yes to what follows
    if plain_forward is not None and not _compiling() and dropout == 0.0 and seed is None and w_scale is None:
        y = plain_forward(x, w, a, b, scale, bias, gain) if dropout_semantics == "peft" else None
        if y is not None:
            return y
    if _any_autocast() and autocasts(x.device.type):
        cast = x.dtype if x.dtype is torch.float64 else torch.get_autocast_dtype(x.device.type)
        with without_autocast(x):
            w = w if w_scale is not None else w.to(cast)
            return lora_linear(x.to(cast), w, a, b, scale, bias, gain, dropout, dropout_semantics, seed, w_scale)
    strided = _check_arguments(x, w, a, b, scale, bias, gain, dropout, dropout_semantics, seed, w_scale)
    if strided is False:
        rows, as_x = strided_input(x)
        return as_x(lora_linear(rows, w, a, b, scale, bias, gain, dropout, dropout_semantics, seed, w_scale))
    if isinstance(scale, Tensor):
        b, scale = scaled_b(b, scale, x), 1.0
    factor: Any = scale if strided is None else traced_scale(scale)
    drop_base = dropout > 0 and gain is not None and dropout_semantics == "peft"
    if dropout > 0:
        seed = draw_seed() if seed is None else seed
    else:
        seed = None
    tokens = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    parts = layout = None
    if isinstance(w, QuantisedWeight):
        w, parts, layout = w.fields()
    fields = (tokens, w, a, b, factor, bias, gain, dropout, seed, drop_base)
    # the first half of `transformed`, without the cost of its call
    if (forward_ad._current_level >= 0 or under_functorch()) and transformed():
        with without_autocast(x):
            y = _forward.formula(Forward(*fields, False, False, w_scale, parts, layout))[0]
    elif torch.is_grad_enabled() and (
        a.requires_grad
        or b.requires_grad
        or x.requires_grad
        or (gain is not None and gain.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        y = _LoRALinear.apply(*fields, w_scale, parts, layout)
    else:
        y = _forward(Forward(*fields, False, False, w_scale, parts, layout))[0]
    return y if tokens is x else y.view(*x.shape[:-1], b.shape[0])


def scaled_b(b: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """b times a tensor scale, in the dtype of the sums: so the scale gets its gradient from
    autograd."""
    wide = torch.promote_types(torch.promote_types(b.dtype, x.dtype), torch.float32)
    return b.to(wide) * scale.to(wide).reshape(())


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device; meta has none (is_autocast_available says so too, but
    2.11 cannot trace it)."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Inside it no cast of autocast reaches the float32 sums of a backend."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def check_kinds(op: str, scale: Any, **tensors: Any) -> None:
    """Raises TypeError unless `scale` is a number or tensor and the others are tensors or None, but
    for the first three."""
    for i, (name, tensor) in enumerate(tensors.items()):
        if name == "w" and isinstance(tensor, QuantisedWeight):
            continue
        if not isinstance(tensor, Tensor) and (tensor is not None or i < 3):
            raise TypeError(f"{op}: {name} must be a tensor, found {type(tensor).__name__}")
    if not isinstance(scale, Tensor | float | int | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{op}: scale must be a number or a tensor, found {type(scale).__name__}")


def _check_arguments(x, w, a, b, scale, bias, gain, dropout, dropout_semantics, seed, w_scale=None, op="lora_linear"):
    """Raises what the ops document; False where x must first go through `strided_input`, and
    nothing was checked; None where a call while nothing compiles is plainly right."""
    # fast yes; anything else goes through the checks below
    if (
        valid_lora_linear is not None
        and not _compiling()
        and dropout == 0.0
        and seed is None
        and w_scale is None
        and dropout_semantics == "peft"
        and type(scale) is float
        and -math.inf < scale < math.inf
        and not w.requires_grad
        and valid_lora_linear(x, w.packed() if type(w) is QuantisedWeight else w, a, b, bias, gain)
    ):
        return None
    check_kinds(op, scale, x=x, w=w, a=a, b=b, bias=bias, gain=gain, seed=seed, w_scale=w_scale)
    if not is_strided(x):
        return False
    # one look at each attribute: the check is a good part of what a small call costs
    if w.dim() != 2 or a.dim() != 2 or x.dim() < 1:
        raise ValueError(
            f"{op}: x must have at least one dimension, w and a two, "
            f"found x {list(x.shape)}, w {list(w.shape)}, a {list(a.shape)}"
        )
    (n_out, n_in), rank = w.shape, a.shape[0]
    if rank < 1:
        raise ValueError(f"{op}: a must have at least one row (the rank), found {list(a.shape)}")
    if x.shape[-1] != n_in:
        raise ValueError(f"{op}: x must have {n_in} features (w is [{n_out}, {n_in}]), found {list(x.shape)}")
    if a.shape != (rank, n_in):
        raise _wrong_shape(op, "a", a, (rank, n_in))
    if b.shape != (n_out, rank):
        raise _wrong_shape(op, "b", b, (n_out, rank))
    dtype, adapter_dtype = x.dtype, a.dtype
    if dtype not in FLOATS:
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or float64, found {dtype}")
    if w_scale is None and w.dtype is not dtype:
        hint = " (int8 wants w_scale)" if w.dtype is torch.int8 else ""
        raise TypeError(f"{op}: w must have the dtype of x, {dtype}, found {w.dtype}{hint}")
    if w_scale is not None and isinstance(w, QuantisedWeight):
        raise TypeError(f"{op}: w is a QuantisedWeight, which has its scales; w_scale must be None")
    if w_scale is not None and w.dtype is not torch.int8:
        raise TypeError(f"{op}: w must be int8, since w_scale is given, found {w.dtype}")
    if b.dtype is not adapter_dtype or adapter_dtype not in FLOATS:
        raise TypeError(f"{op}: a and b must share one floating dtype, found {adapter_dtype} and {b.dtype}")
    if w.requires_grad and not transformed():
        raise ValueError(f"{op}: w is frozen and gets no gradient, but it requires grad; call requires_grad_(False)")
    device = x.device
    if w.device != device or a.device != device or b.device != device:
        found = f"w {w.device}, a {a.device}, b {b.device}"
        raise ValueError(f"{op}: all tensors must be on {device} (x), found {found}")
    if w_scale is not None and w_scale.requires_grad and not transformed():
        raise ValueError(f"{op}: w_scale is frozen and gets no gradient, but it requires grad; call requires_grad_(False)")
    for name, vector in (("bias", bias), ("gain", gain), ("w_scale", w_scale)):
        if vector is None:
            continue
        if vector.shape != (n_out,):
            raise _wrong_shape(op, name, vector, (n_out,))
        if vector.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be floating, found {vector.dtype}")
        if vector.device != device:
            raise ValueError(f"{op}: {name} must be on {device} (x), found {vector.device}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1), found {dropout}")
    if dropout_semantics not in DROPOUT_SEMANTICS:
        raise ValueError(f"{op}: dropout_semantics must be peft or lora_only, found {dropout_semantics!r}")
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{op}: scale must be a number or hold one, found {list(scale.shape)}")
    # a compiled graph may hold it as a symbol, which math.isfinite refuses
    elif not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite, found {scale}")
    if seed is not None and (seed.dtype is not torch.int64 or seed.numel() != 1):
        raise ValueError(f"{op}: seed must be one int64, found {seed.dtype} {list(seed.shape)}")
    if seed is not None and seed.device != device and seed.device.type != "cpu":
        raise ValueError(f"{op}: seed must be on {device} (x) or the CPU, found {seed.device}")
    return True


def _wrong_shape(op, name, tensor, shape):
    return ValueError(f"{op}: {name} must have shape {list(shape)}, found {list(tensor.shape)}")


# autograd gets what `Forward` has but for what it keeps, and looks into no structure
_FIELDS = [name for name in Forward._fields if name not in ("keep_h", "keep_z")]
_LEARNT = [_FIELDS.index(name) for name in Needs._fields]  # what gets a gradient
_GAIN = _FIELDS.index("gain")
# for each field its place among the gradients, the last of which is None
_PLACES = [Needs._fields.index(name) if name in Needs._fields else -1 for name in _FIELDS]


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, a, b, scale, bias, gain, dropout, seed, drop_base, w_scale, parts, layout):
        learns_gain = gain is not None and ctx.needs_input_grad[_GAIN]
        keep_z = learns_gain and keeps_z(bias, gain, drop_base)
        call = Forward(x, w, a, b, scale, bias, gain, dropout, seed, drop_base, True, keep_z, w_scale, parts, layout)
        y, h, z = _forward(call)
        kept_y = y if learns_gain and not keep_z else None
        ctx.save_for_backward(x, w, a, b, bias, gain, seed, w_scale, h, kept_y, z if keep_z else None, *(parts or ()))
        ctx.rest = scale, dropout, drop_base, layout, [OWN_DTYPE, *map(gradient_kind, (a, b, bias, gain))]
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b, bias, gain, seed, w_scale, h, y, z, *parts = ctx.saved_tensors
        (scale, dropout, drop_base, layout, kinds), wants = ctx.rest, ctx.needs_input_grad
        needs = requested_kinds(kinds, [wants[i] for i in _LEARNT])
        of_layer = (x, w, a, b, scale, bias, gain, dropout, seed, drop_base)
        call = Backward(dy, *of_layer, h, y, z, needs, w_scale, parts, layout)
        grads = (*differentiable(_gradients, _formula, call, dy), None)
        return tuple([grads[i] for i in _PLACES])


def _gradients(call):
    if _any_autocast():
        with without_autocast(call.dy):
            grads = _backward(call)
    else:
        grads = _backward(call)
    return requested_gradients(grads, call.needs)


def _formula(call):
    # h anew, for it hangs on x and a
    with without_autocast(call.dy):
        return _backward.formula(call._replace(h=None))


def _fake_forward(call):
    x, (n_out, rank) = call.x, call.b.shape
    tokens, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(tokens, n_out),
        x.new_empty(tokens, rank, dtype=wide) if call.keep_h else x.new_empty(0),
        x.new_empty(tokens, n_out) if call.keep_z else x.new_empty(0),
    )


def _fake_backward(call):
    like = zip((call.x, call.a, call.b, call.bias, call.gain), call.needs, strict=True)
    return tuple(t.new_empty(t.shape, dtype=gradient_dtype(t, need)) if need else call.x.new_empty(0) for t, need in like)


_forward = declare("lora_linear_forward", Forward, "(Tensor y, Tensor h, Tensor z)", _fake_forward)
_backward = declare(
    "lora_linear_backward", Backward, "(Tensor dx, Tensor da, Tensor db, Tensor dbias, Tensor dgain)", _fake_backward
)
