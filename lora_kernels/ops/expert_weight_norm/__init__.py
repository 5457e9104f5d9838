from lora_kernels.ops.expert_weight_norm.cache import ExpertNormCache
from lora_kernels.ops.expert_weight_norm.op import expert_weight_norm
from lora_kernels.ops.registry import load_backends

load_backends(__name__)

__all__ = ["ExpertNormCache", "expert_weight_norm"]
