from lora_kernels.ops.multi_lora.op import multi_lora, multi_lora_add_
from lora_kernels.ops.multi_lora.plan import BASE, PAGE, BatchPlan, Slots
from lora_kernels.ops.registry import load_backends

load_backends(__name__)

__all__ = ["BASE", "PAGE", "BatchPlan", "Slots", "multi_lora", "multi_lora_add_"]
