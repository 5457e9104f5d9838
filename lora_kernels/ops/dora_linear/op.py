"""DoRA with its norm, from one read of W where few rows ask for it:

    n = ‖W + scale·BA‖ over the input dimension,   y = (m / n) ⊙ (x Wᵀ + scale · x Aᵀ Bᵀ) + bias
                                                   (1)

Source: DoRA, arXiv:2402.09353, eq. 5.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.derivatives import transformed
from lora_kernels.ops.dora_linear.two_ops import norm_then_linear
from lora_kernels.ops.lora_linear.layouts import strided_input
from lora_kernels.ops.lora_linear.op import _check_arguments, without_autocast
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.registry import declare


def dora_linear(
    x: Tensor,
    w: Tensor | QuantisedWeight,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [..., out] in the dtype of x and the norm n [out] in float32 (float64 for float64) of
    formula (1).

    Shapes: x [..., in], w [out, in], a [r, in], b [out, r], magnitude and bias [out]; dtypes as in
    `lora_linear`. Sums are float32 and y is rounded once. Where n is zero the gain m / n is 1, as
    in `dora_gain`. No gradients: it runs as under `torch.no_grad()`, but for forward mode and
    torch.func. On a GPU up to 64 rows with a rank up to 64 take one launch that reads W once. Else
    it is `weight_norm` and `lora_linear`. Where the norm is known, call those.

    Raises:
        TypeError, ValueError: as `lora_linear`; magnitude is checked as its gain.
    """
    if _check_arguments(x, w, a, b, scale, bias, magnitude, 0.0, "peft", None, op="dora_linear") is False:
        rows, as_x = strided_input(x)
        y, norm = dora_linear(rows, w, a, b, magnitude, scale, bias)
        return as_x(y), norm
    tokens = x.reshape(-1, x.shape[-1])
    if isinstance(w, QuantisedWeight):
        with nullcontext() if transformed() else torch.no_grad(), without_autocast(x):
            quantised: Any = w
            y, norm = norm_then_linear(DoRALinear(tokens, quantised, a, b, scale, bias, magnitude))
        return y.view(*x.shape[:-1], len(b)), norm
    if transformed():
        with without_autocast(x):
            y, norm = _dora_linear.formula(DoRALinear(tokens, w, a, b, scale, bias, magnitude))
    else:
        with torch.no_grad(), without_autocast(x):
            y, norm = _dora_linear(DoRALinear(tokens, w, a, b, float(scale), bias, magnitude))
    return y.view(*x.shape[:-1], w.shape[0]), norm


class DoRALinear(NamedTuple):
    """The arguments of the op, x [tokens, in]."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None
    magnitude: Tensor


def _fake_results(call):
    x, w = call.x, call.w
    return x.new_empty(len(x), len(w)), w.new_empty(len(w), dtype=torch.promote_types(w.dtype, torch.float32))


_dora_linear = declare("dora_linear", DoRALinear, "(Tensor y, Tensor norm)", _fake_results)
