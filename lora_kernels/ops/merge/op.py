"""The weight of a plain layer that computes what a base and its adapter do:

    merged = gain ⊙ (W + scale·B A)                                                              (1)

Without gain this is LoRA's; with gain = m / ‖W + scale·BA‖, one number per output feature, DoRA's.
Sources: LoRA, arXiv:2106.09685, §4.1; DoRA, arXiv:2402.09353, eq. 5.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.checks import check_adapted_weight
from lora_kernels.ops.derivatives import transformed
from lora_kernels.ops.lora_linear.op import FLOATS, without_autocast
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.registry import declare


def merged_weight(
    w: Tensor | QuantisedWeight,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    gain: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Formula (1), W read once and the result written once.

    Shapes: w [out, in], a [r, in], b [out, r], gain [out]; returns [out, in] in the dtype of w,
    with its strides if it has no gaps. Of a `QuantisedWeight` the result is a plain weight of its
    dtype. Sums are float32 (float64 if w is float64) and rounded once;
    no copy of W is made in their dtype. `out` takes the result and is returned: w itself, which is
    then changed in place, or a tensor that lies apart. Backward does not reach it: it runs as under
    torch.no_grad(), and the result does not require grad. Forward mode and torch.func go through.

    Raises:
        TypeError: a tensor has a dtype that is not supported, or scale is no number.
        ValueError: a shape, device or scale does not fit, or out shares a part of its memory with
            an argument; the message names it, and nothing has changed.
        NotImplementedError: the forced backend refuses; the message says why.
    """
    _check_arguments(w, a, b, scale, gain, out)
    if isinstance(w, QuantisedWeight):
        w = w.dequantise()
        out = w if out is None and not transformed() else out  # which may be of a batch or a tangent
    if transformed():
        return _transformed(w, a, b, scale, gain, out)
    with torch.no_grad(), without_autocast(w):
        if out is None:
            return _merged(MergedWeight(w, a, b, scale, gain))
        _merge_into(MergeInto(w, a, b, scale, gain, out))
    # a backend writes unseen by autograd: a graph that saved out as it was must raise
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _transformed(w, a, b, scale, gain, out):
    with without_autocast(w):
        if out is None:
            return _merged.formula(MergedWeight(w, a, b, scale, gain))
        _merge_into.formula(MergeInto(w, a, b, scale, gain, out))
    return out


def _check_arguments(w, a, b, scale, gain, out):
    if isinstance(scale, Tensor):
        raise TypeError("merged_weight: scale must be a number, found a tensor; scale.item() is one")
    check_adapted_weight("merged_weight", w, a, b, scale, {"gain": gain}, {"out": out})
    if gain is not None and gain.dtype not in FLOATS:
        raise TypeError(f"merged_weight: gain must be floating, found {gain.dtype}")
    if not math.isfinite(scale):
        raise ValueError(f"merged_weight: scale must be finite, found {scale}")
    if out is not None:
        _check_out(w, a, b, gain, out)


def _check_out(w, a, b, gain, out):
    if out.dtype is not w.dtype:
        raise TypeError(f"merged_weight: out must have the dtype of w, {w.dtype}, found {out.dtype}")
    if torch.compiler.is_compiling():
        return  # the graph gives its own memory to out
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"merged_weight: out must have its own memory for each element, found strides {list(out.stride())}")
    for name, tensor in (("w", w), ("a", a), ("b", b), ("gain", gain)):
        if not isinstance(tensor, Tensor) or not torch._C._is_alias_of(out, tensor):
            continue
        if tensor is w and _layout(out) == _layout(w):
            continue
        (first, end), (other, other_end) = _byte_range(out), _byte_range(tensor)
        if first < other_end and other < end:
            wanted = "be w itself or lie apart from it" if tensor is w else f"lie apart from {name}"
            raise ValueError(f"merged_weight: out must {wanted}, found memory that they share in part")


def _layout(t):
    return t.storage_offset(), t.stride(), t.is_neg()


def _byte_range(t):
    """The bytes of its storage between a tensor's first element and its last, from and to."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    first = t.storage_offset()
    return first * t.element_size(), (first + last + 1) * t.element_size()


class MergedWeight(NamedTuple):
    """The arguments of the op that makes its result."""

    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None


class MergeInto(NamedTuple):
    """The arguments of the op that fills `out`."""

    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None
    out: Tensor


_merged = declare("merged_weight", MergedWeight, "Tensor", lambda call: torch.empty_like(call.w))
_merge_into = declare("merge_into", MergeInto, "()", lambda call: None, changes=("out",))
