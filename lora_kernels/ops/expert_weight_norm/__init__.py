from lora_kernels.ops.expert_weight_norm.op import expert_weight_norm
from lora_kernels.ops.registry import load_backends

load_backends(__name__)

__all__ = ["expert_weight_norm"]
