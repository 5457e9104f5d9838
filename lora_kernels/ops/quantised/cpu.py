"""CPU: a block's values are multiplied and rounded once, codes are places in a register."""

import torch

from lora_kernels import _cpu
from lora_kernels.ops.cpu_quantised import Packed, refuse_codes
from lora_kernels.ops.registry import implements


@implements("dequantise", "cpu", lambda call: refuse_codes(call.codes, call.parts, call.layout))
def dequantise(call):
    w = Packed.of(call.codes, call.parts, call.layout)
    out = call.codes.new_empty(w.shape, dtype=w.dtype)
    _cpu.dequantise(w, out, torch.get_num_threads())
    return out
