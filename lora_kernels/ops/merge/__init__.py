from lora_kernels.ops.merge.op import merged_weight
from lora_kernels.ops.merge.requantised import requantised_weight
from lora_kernels.ops.registry import load_backends

load_backends(__name__)

__all__ = ["merged_weight", "requantised_weight"]
