"""PEFT's LoRA layers with a forward on our kernels. Importing this package imports PEFT.

PEFT owns the layer: its parameters, names and methods stay, and any of them may change between two
calls. So each call reads the state anew, and what the kernels do not cover goes to PEFT's forward.
"""

from lora_kernels.integrations.peft import inside, several  # noqa: F401, they enter linear.WAYS
from lora_kernels.integrations.peft.classes import (
    FUSED,
    class_refusal,
    fuse_classes,
    lora_layers,
    restore_classes,
    survey_layers,
)
from lora_kernels.integrations.peft.linear import FusedLinear, Linear, fallbacks, forget, run_fused

__all__ = [
    "FUSED",
    "FusedLinear",
    "Linear",
    "class_refusal",
    "fallbacks",
    "forget",
    "fuse_classes",
    "lora_layers",
    "restore_classes",
    "run_fused",
    "survey_layers",
]
