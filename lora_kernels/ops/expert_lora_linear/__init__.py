from lora_kernels.ops.expert_lora_linear.op import expert_lora_linear
from lora_kernels.ops.registry import load_backends

load_backends(__name__)

__all__ = ["expert_lora_linear"]
