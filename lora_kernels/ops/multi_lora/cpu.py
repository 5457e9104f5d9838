"""CPU: the base product as in lora_linear's forward, in float32, then one C++ pass for all adapters that rounds y once."""

import torch

from lora_kernels import _cpu
from lora_kernels.ops.buffers import row_major
from lora_kernels.ops.multi_lora.plan import TENSORS
from lora_kernels.ops.products import base_product
from lora_kernels.ops.refusals import READ, refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements


def refusal(x, w, slots, ids, weights, order, starts, error, bias):
    adapters = [t for i in range(0, len(slots), TENSORS) for t in slots[i : i + 2]]
    for t in (x, w, bias, *adapters):
        if t is not None and (t.dtype not in READ or t.is_neg()):
            named = {"x": x, "w": w, "bias": bias} | {f"{'ab'[i % 2]} of slots[{i // 2}]": t for i, t in enumerate(adapters)}
            return refuse_dtypes(**named) or refuse_negated(**named)
    if any(t.stride(1) != 1 for t in adapters):
        return "a and b of slots must have rows without gaps"
    return None


@implements("multi_lora_forward", "cpu", refusal)
def forward(x, w, slots, ids, weights, order, starts, error, bias):
    x = row_major(x)
    y = x.new_empty(x.shape[0], w.shape[0])
    z = base_product(x, w, y if x.dtype is torch.float32 else None)
    adapt(z, y, x, slots, (ids, weights, order, starts, error), bias, False)
    return y


def add_refusal(y, x, slots, *rest):
    return refusal(x, None, slots, *rest) or refuse_dtypes(y=y) or refuse_negated(y=y)


@implements("multi_lora_add", "cpu", add_refusal)
def add(y, x, slots, ids, weights, order, starts, error, bias):
    to = row_major(y)
    adapt(to, to, row_major(x), slots, (ids, weights, order, starts, error), bias, True)
    if to is not y:
        y.copy_(to)


def adapt(z, y, x, slots, plan, bias, holds_bias):
    """Fills y with what the adapters make of z = x wᵀ, float32 or y itself, which may hold the bias already."""
    first, threads = 0, torch.get_num_threads()
    for i in range(0, len(slots), TENSORS):
        a, b, *held = slots[i : i + TENSORS]
        _cpu.multi_lora(x, a, b, z, y, bias, holds_bias, first, (*held, *plan), threads)
        first += b.shape[1]
