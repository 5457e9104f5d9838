from lora_kernels.ops.quantised.op import codes_refusal, dequantise
from lora_kernels.ops.quantised.weight import QuantisedWeight
from lora_kernels.ops.registry import load_backends

load_backends(__name__)

__all__ = ["QuantisedWeight", "codes_refusal", "dequantise"]
