"""weight_norm and lora_linear one after the other, for the backends and the sizes that have no
kernel of both."""

from lora_kernels.ops.lora_linear import lora_linear
from lora_kernels.ops.weight_norm import dora_gain, weight_norm


def norm_then_linear(call):
    norm = weight_norm(call.w, call.a, call.b, call.scale)
    y = lora_linear(call.x, call.w, call.a, call.b, call.scale, call.bias, dora_gain(call.magnitude, norm))
    return y, norm
