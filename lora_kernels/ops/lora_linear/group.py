"""Several frozen linear layers with LoRA adapters that read one input (q, k and v; gate and up), as
one op:

    y_i = gain_i ⊙ (x W_iᵀ + scale_i · drop_i(x) A_iᵀ B_iᵀ) + bias_i

so that a kernel reads x once, and its gradient, the sum over the members, is summed in float32 and
written once; but by the library's GEMM, which adds one member after another to what was rounded
("addmm" in `explain`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.derivatives import differentiable, transformed
from lora_kernels.ops.dropout import draw_seed
from lora_kernels.ops.gradients import OWN_DTYPE, gradient_dtype, gradient_kind, requested_gradients, requested_kinds
from lora_kernels.ops.lora_linear.call import Codes, GroupBackward, GroupForward, drops_base, keeps_z, one_by_one, side_by_side
from lora_kernels.ops.lora_linear.layouts import strided_input
from lora_kernels.ops.lora_linear.op import (
    _any_autocast,
    _check_arguments,
    _compiling,
    autocasts,
    lora_linear,
    scaled_b,
    without_autocast,
)
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.registry import ON_GPU, declare, forced_backend


class Member(NamedTuple):
    """One layer of a group: what `lora_linear` takes besides x and dropout, in its shapes and
    dtypes."""

    w: Tensor | QuantisedWeight
    a: Tensor
    b: Tensor
    scale: float | Tensor = 1.0
    bias: Tensor | None = None
    gain: Tensor | None = None
    seed: Tensor | None = None


def lora_linear_group(
    x: Tensor,
    members: Sequence[Member],
    dropout: float | Sequence[float] = 0.0,
    dropout_semantics: str = "peft",
) -> tuple[Tensor, ...]:
    """`lora_linear` of one x for each member, in one call: (y_0, y_1, …).

        y_i = gain_i ⊙ (x W_iᵀ + scale_i · drop_i(x) A_iᵀ B_iᵀ) + bias_i

    Shapes: x [..., in]; of member i w [out_i, in], a [r_i, in], b [out_i, r_i], bias and gain
    [out_i]; y_i [..., out_i] in the dtype of x. Widths, ranks, dtypes of the adapters and what is
    None may differ from member to member. Sums are taken in float32 (float64 for float64) and
    rounded as `lora_linear`'s are, the gradient of x, which sums over the members, too, or by the
    library's GEMM as often as there are members. Under autocast x and each w are cast to its dtype.
    Where a w is quantised the members run one by one, and autograd sums their gradients of x; but
    on the CPU from 64 rows of 16 bits on, or in torch's deterministic mode, once x wants one.

    Gradients flow to x and to each a, b, bias, gain and tensor scale; every w is frozen. Further
    derivatives, forward mode, torch.func and `grad_dtype` of a leaf are as in `lora_linear`. A
    member whose output is not used costs nothing in backward, and its tensors get no gradient.

    `dropout` is one probability for all or one a member. Each member draws a mask of its own, from
    its `seed` or from one drawn in the order of the members, as calls one after another would. What
    `dropout_semantics` means, and that an output with a gain must not be changed in place before
    backward, is as in `lora_linear`.

    Raises:
        TypeError: a tensor has a dtype that is not supported, or a member is not a Member.
        ValueError: a shape, device, dropout or scale does not fit, a w requires grad, or there is
            no member; the message names the member by its index. Nothing has run.
        NotImplementedError: the forced backend refuses; the message says why.
    """
    dropouts = _dropout_of_members(members, dropout)
    if _any_autocast() and autocasts(x.device.type):
        cast = x.dtype if x.dtype is torch.float64 else torch.get_autocast_dtype(x.device.type)
        with without_autocast(x):
            members = [Member(m.w.to(cast), *m[1:]) for m in members]
            return lora_linear_group(x.to(cast), members, dropouts, dropout_semantics)
    for i, (m, p) in enumerate(zip(members, dropouts, strict=True)):
        op = f"lora_linear_group: member {i}"
        if _check_arguments(x, m.w, m.a, m.b, m.scale, m.bias, m.gain, p, dropout_semantics, m.seed, op=op) is False:
            rows, as_x = strided_input(x)
            return tuple(map(as_x, lora_linear_group(rows, members, dropouts, dropout_semantics)))
    quantised = any(isinstance(m.w, QuantisedWeight) for m in members)
    if quantised and not _sums_over_codes(x):
        calls = [
            (m.w, m.a, m.b, m.scale, m.bias, m.gain, p, dropout_semantics, m.seed)
            for m, p in zip(members, dropouts, strict=True)
        ]
        return tuple(lora_linear(x, *each) for each in calls)
    scales, flat = [], []
    codes: list[Codes] = []
    for m, p in zip(members, dropouts, strict=True):
        w, code = _fields(m.w)
        codes.append(code)
        b, scale = (scaled_b(m.b, m.scale, x), 1.0) if isinstance(m.scale, Tensor) else (m.b, m.scale)
        scales.append(scale)
        flat += [w, m.a, b, m.bias, m.gain, None if p == 0.0 else draw_seed() if m.seed is None else m.seed]
    drop_base = dropout_semantics == "peft" and any(
        p > 0 and m.gain is not None for m, p in zip(members, dropouts, strict=True)
    )
    tokens = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    parts, layouts = side_by_side(codes) if quantised else (None, None)
    call = _forward_call(tokens, scales, dropouts, drop_base, flat, False, False, parts, layouts)
    if transformed():
        with without_autocast(x):
            ys = _forward.formula(call)[0]
    elif torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in flat)):
        ys = _LoRALinearGroup.apply(tokens, tuple(scales), tuple(dropouts), drop_base, layouts, *flat, *(parts or ()))
    else:
        ys = _forward(call)[0]
    return tuple(ys) if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def group_pays(x: Tensor) -> bool:
    """Whether one call for all members is faster than a call of `lora_linear` for each: `fuse` asks
    before it forms a group.

    On a GPU by what it saves: two of three launches for q, k and v, reads of x, writes of its
    gradient; no GPU has measured it yet. On the CPU it is not: the products take the time and are
    the same ones. There it took 1.00 to 1.13 of the time of a call each up to 8 tokens, and 0.97 to
    1.04 at 512.
    """
    return x.dtype is not torch.float64 and (x.is_cuda or forced_backend() in ON_GPU)


def _dropout_of_members(members, dropout):
    """The dropout of each member, once the members are what they should be."""
    if len(members) == 0:
        raise ValueError("lora_linear_group: there must be at least one member, found none")
    for i, m in enumerate(members):
        if not isinstance(m, Member):
            raise TypeError(f"lora_linear_group: member {i} must be a Member, found {type(m).__name__}")
    if not isinstance(dropout, list | tuple):
        return [dropout] * len(members)
    if len(dropout) != len(members):
        raise ValueError(
            f"lora_linear_group: dropout must be a number or one for each of {len(members)} members, found {len(dropout)}"
        )
    return list(dropout)


def _sums_over_codes(x: Tensor) -> bool:
    """Whether members over codes are one call, which rounds dx once. Of few rows it took up to 1.4
    of the time of a call each, from 64 on 0.98 to 1.04; in float32 the bits are as good."""
    if not x.is_cpu or x.dtype not in _HALVES or not (x.requires_grad and torch.is_grad_enabled()):
        return False
    many = x.numel() >= 64 * x.shape[-1] or torch.are_deterministic_algorithms_enabled()
    return many and (_compiling() or forced_backend() not in ON_GPU)


def _fields(w: Tensor | QuantisedWeight) -> tuple[Tensor, Codes]:
    if not isinstance(w, QuantisedWeight):
        return w, (None, None)
    codes, parts, layout = w.fields()
    return codes, (parts, layout)


def _columns(flat, width):
    """What stands member by member, as `width` lists over the members."""
    return [list(flat[i::width]) for i in range(width)]


def _forward_call(x, scales, dropouts, drop_base, flat, keep_h, keep_z, parts, layouts):
    """`flat`: w, a, b, bias, gain, seed of each member."""
    w, a, b, bias, gain, seed = _columns(flat, len(_TENSORS))
    return GroupForward(
        x, w, a, b, list(scales), bias, gain, list(dropouts), seed, drop_base, keep_h, keep_z, parts, layouts
    )  # fmt: skip


_HALVES = (torch.bfloat16, torch.float16)
_TENSORS = ("w", "a", "b", "bias", "gain", "seed")  # of a member, as autograd gets them
_LEARNT = slice(1, 5)  # of those: what may get a gradient
_FIRST = 5  # of them among the arguments


class _LoRALinearGroup(torch.autograd.Function):
    """Tensors go through `apply` one by one, member by member: autograd does not look into
    lists."""

    @staticmethod
    def forward(ctx, x, scales, dropouts, drop_base, layouts, *flat):
        n = len(scales)
        flat, parts = flat[: n * len(_TENSORS)], flat[n * len(_TENSORS) :]
        call = _forward_call(
            x, scales, dropouts, drop_base, flat, True, False, None if layouts is None else list(parts), layouts
        )
        wants = _columns(ctx.needs_input_grad[_FIRST : _FIRST + len(flat)], len(_TENSORS))[_TENSORS.index("gain")]
        rows = list(zip(wants, call.bias, call.gain, dropouts, strict=True))
        kept = [want and keeps_z(c, g, drops_base(drop_base, g, p)) for want, c, g, p in rows]
        y, h, z = _forward(call._replace(keep_z=any(kept)))
        # of each member only what its own gain's gradient reads
        kept_y = [y[i] if wants[i] and call.gain[i] is not None and not kept[i] else None for i in range(len(y))]
        kept_z = [z[i] if kept[i] else None for i in range(len(y))]
        ctx.save_for_backward(x, *flat, *h, *kept_y, *kept_z, *parts)
        ctx.scales, ctx.dropouts, ctx.drop_base, ctx.layouts = scales, dropouts, drop_base, layouts
        ctx.kinds = [OWN_DTYPE, *map(gradient_kind, flat)]
        # an output that nobody used comes back as None, not as zeros to multiply with
        ctx.set_materialize_grads(False)
        return tuple(y)

    @staticmethod
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        n, width = len(dys), len(_TENSORS)
        used = [i for i in range(n) if dys[i] is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        tensors = _members(saved[: width * n], width)
        hs, kept_y, kept_z = _members(saved[width * n : (width + 3) * n], n)
        codes = one_by_one(saved[(width + 3) * n :], ctx.layouts, n)
        of_x, *wants = requested_kinds(ctx.kinds, (ctx.needs_input_grad[0], *ctx.needs_input_grad[_FIRST:][: width * n]))
        wants = _members(wants, width)
        needs = [of_x, *(need for i in used for need in wants[i][_LEARNT])]
        of_used = [[each[i] for i in used] for each in (ctx.scales, ctx.dropouts, hs, kept_y, kept_z, dys)]
        scale, dropout, h, y, z, dy = of_used
        w, a, b, bias, gain, seed = map(list, zip(*(tensors[i] for i in used), strict=True))
        parts, layouts = side_by_side(codes[i] for i in used)
        call = GroupBackward(
            x, dy, w, a, b, scale, bias, gain, dropout, seed, ctx.drop_base, h, y, z, needs, parts, layouts
        )  # fmt: skip
        dx, *found = differentiable(_gradients, _formula, call, *dy)
        grads = [[None] * width for _ in range(n)]
        for i, of_member in zip(used, _members(found, len(wants[0][_LEARNT])), strict=True):
            grads[i][_LEARNT] = of_member
        none = [None] * (len(ctx.needs_input_grad) - _FIRST - width * n)  # of parts
        return (dx, None, None, None, None, *(grad for of_member in grads for grad in of_member), *none)


def _members(flat, width):
    """What stands member by member, `width` to each, as a list for each."""
    return [list(flat[i : i + width]) for i in range(0, len(flat), width)]


def _gradients(call):
    """dx, then da, db, dbias and dgain of each member."""
    if _any_autocast():
        with without_autocast(call.x):
            return _in_order(_backward(call), call.needs)
    return _in_order(_backward(call), call.needs)


def _formula(call):
    # each h anew, for it hangs on x and a
    with without_autocast(call.x):
        return _in_order(_backward.formula(call._replace(h=[None] * len(call.h))), call.needs)


def _in_order(grads, needs):
    dx, *others = grads
    return requested_gradients([dx] + [grad for of_member in zip(*others, strict=True) for grad in of_member], needs)


def _fake_forward(call):
    x = call.x
    tokens, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    members = list(call.members())
    return (
        [x.new_empty(tokens, each.b.shape[0]) for each in members],
        [x.new_empty(tokens, each.a.shape[0], dtype=wide) if each.keep_h else x.new_empty(0) for each in members],
        [x.new_empty(tokens, each.b.shape[0]) if each.keep_z else x.new_empty(0) for each in members],
    )


def _fake_backward(call):
    x, of_members = call.x, [[], [], [], []]
    for each in call.members():
        like = zip(of_members, (each.a, each.b, each.bias, each.gain), each.needs[1:], strict=True)
        for found, t, need in like:
            found.append(t.new_empty(t.shape, dtype=gradient_dtype(t, need)) if need else x.new_empty(0))
    return (x.new_empty(x.shape) if call.needs[0] else x.new_empty(0), *of_members)


_forward = declare("lora_linear_group_forward", GroupForward, "(Tensor[] y, Tensor[] h, Tensor[] z)", _fake_forward)
_backward = declare(
    "lora_linear_group_backward", GroupBackward,
    "(Tensor dx, Tensor[] da, Tensor[] db, Tensor[] dbias, Tensor[] dgain)", _fake_backward,
)  # fmt: skip
