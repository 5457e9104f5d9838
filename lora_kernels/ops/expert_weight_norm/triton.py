"""Triton: `weight_norm`'s kernels, one expert after the other, which read each W once. Codes become
the numbers of one expert at a time."""

import torch

from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.launch import refuse_device
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows
from lora_kernels.ops.weight_norm.op import _backward as layer_backward
from lora_kernels.ops.weight_norm.op import _forward as layer_forward


def refusal(call):
    tensors = {"a": call.a, "b": call.b} if call.layout else {"w": call.w, "a": call.a, "b": call.b}
    of_codes = Quantised(call.w, call.parts, call.layout).refusal() if call.layout else None
    return of_codes or refuse_dtypes(**tensors) or refuse_negated(**tensors) or refuse_device(call.w)


@implements("expert_weight_norm_forward", "triton", refusal)
def forward(call):
    norm = call.w.new_empty(call.b.shape[:2], dtype=torch.float32)
    for row, member in zip(norm, call.members(_weights(call)), strict=True):
        row.copy_(layer_forward(member))
    return norm


@implements("expert_weight_norm_backward", "triton", refusal)
def backward(call):
    like = zip((call.a, call.b), call.needs, strict=True)
    found = [torch.empty_like(t, dtype=gradient_dtype(t, need)) if need else None for t, need in like]
    for e, member in enumerate(call.members(_weights(call))):
        for whole, part in zip(found, layer_backward(member), strict=True):
            if whole is not None:
                whole[e].copy_(part)
    return tuple(found)


def _weights(call):
    """W [out, in] of each expert."""
    if not call.layout:
        yield from call.w.mT if call.transposed else call.w
        return
    w = Quantised(call.w, call.parts, call.layout)
    rows = w.shape[0] // len(call.a)
    for first in range(0, w.shape[0], rows):
        numbers = dequantise_rows(w, first, rows)
        yield numbers.T if call.transposed else numbers
