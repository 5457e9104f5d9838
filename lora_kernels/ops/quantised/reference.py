"""The formula in plain PyTorch. Every other backend is tested against it."""

from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.ops.quantised.weight import QuantisedWeight
from lora_kernels.ops.registry import implements


@implements("dequantise", "reference")
def dequantise(call):
    return dequantised(QuantisedWeight.of_fields(*call)).flatten(0, -2)
