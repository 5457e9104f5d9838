"""CPU: a block's values are multiplied and rounded once, codes are places in a register."""

from lora_kernels.ops.cpu_quantised import Packed, in_own_dtype, refuse_codes
from lora_kernels.ops.registry import implements


@implements("dequantise", "cpu", lambda call: refuse_codes(call.codes, call.parts, call.layout))
def dequantise(call):
    return in_own_dtype(Packed.of(call.codes, call.parts, call.layout))
