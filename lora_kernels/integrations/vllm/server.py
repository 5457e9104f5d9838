"""vLLM's OpenAI server says why an adapter cannot be served, as the client's error: 400. By itself
it answers 500, or leaves the reason out."""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm.exceptions import VLLMValidationError

SERVING = "vllm.entrypoints.openai.models.serving"
METHODS = ("load_lora_adapter", "resolve_lora")

refused: ContextVar[VLLMValidationError | None] = ContextVar("lora_kernels_refused", default=None)
"""What the engine said of the adapter that this task asks for."""


def install_answers() -> None:
    """Where the server is loaded, which an engine of its own does not need."""
    serving = sys.modules.get(SERVING)
    cls = getattr(serving, "OpenAIServingModels", None)
    for name in METHODS if cls is not None else ():
        method = getattr(cls, name, None)
        if method is not None and not hasattr(method, "_lora_kernels"):
            setattr(cls, name, with_reason(method, serving))


def with_reason(method: Callable[..., Any], serving: Any) -> Callable[..., Any]:
    """Around a method of the server that has the engine load an adapter."""

    async def answered_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = refused.set(None)
        try:
            answer = await method(self, *args, **kwargs)
            reason = refused.get()
        finally:
            refused.reset(token)
        # an adapter that is not there at all stays 404
        if reason is None or getattr(getattr(answer, "error", None), "code", None) not in (400, 500):
            return answer
        return serving.create_error_response(reason)

    answered_method._lora_kernels = True  # type: ignore[attr-defined]
    return answered_method
