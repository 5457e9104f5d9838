"""The activation between the two products of experts, whose gate and up are side by side:

    y = f(gate) ⊙ up,  f(g) = g · σ(v(g)),  x = [gate | up]                                      (1)

v(g) = g is SiLU, and GELU by tanh has v(g) = √(8/π) · (g + 0.044715 g³).
Sources: GLU variants, arXiv:2002.05202; GELU, arXiv:1606.08415.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.derivatives import differentiable, transformed
from lora_kernels.ops.lora_linear.op import without_autocast
from lora_kernels.ops.registry import declare

OP = "gated_activation"


class Forward(NamedTuple):
    """The arguments of the forward op."""

    x: Tensor
    tanh: bool


class Backward(NamedTuple):
    """Of `Forward`, with dy [tokens, n]."""

    dy: Tensor
    x: Tensor
    tanh: bool


def gated_activation(x: Tensor, tanh: bool = False) -> Tensor:
    """Applies formula (1), in float32 (float64 for float64) and rounded once.

    Shapes: x [tokens, 2n] gives [tokens, n], in one dtype. The gradient of x is computed from x:
    nothing else is kept. Further derivatives are the formula's.

    Raises:
        ValueError: x is no matrix with an even number of columns.
        TypeError: x is not floating.
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"{OP}: x must be a matrix with an even number of columns, found {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{OP}: x must be floating, found {x.dtype}")
    if transformed():
        with without_autocast(x):
            return _forward.formula(Forward(x, tanh))
    if torch.is_grad_enabled() and x.requires_grad:
        return _GatedActivation.apply(x, tanh)
    return _forward(Forward(x, tanh))


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tanh):
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        return _forward(Forward(x, tanh))

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with without_autocast(dy):
            (dx,) = differentiable(_gradient, _formula, Backward(dy, x, ctx.tanh), dy)
        return dx, None


def _gradient(call):
    return (_backward(call),)


def _formula(call):
    return (_backward.formula(call),)


def _fake_forward(call):
    return call.x.new_empty(call.x.shape[0], call.x.shape[1] // 2)


_forward = declare("gated_activation_forward", Forward, "Tensor", _fake_forward)
_backward = declare("gated_activation_backward", Backward, "Tensor", lambda call: call.x.new_empty(call.x.shape))
