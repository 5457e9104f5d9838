"""Adapters whose first values were taken out of the base weight: which base a file belongs to."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.adapters.config import MAX_RANK, AdapterError, LoraConfig
from lora_kernels.adapters.foreign import PREFIX
from lora_kernels.adapters.inject import Layer, first_names
from lora_kernels.adapters.targets import Selection
from lora_kernels.nn import LoRAExperts, LoRALinear

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_DRAWN = "pissa_niter"
_CONVERT = "let PEFT convert the adapter where it was trained (path_initial_model_for_weight_conversion)"


def check_init(config: LoraConfig) -> None:
    """Raises if the adapter of a file does not belong to the plain base."""
    init = str(config.init_lora_weights)
    if not init.startswith(_CHANGES_BASE):
        return
    again = "with inject_adapter(model, LoraConfig.from_pretrained(directory)) and then load_adapter"
    way = f"Either repeat it, {again}, or {_CONVERT}"
    if init.startswith(_DRAWN):
        way = f"It draws random numbers, so it cannot be repeated: {_CONVERT}"
    raise AdapterError(
        f"init_lora_weights={init!r} means that the adapter belongs to base weights which its"
        f" initialisation changed, and loading changes none. {way}"
    )


def refuse_drawn_init(config: LoraConfig, layers: Mapping[str, Layer]) -> None:
    """Raises if the base weights of the file's layers or of the model's depend on random
    numbers."""
    drawn = [name for name, layer in layers.items() if drawn_init(layer)]
    if drawn:
        raise AdapterError(
            f"the base weights are residuals of random numbers (pissa_niter) at {first_names(drawn)}, which belong to no"
            " file: save_adapter writes such layers as plain LoRA, so load it into the base model; to go on training, use"
            " state_dict"
        )
    if str(config.init_lora_weights).startswith(_DRAWN):
        check_init(config)


def drawn_init(layer: Layer) -> bool:
    return isinstance(layer, LoRALinear) and "initial_A" in layer._buffers


def init_kinds(config: LoraConfig, layer: Layer) -> tuple[str, str]:
    """What the configuration says that was taken out of the layer's base weight, and what was."""
    if not isinstance(layer, LoRALinear):
        return "plain", "plain"
    asked, found = str(config.init_lora_weights), str(layer._init)
    return tuple(init if init.startswith(_CHANGES_BASE) else "plain" for init in (asked, found))  # type: ignore[return-value]


def as_plain_lora(
    layers: Mapping[str, Layer], tensors: dict[str, Tensor], config: LoraConfig, selection: Selection
) -> tuple[LoraConfig, Selection]:
    """Changes tensors of a file from (A, B) on W - s·B₀A₀ to ([A; A₀], [B, -B₀]) on W; returns the
    configuration and selection that say so.

    Every layer gets twice its rank, with zeros where nothing was taken out, and lora_alpha that
    keeps its scale. Source: PEFT 0.21.2, tuners/lora/model.py, subtract_mutated_init.
    """
    if experts := [name for name, layer in layers.items() if isinstance(layer, LoRAExperts)]:
        raise AdapterError(f"save_adapter: pissa_niter beside adapted experts has no file: {first_names(experts)}")
    widest = max(target.r for target in selection.targets)
    if 2 * widest > MAX_RANK:
        raise AdapterError(f"save_adapter: pissa_niter is saved with twice its rank, at most {MAX_RANK}, found {2 * widest}")
    for name, layer in layers.items():
        form = "lora_{}.weight" if isinstance(layer, LoRALinear) else "lora_embedding_{}"
        key_a, key_b = (f"{PREFIX}{name}.{form.format(side)}" for side in "AB")
        a, b = tensors[key_a], tensors[key_b]
        a0, b0 = torch.zeros_like(a), torch.zeros_like(b)
        if isinstance(layer, LoRALinear) and drawn_init(layer):
            a0, b0 = layer.initial_A.detach().to(a), layer.initial_B.detach().to(b)
        tensors[key_a], tensors[key_b] = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    grown = math.sqrt(2) if config.use_rslora else 2
    plain = replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=grown * config.lora_alpha,
        rank_pattern={name: 2 * r for name, r in config.rank_pattern.items()},
        alpha_pattern={name: grown * alpha for name, alpha in config.alpha_pattern.items()},
    )
    targets = [replace(t, r=2 * t.r, lora_alpha=grown * t.lora_alpha) for t in selection.targets]
    return plain, replace(selection, targets=targets)
