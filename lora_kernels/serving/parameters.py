"""The part of PEFT's files that is of parameters (`target_parameters`): of experts, and of the
weight of a linear layer.

PEFT keeps the factors of E experts as lora_A [r · E, in], one expert after another, and lora_B
[out, r · E], the experts side by side for each rank. Layers of several parameters of one module lie
around each other, the last parameter outermost, and the keys tell them by how deep they lie.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import AdapterError, LoraConfig, short_repr
from lora_kernels.adapters.foreign import PREFIX
from lora_kernels.adapters.patterns import Budget, NamePattern
from lora_kernels.adapters.targets import Selection, select_targets
from lora_kernels.adapters.weights import Slot
from lora_kernels.serving.experts import Experts, experts_at


@dataclass(frozen=True)
class OfParameter:
    """One parameter that an adapter changes."""

    name: str
    """As the pool calls it: of a linear layer the layer's, else the parameter's."""
    module: str
    path: str
    """That of its tensors in the file."""
    experts: int | None
    """None for a linear layer's weight."""
    matrix: tuple[int, int]
    """[out, in], of each expert."""
    r: int
    lora_alpha: float

    def slots(self, dora: bool) -> dict[str, Slot]:
        """What the file holds of it, by key."""
        n_out, n_in = self.matrix
        ranks = self.r * (self.experts or 1)
        shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (ranks, n_in), "lora_B.weight": (n_out, ranks)}
        if dora:
            shapes["lora_magnitude_vector"] = (n_out,) if self.experts is None else (self.experts, n_out)
        return {f"{self.path}.{key}": Slot(self.module, key, torch.Size(shape)) for key, shape in shapes.items()}

    def factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """A [experts, r, in], B [experts, out, r] and the magnitude, if there is one."""
        a, b = (tensors[f"{self.path}.lora_{side}.weight"] for side in "AB")
        magnitude = tensors.get(f"{self.path}.lora_magnitude_vector")
        if self.experts is None:
            return a, b, magnitude
        a = a.view(self.experts, self.r, a.shape[1])
        return a, b.reshape(b.shape[0], self.r, self.experts).permute(2, 0, 1), magnitude


def parameters_of(model: nn.Module, config: LoraConfig) -> list[OfParameter]:
    """The parameters that a configuration selects, by PEFT's rules: a whole name, or its end after
    a dot.

    Raises:
        AdapterError: one of them is not known to be served, or a name selects none.
    """
    wanted = _target_parameters(config)
    if not wanted:
        return []
    ranks, alphas = _patterns(model, config)
    modules, found = dict(model.named_modules()), []
    for path, module in modules.items():
        names = [name for name, _ in module.named_parameters(recurse=False) if _is_wanted(f"{path}.{name}", wanted)]
        for depth, name in zip(reversed(range(len(names))), names, strict=True):
            key = f"{path}.{name}"
            r, alpha = (
                next((value for pattern, value in patterns if pattern.matches_end(key)), default)
                for patterns, default in ((ranks, config.r), (alphas, config.lora_alpha))
            )
            site, experts, matrix = _site_at(modules, path, name)
            found.append(OfParameter(site, path, f"{PREFIX}{path}{'.base_layer' * depth}", experts, matrix, int(r), alpha))
    if not found:
        raise AdapterError(f"target_parameters={short_repr(wanted)} selects no parameter of {type(model).__name__}")
    return found


def selected_modules(model: nn.Module, config: LoraConfig, parameters: list[OfParameter]) -> Selection:
    """What a configuration selects beside parameters; without target_modules nothing.

    Raises:
        AdapterError: as `select_targets`, or the weight of a layer is adapted twice.
    """
    if parameters and not config.target_modules:
        return Selection([], list(config.modules_to_save or ()), (), [])
    selection = select_targets(model, config, strict=False)
    twice = {target.name for target in selection.targets} & {each.name for each in parameters}
    if twice:
        raise AdapterError(f"target_modules and target_parameters both adapt {min(twice)}")
    return selection


def _target_parameters(config: LoraConfig) -> list[str]:
    found: Any = getattr(config, "target_parameters", None) or config.extra.get("target_parameters") or []
    names = sorted(found) if isinstance(found, set | frozenset) else found
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise AdapterError(f"LoraConfig: target_parameters must be a list of names, found {short_repr(found)}")
    return list(names)


def _is_wanted(name: str, wanted: list[str]) -> bool:
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def _patterns(model: nn.Module, config: LoraConfig) -> list[list[tuple[NamePattern, Any]]]:
    budget = Budget()
    for name, _ in model.named_modules():
        budget.add_name(name)
    return [
        [(NamePattern(key, field, budget), value) for key, value in patterns.items()]
        for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
    ]


def _site_at(modules: Mapping[str, nn.Module], path: str, name: str) -> tuple[str, int | None, tuple[int, int]]:
    """The pool's name of a parameter, how many experts it is of, and [out, in]."""
    module, key = modules[path], f"{path}.{name}"
    if isinstance(module, nn.Linear) and name == "weight":
        return path, None, (module.out_features, module.in_features)
    found = experts_at(modules, key)
    if not isinstance(found, dict):
        what = f"a parameter of {type(module).__name__}" if found is None else found
        raise AdapterError(f"it adapts {key}, {what}; of parameters a batch changes those of experts and linear layers")
    experts: Experts = found[key]
    if experts.count == 1:
        raise AdapterError(f"it adapts {key}, of one expert, whose B A PEFT adds as [out, in] however the weight lies")
    return key, experts.count, experts.matrix
