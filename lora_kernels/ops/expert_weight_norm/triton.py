"""Triton: the norms of all experts in one launch. Their gradients, and norms over transposed codes,
take one expert after the other, and codes become the numbers of one at a time."""

from lora_kernels.ops.expert_weight_norm.members import gradients_of_each, norms_of_each
from lora_kernels.ops.launch import refuse_device
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.triton_norms import norms, norms_of_codes
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows


def refusal(call):
    tensors = {"a": call.a, "b": call.b} if call.layout else {"w": call.w, "a": call.a, "b": call.b}
    of_codes = Quantised(call.w, call.parts, call.layout).refusal() if call.layout else None
    return of_codes or refuse_dtypes(**tensors) or refuse_negated(**tensors) or refuse_device(call.w)


@implements("expert_weight_norm_forward", "triton", refusal)
def forward(call):
    if not call.layout:
        return norms(call.w.mT if call.transposed else call.w, call.a, call.b, call.scale)
    if call.transposed:
        return norms_of_each(call, _weights(call))
    return norms_of_codes(Quantised(call.w, call.parts, call.layout), call.a, call.b, call.scale)


@implements("expert_weight_norm_backward", "triton", refusal)
def backward(call):
    return gradients_of_each(call, _weights(call))


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
