"""The formulas of `weight_norm`, one expert after the other."""

import torch

from lora_kernels.ops.gradients import laid_out_as
from lora_kernels.ops.quantised.formula import experts_weight_of
from lora_kernels.ops.registry import implements
from lora_kernels.ops.weight_norm.op import _backward as layer_backward
from lora_kernels.ops.weight_norm.op import _forward as layer_forward


@implements("expert_weight_norm_forward", "reference")
def forward(call):
    return torch.stack([layer_forward.formula(member) for member in call.members(_weights(call))])


@implements("expert_weight_norm_backward", "reference")
def backward(call):
    found = zip(*(layer_backward.formula(member) for member in call.members(_weights(call))), strict=True)
    like = zip(found, (call.a, call.b), call.needs, strict=True)
    return tuple(laid_out_as(torch.stack(of), t) if need else None for of, t, need in like)


def _weights(call):
    """W [out, in] of each expert."""
    w = experts_weight_of(call, len(call.a))
    return w.mT if call.transposed else w
