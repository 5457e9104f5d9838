"""CPU: the norms of all experts in one C++ call, whose threads share the rows. The gradients, and a
transposed W, take `weight_norm`'s kernels, one expert after the other."""

import torch

from lora_kernels import _cpu
from lora_kernels.ops.cpu_quantised import Packed, expert_args, held, in_own_dtype, refuse_codes
from lora_kernels.ops.cpu_tensors import stack_args
from lora_kernels.ops.expert_weight_norm.members import gradients_of_each, norms_of_each
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.weight_norm.op import MAX_CONDITION


def refusal(call):
    tensors = {"a": call.a, "b": call.b} if call.layout else {"w": call.w, "a": call.a, "b": call.b}
    of_codes = refuse_codes(call.w, call.parts, call.layout) if call.layout else None
    return of_codes or refuse_dtypes(**tensors) or refuse_negated(**tensors)


@implements("expert_weight_norm_forward", "cpu", refusal)
def forward(call):
    w, squared = _weight(call), call.w_squared
    by_rows = isinstance(w, Packed) or w.stride(2) == 1
    if call.transposed or not by_rows or not w.numel():
        return norms_of_each(call, _members(call, w))
    norm = call.w.new_empty(call.b.shape[:2], dtype=torch.float32)
    squared = None if squared is None else squared.to(torch.float32).contiguous()
    tensors = expert_args(w, len(call.a)), stack_args(call.a), stack_args(call.b)
    _cpu.expert_norm(*tensors, squared, norm, call.scale, MAX_CONDITION[w.dtype], torch.get_num_threads())
    return norm


@implements("expert_weight_norm_backward", "cpu", refusal)
def backward(call):
    return gradients_of_each(call, _members(call, _weight(call)))


def _weight(call):
    return held(Packed.of(call.w, call.parts, call.layout)) if call.layout else call.w


def _members(call, w):
    """W [out, in] of each expert; the numbers of codes are there of one expert at a time."""
    if not isinstance(w, Packed):
        yield from w.mT if call.transposed else w
        return
    rows = w.rows // len(call.a)
    for e in range(len(call.a)):
        numbers = in_own_dtype(w.some(slice(e * rows, (e + 1) * rows)))
        yield numbers.T if call.transposed else numbers
