"""Many adapters over one base model: a pool of them, and layers that take one for each sequence of
a batch."""

from lora_kernels.ops.multi_lora import BatchPlan, Slots
from lora_kernels.serving.adapter import Adapter, Factors, adapter_of, read_adapter
from lora_kernels.serving.base import BaseChangedError
from lora_kernels.serving.batch import Batch
from lora_kernels.serving.door import rows_of
from lora_kernels.serving.layer import MultiLoRAEmbedding, MultiLoRALinear
from lora_kernels.serving.model import serve, unserve
from lora_kernels.serving.pool import AdapterPool
from lora_kernels.serving.residents import PoolFullError, PoolStats
from lora_kernels.serving.size import PoolSize

__all__ = [
    "Adapter",
    "AdapterPool",
    "BaseChangedError",
    "Batch",
    "BatchPlan",
    "Factors",
    "MultiLoRAEmbedding",
    "MultiLoRALinear",
    "PoolFullError",
    "PoolSize",
    "PoolStats",
    "Slots",
    "adapter_of",
    "read_adapter",
    "rows_of",
    "serve",
    "unserve",
]
