"""Whether an adapter fits a model of vLLM; known before vLLM keeps it, or lets another go for it.
Every rank finds the same."""

from collections.abc import Iterator
from typing import Any

from vllm.model_executor.models.utils import PPMissingLayer

from lora_kernels.adapters.config import AdapterError
from lora_kernels.adapters.inject import first_names
from lora_kernels.integrations.vllm.adapters import AdapterExtra
from lora_kernels.integrations.vllm.experts import ExpertsOnMultiLora
from lora_kernels.integrations.vllm.layers import OnMultiLora

OURS = (OnMultiLora, ExpertsOnMultiLora)
EXTRAS = ("magnitude", "bias")
"""The fields of `AdapterExtra`."""


def check_adapter(manager: Any, adapter: Any) -> None:
    """Raises AdapterError unless every module of the adapter is one of the model's, and its tensors
    fit there and are finite.

    What vLLM leaves out of an adapter (a vision tower, say) it leaves out still, unless DoRA or
    lora_bias is there.
    """
    whole = not any(isinstance(module, PPMissingLayer) for module in manager.model.modules())
    there = {name for name, _ in manager.model.named_modules()}
    unknown = sorted(name for name in adapter.loras if not _has_module(manager, there, name))
    if unknown and whole:
        raise AdapterError(f"the adapter changes modules that the model does not have: {first_names(unknown)}")
    served: set[str] = set()
    for name, layer, parts in _named_layers(manager):
        extras = [_extra_of_part(manager, adapter, part) for part in parts]
        if not isinstance(layer, OURS):
            if any(extras):
                kind = type(layer).__name__
                raise AdapterError(f"{name}: DoRA and lora_bias are served on linear layers, this is vLLM's {kind}")
            continue
        served.update(part for part, extra in zip(parts, extras, strict=True) if extra)
        factors = _factors(manager, adapter, name, layer, parts)
        if factors is not None:
            layer.check_factors(name, *factors, *(_packed_values(manager, name, layer, extras, what) for what in EXTRAS))
    left = sorted(adapter.extras.keys() - served - {name.removeprefix("model.") for name in served})
    if left and whole and manager.lora_config.target_modules is None:
        raise AdapterError(f"DoRA or lora_bias is on modules that vLLM serves no LoRA for: {first_names(left)}")


def extras_by_layer(manager: Any, adapter: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    """(name, layer, magnitude, bias) of the layers that have any, packed as vLLM packs B."""
    for name, layer, parts in _named_layers(manager):
        found = [_extra_of_part(manager, adapter, part) for part in parts]
        if not isinstance(layer, OURS) or not any(found):
            continue
        magnitude, bias = (_packed_values(manager, name, layer, found, what) for what in EXTRAS)
        yield name, layer, magnitude, bias


def _factors(manager: Any, adapter: Any, name: str, layer: Any, parts: list[str]) -> list[Any] | None:
    """A and B of a layer, packed as vLLM packs them; None if the adapter leaves the layer alone."""
    if isinstance(layer, ExpertsOnMultiLora):
        lora = manager._get_lora_layer_weights(adapter, name)
        return None if lora is None else [lora.lora_a, lora.lora_b]
    loras = [manager._get_lora_layer_weights(adapter, part) for part in parts]
    return [_packed_values(manager, name, layer, loras, side) for side in ("lora_a", "lora_b")] if any(loras) else None


def _packed_values(manager: Any, name: str, layer: Any, parts: list[Any], what: str) -> Any:
    """An attribute of the parts of a layer as vLLM packs B: a list if the layer is packed; None if
    no part has it."""
    values = [getattr(part, what, None) for part in parts]
    if all(value is None for value in values):
        return None
    return values if isinstance(layer, ExpertsOnMultiLora) or name in manager.packed_modules else values[0]


def _named_layers(manager: Any) -> Iterator[tuple[str, Any, list[str]]]:
    """(name, layer, the names that an adapter has for it)."""
    for name, layer in manager.modules.items():
        if isinstance(layer, ExpertsOnMultiLora):
            yield name, layer, layer.names_of_parts(name)
        else:
            yield name, layer, manager.packed_modules.get(name) or [name]


def _extra_of_part(manager: Any, adapter: Any, part: str) -> AdapterExtra | None:
    """By vLLM's rule for names: those of a pooling model may lack its first part."""
    extras = getattr(adapter, "extras", {})
    found = extras.get(part)
    return extras.get(part.removeprefix("model.")) if found is None and manager.is_pooling_model else found


def _has_module(manager: Any, there: set[str], name: str) -> bool:
    """Whether the model, whose modules are `there`, has one that an adapter calls so, wrapped or
    not. Names of experts are vLLM's to check, where they are its own."""
    if ".experts" in name and not any(isinstance(layer, ExpertsOnMultiLora) for layer in manager.modules.values()):
        return True
    for full in [name, f"model.{name}"] if manager.is_pooling_model else [name]:
        prefix, _, last = full.removesuffix(".base_layer").rpartition(".")
        packed = [key for key, parts in manager.packed_modules_mapping.items() if last in parts]
        if {f"{prefix}.{each}".removeprefix(".") for each in (last, *packed)} & there:
            return True
    return False
