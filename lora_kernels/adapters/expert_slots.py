"""Where the tensors of adapted experts stand in a file, and where they lie in a model."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import LoraConfig
from lora_kernels.adapters.foreign import PREFIX
from lora_kernels.adapters.per_expert import expert_layers
from lora_kernels.adapters.targets import Selection
from lora_kernels.adapters.weights import Slot, tensor_at
from lora_kernels.nn import LoRAExperts, LoRALinear
from lora_kernels.nn.expert_checks import MAGNITUDE, file_shapes, peft_shape


def expert_slots(model: nn.Module, selection: Selection, config: LoraConfig) -> dict[str, Slot]:
    """Those of the parameters of experts. PEFT has a layer for each, around that of the parameter
    before it."""
    slots = {}
    for name, targets in selection.by_module().items():
        module = model.get_submodule(name)
        if targets[0].parameter is None or isinstance(module, nn.Linear | LoRALinear):
            continue
        path = f"{PREFIX}{name}"
        for target in reversed(targets):
            parameter = str(target.parameter)
            for key, shape in file_shapes(module, parameter, target.r).items():
                if config.use_dora or key != MAGNITUDE:
                    kind = key.removesuffix(".weight")
                    slots[f"{path}.{key}"] = Slot(name, kind, torch.Size(shape), parameter=parameter)
            path += ".base_layer"
    return slots


def in_other_order(slots: dict[str, Slot]) -> dict[str, Slot] | None:
    """`slots` as where PEFT's layers of a module lie around one another in the other order, as it
    has them over bitsandbytes' parametrizations; None where there is but one for each module."""
    depths: dict[str, dict[int, str]] = {}
    of_experts = {key: slot for key, slot in slots.items() if slot.parameter is not None and slot.part is None}
    for key, slot in of_experts.items():
        depths.setdefault(slot.owner, {})[key.count(".base_layer", len(PREFIX) + len(slot.owner))] = slot.parameter or ""
    if all(len(each) == 1 for each in depths.values()):
        return None
    found = {key: slot for key, slot in slots.items() if key not in of_experts}
    for key, slot in of_experts.items():
        start, layers = len(PREFIX) + len(slot.owner), len(depths[slot.owner])
        depth, rest = key.count(".base_layer", start), key[start:].replace(".base_layer", "")
        found[f"{PREFIX}{slot.owner}{'.base_layer' * (layers - 1 - depth)}{rest}"] = slot
    return found


def per_expert_slots(model: nn.Module, selection: Selection, slots: dict[str, Slot]) -> dict[str, Slot]:
    """`slots` with those of the experts' own layers in the place of those of their parameters."""
    layers = expert_layers(model)
    found = {key: slot for key, slot in slots.items() if slot.parameter is None}
    has_magnitude = any(slot.name == MAGNITUDE for slot in slots.values())
    for target in selection.targets:
        parts = [name for name, parameter in layers.items() if parameter == target.parameter]
        if not parts:
            continue
        module = model.get_submodule(target.name)
        experts = peft_shape(module, str(target.parameter))[0]
        shapes = file_shapes(module, str(target.parameter), target.r)
        r, n_out, n_in = target.r // len(parts), shapes["lora_B.weight"][0] // len(parts), shapes["lora_A.weight"][1]
        # Mixtral's block had another name
        path = target.name.replace(".mlp.", ".block_sparse_moe.") if "w1" in layers else target.name
        for expert in range(experts):
            for i, part in enumerate(parts):
                of_one: dict[str, tuple[int, ...]] = {"lora_A.weight": (r, n_in), "lora_B.weight": (n_out, r)}
                of_one |= {MAGNITUDE: (n_out,)} if has_magnitude else {}
                for key, shape in of_one.items():
                    slot = Slot(target.name, key.removesuffix(".weight"), torch.Size(shape), parameter=target.parameter)
                    found[f"{PREFIX}{path}.{expert}.{part}.{key}"] = replace(slot, part=(expert, i, len(parts)))
    return found


def tensor_of(module: nn.Module, slot: Slot) -> Tensor:
    """Where the tensor of a slot lies, in as many numbers as the slot has."""
    if slot.parameter is None:
        return tensor_at(module, slot.name)
    assert isinstance(module, LoRAExperts)
    of_all = module.peft_tensor(slot.name, slot.parameter)
    if slot.part is None:
        return of_all
    expert, i, count = slot.part
    if slot.name == "lora_B":  # [out, r, experts], a block of the diagonal
        return of_all[..., expert].chunk(count)[i].chunk(count, dim=1)[i]
    return of_all[expert].chunk(count)[i]
