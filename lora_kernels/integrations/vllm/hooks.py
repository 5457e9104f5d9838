"""Where the plugin takes hold of vLLM: classes it looks up in a table, and methods that we call around."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.lora import utils
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.worker_base import WorkerBase

from lora_kernels.adapters.config import AdapterError
from lora_kernels.adapters.inject import some
from lora_kernels.integrations.vllm import adapters, log
from lora_kernels.integrations.vllm.adapters import Extra, Model
from lora_kernels.integrations.vllm.layers import CLASSES, OnMultiLora
from lora_kernels.integrations.vllm.step import Step, set_step, step_of

TRY = "lora_kernels_try_lora"
"""The name of `_try_lora` in vLLM's workers."""


def check() -> None:
    """Raises AttributeError or TypeError unless vLLM is as we know it; the message names what is not."""
    wanted: list[tuple[Any, str, set[str]]] = [
        (LoRAModelManager, "_init_punica_wrapper", set()), (LoRAModelManager, "_create_lora_modules", set()),
        (LoRAModelManager, "_create_merged_loras_inplace", {"lora_model"}), (LoRAModelManager, "activate_adapter", {"lora_id"}),
        (WorkerLoRAManager, "__init__", {"lora_model_cls"}), (WorkerBase, "add_lora", {"lora_request"}),
    ]  # fmt: skip
    wanted += [(cls, name, {"lora_request"}) for cls in (LLMEngine, AsyncLLM) for name in ("add_request", "add_lora")]
    wanted += [(cls, name, {"method", "args"}) for cls in (LLMEngine, AsyncLLM) for name in ("collective_rpc",)]
    wanted += [(cls, "_apply_lora_to_output", {"x", "output"}) for cls in CLASSES]
    for owner, name, parameters in wanted:
        missing = parameters - set(inspect.signature(getattr(owner, name)).parameters)
        if missing:
            raise TypeError(f"{owner.__name__}.{name} has no parameter {some(sorted(missing))}")
    if not set(CLASSES) <= set(utils._all_lora_classes):
        raise TypeError("vllm.lora.utils._all_lora_classes has not the layers that we know")


def install() -> None:
    utils._all_lora_classes = tuple(CLASSES.get(cls, cls) for cls in utils._all_lora_classes)
    adapters.install()
    _around(LoRAModelManager, "_init_punica_wrapper", _with_steps)
    _around(LoRAModelManager, "_create_lora_modules", _with_a_report)
    _around(LoRAModelManager, "_create_merged_loras_inplace", _with_checks)
    _around(LoRAModelManager, "activate_adapter", _with_extras)
    _around(WorkerLoRAManager, "__init__", _with_our_model)
    setattr(WorkerBase, TRY, _try_lora)
    for name in ("add_request", "add_lora"):
        _around(LLMEngine, name, _proved)
        setattr(AsyncLLM, name, _proved_async(getattr(AsyncLLM, name)))


def _around(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Calls change(original, self, ...) in place of a method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(original, self, *args, **kwargs)

    setattr(owner, name, method)


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
        step.set(wrapper.token_lora_indices, not any(lora_id > 0 for lora_id in mapping.index_mapping))

    return update_metadata


def _with_a_report(original: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    original(manager, *args, **kwargs)
    left: dict[str, int] = {}
    for module in manager.modules.values():
        if not isinstance(module, OnMultiLora):
            left[type(module).__name__] = left.get(type(module).__name__, 0) + 1
    ours = sum(isinstance(module, OnMultiLora) for module in manager.modules.values())
    log.info("lora_kernels: %d LoRA layers run on multi_lora; vLLM's own: %s", ours, left or "none")


def _with_checks(original: Any, manager: Any, lora_model: Any) -> None:
    """Before vLLM keeps an adapter: all of it must have a place in the model, and fit there."""
    packed = {part: name for name, parts in manager.packed_modules.items() for part in parts}
    unknown = sorted(name for name in lora_model.loras if packed.get(name, name) not in manager.modules)
    config = manager.lora_config
    if unknown and config.target_modules is None and _whole_model(manager):
        raise AdapterError(f"the adapter changes modules that the model does not have: {some(unknown)}")
    for name in getattr(lora_model, "extras", {}):
        layer = manager.modules.get(packed.get(name, name))
        if layer is not None and not isinstance(layer, OnMultiLora):
            raise AdapterError(f"{name}: DoRA and lora_bias are served on linear layers, this is vLLM's {type(layer).__name__}")
    original(manager, lora_model)
    extras = {name: values for name, _, *values in _layers_of(manager, getattr(lora_model, "extras", {}))}
    for name, layer in manager.modules.items():
        lora = lora_model.loras.get(name)
        if lora is not None and isinstance(layer, OnMultiLora):
            layer.check(name, lora.lora_a, lora.lora_b, *extras.get(name, (None, None)))


def _whole_model(manager: Any) -> bool:
    """Whether no layer is on another stage of a pipeline."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return not any(isinstance(module, PPMissingLayer) for module in manager.model.modules())


def _with_extras(original: Any, manager: Any, lora_id: int) -> bool:
    """After vLLM has put A and B into a slot: the gains and biases. A slot is either right or empty."""
    try:
        changed = original(manager, lora_id)
        if not changed:
            return False
        slot = manager.lora_index_to_id.index(lora_id)
        for wrapper in set(manager.punica_wrapper_mapping.values()):
            step_of(wrapper).occupy(slot)
        manager._last_mapping = None  # the slot may hold the same adapter as before, anew: ids from before are stale
        extras = getattr(manager._registered_adapters[lora_id], "extras", {})
        errors = [layer.complete(slot, name, *values) for name, layer, *values in _layers_of(manager, extras)]
        for error in filter(None, errors):  # only now: other ranks may wait in a later layer to add their squares
            raise error
    except Exception:
        manager.deactivate_adapter(lora_id)
        raise
    return True


def _layers_of(manager: Any, extras: dict[str, Extra]) -> Iterator[tuple[str, OnMultiLora, Any, Any]]:
    """(name, layer, magnitude, bias) of the layers that have any, packed as vLLM packs B."""
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name)
        found = [extras.get(part) for part in parts or [name]]
        if not isinstance(layer, OnMultiLora) or not any(found):
            continue
        values = []
        for what in ("magnitude", "bias"):
            vectors = [None if extra is None else getattr(extra, what) for extra in found]
            there = any(v is not None for v in vectors)
            values.append(None if not there else vectors if parts else vectors[0])
        yield name, layer, *values


def _proved(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """A request whose adapter the engine cannot load fails here, alone; in a step it would take the engine with it."""
    request = _request_of(original, engine, args, kwargs)
    if request is not None:
        try:
            _accept(engine, request, engine.collective_rpc(TRY, args=(msgspec.structs.astuple(request),)))
        except VLLMValidationError:
            engine.engine_core.remove_lora(request.lora_int_id)  # of the ranks that had no reason to refuse it
            raise
    return original(engine, *args, **kwargs)


def _proved_async(original: Any) -> Any:
    """As `_proved`, for the server's engine."""

    @functools.wraps(original)
    async def method(engine: Any, *args: Any, **kwargs: Any) -> Any:
        request = _request_of(original, engine, args, kwargs)
        if request is not None:
            try:
                _accept(engine, request, await engine.collective_rpc(TRY, args=(msgspec.structs.astuple(request),)))
            except VLLMValidationError:
                await engine.engine_core.remove_lora_async(request.lora_int_id)
                raise
        return await original(engine, *args, **kwargs)

    return method


def _try_lora(worker: Any, fields: Sequence[Any]) -> str | None:
    """A method of each worker: loads an adapter, and returns why that failed. An exception would leave the answers of other
    ranks in their queues, where vLLM takes them for those of the next call."""
    try:
        worker.add_lora(LoRARequest(*fields))
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _request_of(original: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """The LoRARequest of a call, if its adapter is to be loaded to see whether it can be."""
    request = inspect.signature(original).bind(engine, *args, **kwargs).arguments.get("lora_request")
    known = request is None or (_key(request) in _proven(engine) and not request.load_inplace)
    return None if known or engine.vllm_config.lora_config is None else request


def _accept(engine: Any, request: Any, reasons: Sequence[str | None]) -> None:
    """Raises with the first reason that a rank has, if any has one."""
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        _proven(engine).discard(_key(request))
        message = f"the adapter {request.lora_name!r} ({request.lora_path}) cannot be served: {reason}"
        raise VLLMValidationError(message, parameter="lora_request")
    _proven(engine).add(_key(request))


def _proven(engine: Any) -> set[tuple[int, str]]:
    return engine.__dict__.setdefault("_lora_kernels_proven", set())


def _key(request: Any) -> tuple[int, str]:
    return request.lora_int_id, request.lora_path
