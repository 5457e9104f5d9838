"""Fused LoRA and DoRA layers for PyTorch."""

from lora_kernels import nn
from lora_kernels._version import __version__
from lora_kernels.adapters import (
    AdapterError,
    LoraConfig,
    adapter_disabled,
    inject_adapter,
    load_adapter,
    merge_and_unload,
    save_adapter,
    unload,
)
from lora_kernels.integrations import FuseReport, fuse, refresh, unfuse, warm_up
from lora_kernels.ops import (
    FallbackWarning,
    Member,
    QuantisedWeight,
    dora_linear,
    expert_lora_linear,
    expert_weight_norm,
    explain,
    lora_linear,
    lora_linear_group,
    merged_weight,
    multi_lora,
    multi_lora_add_,
    requantised_weight,
    use_backend,
    weight_norm,
)
from lora_kernels.ops.registry import warn_of_missing

warn_of_missing()

__all__ = [
    "AdapterError",
    "FallbackWarning",
    "FuseReport",
    "LoraConfig",
    "Member",
    "QuantisedWeight",
    "__version__",
    "adapter_disabled",
    "dora_linear",
    "expert_lora_linear",
    "expert_weight_norm",
    "explain",
    "fuse",
    "inject_adapter",
    "load_adapter",
    "lora_linear",
    "lora_linear_group",
    "merge_and_unload",
    "merged_weight",
    "multi_lora",
    "multi_lora_add_",
    "nn",
    "refresh",
    "requantised_weight",
    "save_adapter",
    "unfuse",
    "unload",
    "use_backend",
    "warm_up",
    "weight_norm",
]
