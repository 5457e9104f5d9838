"""Adapters of a model: PEFT's configuration, injection, and PEFT's files."""

from lora_kernels.adapters.config import AdapterError, LoraConfig
from lora_kernels.adapters.files import load_adapter, save_adapter
from lora_kernels.adapters.inject import inject_adapter

__all__ = ["AdapterError", "LoraConfig", "inject_adapter", "load_adapter", "save_adapter"]
