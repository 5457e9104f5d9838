from lora_kernels.ops.gated_activation.op import gated_activation
from lora_kernels.ops.registry import load_backends

load_backends(__name__)

__all__ = ["gated_activation"]
