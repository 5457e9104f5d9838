"""CPU: one C++ pass forward, and one back that gives the gradients of gate and up."""

import torch

from lora_kernels import _cpu
from lora_kernels.ops.cpu_tensors import row_major
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements


def refusal(call):
    return refuse_dtypes(x=call.x) or refuse_negated(x=call.x)


def backward_refusal(call):
    return refusal(call) or refuse_dtypes(dy=call.dy) or refuse_negated(dy=call.dy)


@implements("gated_activation_forward", "cpu", refusal)
def forward(call):
    x = row_major(call.x)
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    _cpu.gated_activation(x, y, None, None, call.tanh, torch.get_num_threads())
    return y


@implements("gated_activation_backward", "cpu", backward_refusal)
def backward(call):
    x, dy = row_major(call.x), row_major(call.dy.to(call.x.dtype))
    dx = x.new_empty(x.shape)
    _cpu.gated_activation(x, None, dy, dx, call.tanh, torch.get_num_threads())
    return dx
