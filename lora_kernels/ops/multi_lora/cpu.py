"""CPU: the base product as in lora_linear's forward, in float32, then one C++ pass for all adapters
that rounds y once."""

import torch

from lora_kernels import _cpu
from lora_kernels.ops.cpu_gemm import base_product
from lora_kernels.ops.cpu_quantised import refuse_codes, weight_of
from lora_kernels.ops.cpu_tensors import row_major
from lora_kernels.ops.multi_lora.plan import TENSORS
from lora_kernels.ops.refusals import READ, refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements


def refusal(call):
    if call.layout:
        return _refuse_operands(call, None) or refuse_codes(call.w, call.parts, call.layout)
    return _refuse_operands(call, call.w)


def _refuse_operands(call, w):
    x, bias, slots = call.x, call.bias, call.slots
    adapters = [t for i in range(0, len(slots), TENSORS) for t in slots[i : i + 2]]
    for t in (x, w, bias, *adapters):
        if t is not None and (t.dtype not in READ or t.is_neg()):
            named = {"x": x, "w": w, "bias": bias} | {f"{'ab'[i % 2]} of slots[{i // 2}]": t for i, t in enumerate(adapters)}
            return refuse_dtypes(**named) or refuse_negated(**named)
    if any(t.stride(1) != 1 for t in adapters):
        return "a and b of slots must have rows without gaps"
    return None


@implements("multi_lora_forward", "cpu", refusal)
def forward(call):
    x, w = row_major(call.x), weight_of(call)
    y = x.new_empty(x.shape[0], w.shape[0])
    apply_adapters(call, base_product(x, w, y if x.dtype is torch.float32 else None), y, x, False)
    return y


def add_refusal(call):
    return _refuse_operands(call, None) or refuse_dtypes(y=call.y) or refuse_negated(y=call.y)


@implements("multi_lora_add", "cpu", add_refusal)
def add_in_place(call):
    y = row_major(call.y)
    apply_adapters(call, y, y, row_major(call.x), True)
    if y is not call.y:
        call.y.copy_(y)


def apply_adapters(call, z, y, x, holds_bias):
    """Fills y with what the adapters make of z = x wᵀ, float32 or y itself, which may hold the bias
    already."""
    first, threads, plan = 0, torch.get_num_threads(), (call.ids, call.weights, call.order, call.starts, call.error)
    for i in range(0, len(call.slots), TENSORS):
        a, b, *held = call.slots[i : i + TENSORS]
        _cpu.multi_lora(x, a, b, z, y, call.bias, holds_bias, first, (*held, *plan), threads)
        first += b.shape[1]
