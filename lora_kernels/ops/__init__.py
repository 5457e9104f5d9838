"""The ops. One folder per op; every file in it computes the same formula."""

from lora_kernels.ops.dora_linear import dora_linear
from lora_kernels.ops.expert_lora_linear import expert_lora_linear
from lora_kernels.ops.expert_weight_norm import ExpertNormCache, expert_weight_norm
from lora_kernels.ops.lora_linear import Member, group_pays, lora_linear, lora_linear_group
from lora_kernels.ops.merge import merged_weight, requantised_weight
from lora_kernels.ops.multi_lora import BatchPlan, Slots, multi_lora, multi_lora_add_
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.registry import FallbackWarning, explain, missing_backends, use_backend
from lora_kernels.ops.weight_norm import NormCache, dora_gain, row_norm_squared, weight_norm

__all__ = [
    "BatchPlan",
    "ExpertNormCache",
    "FallbackWarning",
    "Member",
    "NormCache",
    "QuantisedWeight",
    "Slots",
    "dora_gain",
    "dora_linear",
    "expert_lora_linear",
    "expert_weight_norm",
    "explain",
    "group_pays",
    "lora_linear",
    "lora_linear_group",
    "merged_weight",
    "missing_backends",
    "multi_lora",
    "multi_lora_add_",
    "requantised_weight",
    "row_norm_squared",
    "use_backend",
    "weight_norm",
]
