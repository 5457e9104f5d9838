from lora_kernels.ops.dora_linear.op import dora_linear
from lora_kernels.ops.registry import load_backends

load_backends(__name__)

__all__ = ["dora_linear"]
