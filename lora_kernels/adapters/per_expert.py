"""Adapters from before transformers 5, whose experts had layers of their own, for experts that are
one parameter: what PEFT makes of them.

Of n layers that became one matrix, as w1 and w3, with A_i [r, in] and B_i [out, r]:

    A = [A_1; …; A_n]  [n · r, in],    B = diag(B_1, …, B_n)  [n · out, n · r]                   (1)

for each expert. lora_alpha is n times as large, so that the scale stays. Source: PEFT 0.21.2,
utils/transformers_weight_conversion.py.
"""

import re
import sys
from dataclasses import replace
from typing import Any

from torch import nn

from lora_kernels.adapters.config import AdapterError, LoraConfig

_LAYERS = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
"""By kind of model, the layers of an expert and of its router, and the parameters that they are
now."""
_NAMES = frozenset(name for layers in _LAYERS.values() for name in layers)


def as_fused(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The configuration with the parameters of fused experts in the place of their layers; itself
    where it names none, or the model is of no such kind.

    Raises:
        AdapterError: it names one of two layers that are one matrix now, or with rsLoRA both, whose
            scale PEFT makes √2 too large.
    """
    if not isinstance(config.target_modules, list):
        return config
    old = {target: target.rpartition(".")[2] for target in config.target_modules}
    if not _NAMES.intersection(old.values()):
        return config
    layers = expert_layers(model)
    named = {target: name for target, name in old.items() if name in layers}
    if not named:
        return config
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for parameter in dict.fromkeys(layers[name] for name in named.values()):
        parts = [name for name, new in layers.items() if new == parameter]
        missing = [name for name in parts if name not in named.values()]
        if missing:
            found = ", ".join(name for name in parts if name not in missing)
            raise AdapterError(f"target_modules: {found} needs {', '.join(missing)} beside it: they are one {parameter} now")
        if len(parts) > 1:
            if config.use_rslora:
                raise AdapterError(f"use_rslora over {', '.join(parts)}, which are one {parameter} now, is not supported")
            pattern = rf".*\.{re.escape(parameter)}"
            ranks[pattern], alphas[pattern] = config.r * len(parts), config.lora_alpha * len(parts)
    return replace(
        config,
        target_modules=[target for target in config.target_modules if target not in named],
        target_parameters=list(dict.fromkeys([*(config.target_parameters or []), *(layers[n] for n in named.values())])),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def expert_layers(model: nn.Module) -> dict[str, str]:
    """By the name of an expert's or its router's layer of before, the parameter that it is now."""
    return _LAYERS.get(_pattern(model) or "", {})


def _pattern(model: Any) -> str | None:
    """Which of the kinds above transformers converts the model's checkpoints as."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None or "transformers" not in sys.modules:
        return None
    try:
        from transformers import conversion_mapping
    except ImportError:  # before 5
        return None
    return "mixtral" if kind == "mixtral" else getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind)
