"""Layers with an adapter, in the place of torch's own."""

from lora_kernels.nn.dora import DoRALinear
from lora_kernels.nn.embedding import LoRAEmbedding
from lora_kernels.nn.group import GroupedLinear
from lora_kernels.nn.lora import LoRALinear
from lora_kernels.nn.lora_experts import LoRAExperts

__all__ = ["DoRALinear", "GroupedLinear", "LoRAEmbedding", "LoRAExperts", "LoRALinear"]
