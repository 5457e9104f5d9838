"""Where the plugin takes hold of vLLM: classes it looks up in a table, and methods that we call
around."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm.config.lora import LoRAConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.lora import layers as theirs
from vllm.lora import utils
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.worker_base import WorkerBase

from lora_kernels._version import __version__
from lora_kernels.adapters.inject import first_names
from lora_kernels.integrations.vllm import adapters, log, proof
from lora_kernels.integrations.vllm.adapters import Model
from lora_kernels.integrations.vllm.experts import ExpertsOnMultiLora
from lora_kernels.integrations.vllm.fits import OURS, extras_by_layer
from lora_kernels.integrations.vllm.layers import CLASSES, OnMultiLora
from lora_kernels.integrations.vllm.server import install_answers
from lora_kernels.integrations.vllm.step import Step, set_step, step_of

REPLACED_EXPERTS = (theirs.FusedMoEWithLoRA, theirs.FusedMoE3DWithLoRA)


def check_vllm() -> None:
    """Raises AttributeError or TypeError unless vLLM is as we know it; the message names what is
    not."""
    wanted: list[tuple[Any, str, set[str]]] = [
        (LoRAModelManager, "_init_punica_wrapper", set()), (LoRAModelManager, "_create_lora_modules", set()),
        (LoRAModelManager, "activate_adapter", {"lora_id"}), (LoRAModelManager, "remove_all_adapters", set()),
        (LoRAModelManager, "_get_lora_layer_weights", {"lora_model", "module_name"}), (LoRAConfig, "compute_hash", set()),
        (WorkerLoRAManager, "__init__", {"lora_model_cls"}), (WorkerLoRAManager, "_load_adapter", {"lora_request"}),
        (WorkerBase, "add_lora", {"lora_request"}), (WorkerBase, "remove_lora", {"lora_id"}),
        (PEFTHelper, "get_rank_and_scaling", {"module_name"}), (FusedMoEConfig, "__init__", {"is_lora_enabled"}),
        (RoutedExperts, "forward_modular", {"x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"}),
    ]  # fmt: skip
    for cls in (LLMEngine, AsyncLLM):
        wanted += [(cls, "add_request", {"lora_request"}), (cls, "add_lora", {"lora_request"}), (cls, "is_sleeping", set())]
        wanted += [(cls, "collective_rpc", {"method", "args"})]
    wanted += [(cls, "_apply_lora_to_output", {"x", "output"}) for cls in CLASSES]
    for owner, name, parameters in wanted:
        missing = parameters - set(inspect.signature(getattr(owner, name)).parameters)
        if missing:
            raise TypeError(f"{owner.__name__}.{name} has no parameter {first_names(sorted(missing))}")
    if not set(CLASSES) | set(REPLACED_EXPERTS) <= set(utils._all_lora_classes):
        raise TypeError("vllm.lora.utils._all_lora_classes has not the layers that we know")


def install_hooks() -> None:
    classes = CLASSES | dict.fromkeys(REPLACED_EXPERTS, ExpertsOnMultiLora) if current_platform.is_cpu() else CLASSES
    utils._all_lora_classes = tuple(classes.get(cls, cls) for cls in utils._all_lora_classes)
    if current_platform.is_cpu():
        _wrap_method(FusedMoEConfig, "__post_init__", _with_experts_as_without_lora)
    adapters.install_loader()
    _wrap_method(LoRAConfig, "compute_hash", _with_our_name)
    _wrap_method(LoRAModelManager, "_init_punica_wrapper", _with_steps)
    _wrap_method(LoRAModelManager, "_create_lora_modules", _with_a_report)
    _wrap_method(LoRAModelManager, "activate_adapter", _with_extras)
    _wrap_method(LoRAModelManager, "remove_all_adapters", _with_norms_forgotten)
    _wrap_method(WorkerLoRAManager, "__init__", _with_our_model)
    _wrap_method(WorkerLoRAManager, "_load_adapter", proof.load_and_check)
    setattr(WorkerBase, proof.TRY, proof.try_lora)
    _wrap_method(AsyncLLM, "__init__", _with_answers)
    for name in ("add_request", "add_lora"):
        _wrap_method(LLMEngine, name, proof.with_proof)
        setattr(AsyncLLM, name, proof.with_proof_async(getattr(AsyncLLM, name)))


def _wrap_method(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Calls change(original, self, ...) in place of a method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(original, self, *args, **kwargs)

    setattr(owner, name, wrapped_method)


def _with_experts_as_without_lora(original: Any, config: Any) -> None:
    """vLLM has no kernels for adapters on experts on the CPU: it chooses those of GPUs. Ours are
    beside those that it chooses without adapters."""
    original(config)
    config.is_lora_enabled = False


def _with_our_name(original: Any, config: Any) -> str:
    """What vLLM has compiled and kept without the plugin is not for a model with it."""
    return f"{original(config)}-lora_kernels-{__version__}"


def _with_answers(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    install_answers()
    original(self, *args, **kwargs)


def _with_our_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    self._lora_model_cls = Model


def _with_steps(original: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """Each punica wrapper gets a step, which follows what vLLM tells the wrapper."""
    original(manager, *args, **kwargs)
    for wrapper in set(manager.punica_wrapper_mapping.values()):
        step = Step(manager.lora_slots, len(wrapper._token_lora_indices), manager.device)
        set_step(wrapper, step)
        wrapper.update_metadata = _following(wrapper, step)


def _following(wrapper: Any, step: Step) -> Callable[..., None]:
    update = wrapper.update_metadata

    @functools.wraps(update)
    def update_metadata(mapping: Any, *args: Any, **kwargs: Any) -> None:
        update(mapping, *args, **kwargs)
        step.set_slots(wrapper.token_lora_indices, not any(lora_id > 0 for lora_id in mapping.index_mapping))

    return update_metadata


def _with_a_report(original: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    original(manager, *args, **kwargs)
    _replace_aliases(manager)
    left: dict[str, int] = {}
    refusals: set[str] = set()
    experts = 0
    for module in manager.modules.values():
        if isinstance(module, ExpertsOnMultiLora):
            experts += module.refusal is None
            refusals |= {module.refusal} if module.refusal is not None else set()
        elif not isinstance(module, OnMultiLora):
            left[type(module).__name__] = left.get(type(module).__name__, 0) + 1
    ours = sum(isinstance(module, OnMultiLora) for module in manager.modules.values())
    log.info("lora_kernels: %d LoRA layers run on multi_lora; vLLM's own: %s", ours, left or "none")
    if experts:
        log.info("lora_kernels: adapters may change the experts of %d layers, whose weights are then held twice", experts)
    for refusal in sorted(refusals):
        log.info("lora_kernels: %s", refusal)


def _replace_aliases(manager: Any) -> None:
    """A linear layer may have a second owner, as the router's has, which calls it too; vLLM gives
    LoRA to the first alone."""
    layers = {id(layer.base_layer): layer for layer in manager.modules.values() if isinstance(layer, OnMultiLora)}
    for owner in list(manager.model.modules()):
        for name, child in list(owner.named_children()) if not isinstance(owner, OnMultiLora) else ():
            if id(child) in layers:
                setattr(owner, name, layers[id(child)])


def _with_norms_forgotten(original: Any, manager: Any) -> None:
    """vLLM removes all adapters when the weights of the base have changed."""
    original(manager)
    for module in manager.modules.values():
        if isinstance(module, OURS):
            module.forget_norms()


def _with_extras(original: Any, manager: Any, lora_id: int) -> bool:
    """After vLLM has put A and B into a slot: the gains and biases. A slot is either right or
    empty."""
    if lora_id in manager._active_adapters:
        return original(manager, lora_id)
    wrong: list[Exception] = []
    try:
        original(manager, lora_id)
    except Exception as error:
        wrong.append(error)
    found = list(extras_by_layer(manager, manager.list_adapters().get(lora_id)))
    ranks = get_tensor_model_parallel_world_size()
    if ranks > 1 and any(magnitude is not None for _, _, magnitude, _ in found):
        # the norms are sums over the ranks, so either all go through the layers or none
        failed = tensor_model_parallel_all_reduce(torch.tensor([float(len(wrong))], device=manager.device))
        if not wrong and bool(failed > 0):
            wrong.append(RuntimeError("another rank could not put the adapter into a slot"))
    if not wrong:
        slot = manager.lora_index_to_id.index(lora_id)
        for wrapper in set(manager.punica_wrapper_mapping.values()):
            step_of(wrapper).occupy(slot)
        # the slot may hold the same adapter as before, anew: ids from before are stale
        manager._last_mapping = None
        wrong += filter(None, [layer.complete(slot, name, *values) for name, layer, *values in found])
    if wrong:
        manager.deactivate_adapter(lora_id)
        raise wrong[0]
    return True
