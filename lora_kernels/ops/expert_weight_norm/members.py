"""`weight_norm`'s kernels, one expert after the other, on whatever backend runs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.weight_norm.op import _backward as layer_backward
from lora_kernels.ops.weight_norm.op import _forward as layer_forward


def norms_of_each(call: Any, weights: Iterable[Tensor]) -> Tensor:
    """[experts, out] of an `ExpertNorm`, float32; `weights` are W [out, in] of each expert."""
    norm = call.w.new_empty(call.b.shape[:2], dtype=torch.float32)
    for row, member in zip(norm, call.members(weights), strict=True):
        row.copy_(layer_forward(member))
    return norm


def gradients_of_each(call: Any, weights: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    """da and db of an `ExpertNormBackward`, which lie as a and b do."""
    like = zip((call.a, call.b), call.needs, strict=True)
    found = [torch.empty_like(t, dtype=gradient_dtype(t, need)) if need else None for t, need in like]
    for e, member in enumerate(call.members(weights)):
        for whole, part in zip(found, layer_backward(member), strict=True):
            if whole is not None:
                whole[e].copy_(part)
    return tuple(found)
