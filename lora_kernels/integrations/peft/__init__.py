"""PEFT's LoRA layers with a forward on our kernels. Importing this package imports PEFT.

PEFT owns the layer: its parameters, names and methods stay, and any of them may change between two
calls. So each call reads the state anew, and what the kernels do not cover goes to PEFT's forward.
"""

from lora_kernels.integrations.peft import inside, named, several, tokens, velora  # noqa: F401, they enter linear.WAYS
from lora_kernels.integrations.peft.attention import FusedMultiheadAttention
from lora_kernels.integrations.peft.classes import (
    FUSED,
    FUSED_LINEAR,
    class_refusal,
    fuse_classes,
    lora_layers,
    restore_classes,
    survey_layers,
)
from lora_kernels.integrations.peft.conv import FusedConv1d, FusedConv2d, FusedConv3d
from lora_kernels.integrations.peft.embedding import FusedEmbedding
from lora_kernels.integrations.peft.groups import Siblings, forget_siblings, formed_groups, watch_siblings
from lora_kernels.integrations.peft.linear import FusedLinear, Linear, fallbacks, forget, run_fused
from lora_kernels.integrations.peft.parameters import FusedParamWrapper, read_parameters

__all__ = [
    "FUSED",
    "FUSED_LINEAR",
    "FusedConv1d",
    "FusedConv2d",
    "FusedConv3d",
    "FusedEmbedding",
    "FusedLinear",
    "FusedMultiheadAttention",
    "FusedParamWrapper",
    "Linear",
    "Siblings",
    "class_refusal",
    "fallbacks",
    "forget",
    "forget_siblings",
    "formed_groups",
    "fuse_classes",
    "lora_layers",
    "read_parameters",
    "restore_classes",
    "run_fused",
    "survey_layers",
    "watch_siblings",
]
