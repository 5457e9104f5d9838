"""CPU: the kernels of weight_norm and lora_linear one after the other: a core has too few registers
to serve both at once."""

from lora_kernels.ops.dora_linear.two_ops import norm_then_linear
from lora_kernels.ops.registry import implements


@implements("dora_linear", "cpu")
def forward(call):
    return norm_then_linear(call)
