"""A request whose adapter cannot be served fails alone, and first: in a step it would take the
engine with it.

An adapter that is new is loaded and checked by every worker, then put into a slot by every worker,
each time by a call whose answer is a reason or None. An exception would leave the answers of other
ranks in their queues, where vLLM takes them for those of the next call; and a rank that goes on
alone would wait in a sum for one that has given up.
"""

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from lora_kernels.adapters.config import AdapterError
from lora_kernels.integrations.vllm.expert_files import pack_experts
from lora_kernels.integrations.vllm.fits import check_adapter
from lora_kernels.integrations.vllm.server import refused

TRY = "lora_kernels_try_lora"
"""The name of `try_lora` in vLLM's workers."""


def try_lora(worker: Any, fields: Sequence[Any], stage: str) -> str | None:
    """A method of each worker. Stages: "load" and check, keeping the adapter aside; "drop" it;
    "add" it to the engine, as vLLM's add_lora; "remove" it again. Returns why that failed."""
    request = LoRARequest(*fields)
    try:
        manager = worker.model_runner.lora_manager
        if stage == "load":
            held = manager._adapter_manager.list_adapters().get(request.lora_int_id)
            if held is None or request.load_inplace:
                adapters_set_aside(manager)[request.lora_int_id] = manager._load_adapter(request)
            elif getattr(held, "path", request.lora_path) != request.lora_path:
                raise AdapterError(f"number {request.lora_int_id} is that of {held.path}; load_inplace exchanges it")
        elif stage == "drop":
            adapters_set_aside(manager).pop(request.lora_int_id, None)
        elif stage == "add":
            worker.add_lora(request)
        else:
            worker.remove_lora(request.lora_int_id)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def load_and_check(original: Any, manager: Any, request: Any) -> Any:
    """In place of a worker's _load_adapter: what lies aside already, or is read and checked now."""
    aside = adapters_set_aside(manager).pop(request.lora_int_id, None)
    if aside is not None and aside.path == request.lora_path:
        return aside
    adapter = original(manager, request)
    pack_experts(manager._adapter_manager, adapter)
    check_adapter(manager._adapter_manager, adapter)
    adapter.path = request.lora_path
    return adapter


def adapters_set_aside(manager: Any) -> dict[int, Any]:
    """The adapters that a worker has loaded and not yet added."""
    return manager.__dict__.setdefault("_lora_kernels_aside", {})


def with_proof(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a method of the engine that takes a LoRARequest."""
    request = _unproven_request(original, engine, args, kwargs)
    if request is not None:
        fields, stages, answer = msgspec.structs.astuple(request), _proof_stages(engine, request, engine.is_sleeping()), None
        while (stage := _next_stage(stages, answer)) is not None:
            answer = engine.collective_rpc(TRY, args=(fields, stage))
    return original(engine, *args, **kwargs)


def with_proof_async(original: Any) -> Callable[..., Any]:
    """As `with_proof`, for the server's engine."""

    @functools.wraps(original)
    async def proved_method(engine: Any, *args: Any, **kwargs: Any) -> Any:
        request = _unproven_request(original, engine, args, kwargs)
        if request is not None:
            fields, stages, answer = (
                msgspec.structs.astuple(request),
                _proof_stages(engine, request, await engine.is_sleeping()),
                None,
            )
            while (stage := _next_stage(stages, answer)) is not None:
                answer = await engine.collective_rpc(TRY, args=(fields, stage))
        return await original(engine, *args, **kwargs)

    return proved_method


def _proof_stages(engine: Any, request: Any, sleeps: bool) -> Generator[str, Any, None]:
    """The stages to ask all workers for; takes their answers, and raises with the first reason.
    While the engine sleeps its slots may have no memory, so the adapter is only loaded."""
    for stage in ("load",) if sleeps else ("load", "add"):
        reason = next((reason for reason in (yield stage) if reason is not None), None)
        if reason is not None:
            yield "drop" if stage == "load" else "remove"
            _proven_adapters(engine).discard(_adapter_key(request))
            message = f"the adapter {request.lora_name!r} ({request.lora_path}) cannot be served: {reason}"
            error = VLLMValidationError(message, parameter="lora_request")
            refused.set(error)
            raise error
    _proven_adapters(engine).add(_adapter_key(request))


def _next_stage(stages: Generator[str, Any, None], answer: Sequence[str | None] | None) -> str | None:
    """The stage that follows the answer to the one before; None after the last."""
    try:
        return stages.send(answer)
    except StopIteration:
        return None


def _unproven_request(original: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """The LoRARequest of a call, if its adapter is to be tried."""
    request = inspect.signature(original).bind(engine, *args, **kwargs).arguments.get("lora_request")
    known = request is None or (_adapter_key(request) in _proven_adapters(engine) and not request.load_inplace)
    return None if known or engine.vllm_config.lora_config is None else request


def _proven_adapters(engine: Any) -> set[tuple[int, str]]:
    return engine.__dict__.setdefault("_lora_kernels_proven", set())


def _adapter_key(request: Any) -> tuple[int, str]:
    return request.lora_int_id, request.lora_path
