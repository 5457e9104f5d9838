from lora_kernels.ops.registry import load_backends
from lora_kernels.ops.weight_norm.cache import NormCache
from lora_kernels.ops.weight_norm.op import dora_gain, row_norm_squared, weight_norm

load_backends(__name__)

__all__ = ["NormCache", "dora_gain", "row_norm_squared", "weight_norm"]
