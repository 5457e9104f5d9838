"""The experts of an adapter, from either of the forms that PEFT saves them in, in the order that
`ExpertsOnMultiLora` has them.

    experts.{e}.gate_proj.lora_A.weight [r, in]    a module for each matrix of each expert
    experts.base_layer.lora_A.weight [E·r, in]     one parameter of all experts (target_parameters):
    experts.base_layer.lora_B.weight [out, r·E]    A by expert, then rank; B by rank, then expert

What wraps what in the second form hangs on which parameters are adapted, so shapes tell them apart.
"""

from typing import Any

from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.model_executor.layers.fused_moe import MoERunner

from lora_kernels.adapters.config import AdapterError
from lora_kernels.integrations.vllm.experts import ExpertsOnMultiLora


def pack_experts(manager: Any, adapter: Any) -> None:
    """Puts what an adapter has of the experts of a layer under the name of that layer, each factor
    in its place.

    Raises:
        AdapterError: a shape or rank does not fit.
    """
    _rename_blocks(manager.model, adapter)
    for name, layer in manager.modules.items():
        if not isinstance(layer, ExpertsOnMultiLora):
            continue
        parts = layer.names_of_parts(name)
        for whole in (f"{name}.base_layer", name):
            if whole in adapter.loras:
                _split(adapter, whole, layer, parts)
        found = [adapter.loras.pop(part, None) for part in parts]
        if any(found):
            adapter.loras[name] = PackedLoRALayerWeights.pack(found)


def _split(adapter: Any, whole: str, layer: ExpertsOnMultiLora, parts: list[str]) -> None:
    """The factors of one parameter of all experts to those of each of its matrices, as views."""
    lora, experts = adapter.loras.pop(whole), layer.experts
    lora_a, lora_b, shapes = lora.lora_a, lora.lora_b, layer.parameter_shapes()
    shape = (lora_b.shape[0], lora_a.shape[1])
    if shape not in shapes.values() or len(lora_a) % experts:
        wanted = " or ".join(f"{param} {list(one)}" for param, one in shapes.items())
        found = f"{list(lora_a.shape)} and {list(lora_b.shape)}"
        raise AdapterError(f"{whole}: A and B must be [r * {experts}, in] and [out, r * {experts}] of {wanted}, found {found}")
    parameter = next(param for param, one in shapes.items() if one == shape)
    module = adapter.names.get(whole, whole).removesuffix(".base_layer")
    rank, scaling = adapter.helper.get_rank_and_scaling(f"{module}.{parameter}")
    if len(lora_a) != rank * experts:
        raise AdapterError(
            f"{whole}: A must have {rank * experts} rows, {experts} times the rank of its configuration, found {len(lora_a)}"
        )
    a = lora_a.view(experts, rank, -1)
    b = lora_b.view(len(lora_b), rank, experts).permute(2, 0, 1)  # [experts, out, rank]
    halves = b.chunk(2, 1) if parameter == "gate_up_proj" else (b,)
    for first, half in zip((0, 1) if len(halves) == 2 else (2,), halves, strict=True):
        for expert, part in enumerate(parts[first::3]):
            if part in adapter.loras:
                raise AdapterError(f"{part}: the adapter has it twice, in {whole}, too")
            adapter.loras[part] = LoRALayerWeights(part, rank, lora.lora_alpha, a[expert], half[expert], scaling)


def _rename_blocks(model: Any, adapter: Any) -> None:
    """Names that have changed between the model that an adapter was trained on and vLLM's: Mixtral
    of transformers 5 says mlp for block_sparse_moe."""
    there = dict(model.named_modules())
    for name, module in there.items():
        block, _, last = name.rpartition(".")
        owner = block.rpartition(".")[0]
        if last != "experts" or not isinstance(getattr(module, "base_layer", module), MoERunner) or f"{owner}.mlp" in there:
            continue
        for named in (adapter.loras, adapter.extras, adapter.names):
            for old in [old for old in named if old.startswith(f"{owner}.mlp.")]:
                named[block + old.removeprefix(f"{owner}.mlp")] = named.pop(old)
