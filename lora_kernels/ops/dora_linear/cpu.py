"""CPU: the kernels of weight_norm and lora_linear one after the other: a core has too few registers to serve both at once."""

from lora_kernels.ops.lora_linear import lora_linear
from lora_kernels.ops.registry import implements
from lora_kernels.ops.weight_norm import dora_gain, weight_norm


@implements("dora_linear", "cpu")
def forward(x, w, a, b, scale, bias, magnitude):
    norm = weight_norm(w, a, b, scale)
    return lora_linear(x, w, a, b, scale, bias, dora_gain(magnitude, norm)), norm
