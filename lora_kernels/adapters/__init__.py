"""Adapters of a model: PEFT's configuration, injection, and PEFT's files."""

from lora_kernels.adapters.config import AdapterError, LoraConfig
from lora_kernels.adapters.files import load_adapter, save_adapter
from lora_kernels.adapters.inject import inject_adapter
from lora_kernels.adapters.unload import adapter_disabled, merge_and_unload, unload

__all__ = [
    "AdapterError",
    "LoraConfig",
    "adapter_disabled",
    "inject_adapter",
    "load_adapter",
    "merge_and_unload",
    "save_adapter",
    "unload",
]
