"""Calls of PEFT's layer with `adapter_names`, an adapter for each sequence, or `alora_offsets`: the
adapter acts from the invocation on, as many tokens before the sequence's end."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.integrations.peft.linear import WAYS, Way, cached_gain, input_refusal
from lora_kernels.integrations.peft.rows import NO_ADAPTER, layout_of, run_rows
from lora_kernels.integrations.peft.state import ALORA, ALORA_VARIANT, ARGUMENTS, read_state
from lora_kernels.ops import lora_linear

_OURS = {"adapter_names", "alora_offsets"}


def run_arguments(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a call with arguments besides the input, or why PEFT must run it."""
    if args or not _OURS.issuperset(kwargs) or torch.compiler.is_compiling():
        return ARGUMENTS
    names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
    if names is not None:
        return _run_named(layer, x, names, offsets)
    state: Any = read_state(layer)
    if type(state) is not str:
        # offsets are for other adapters
        if reason := input_refusal(layer, x, state):
            return reason
        w, bias, a, b, scale, dropout, magnitude = state
        gain = None if magnitude is None else cached_gain(layer, w, a, b, scale, magnitude)
        return lora_linear(x, w, a, b, scale, bias, gain, dropout)
    if state == ALORA:
        return run_alora(layer, x, offsets)
    return WAYS[state].run(layer, x, (), {}) if state in WAYS else state


def run_alora(layer: Any, x: Tensor, offsets: Any) -> Any:
    """Of one active aLoRA adapter; without offsets no token has it."""
    last = ALORA if torch.compiler.is_compiling() else _last_tokens(x, offsets)
    if type(last) is str:
        return last
    name = _active_name(layer)
    return run_rows(layer, x, layout_of((name,) * len(last), last, _tokens(x), x.device))


def _run_named(layer: Any, x: Tensor, names: Any, offsets: Any) -> Any:
    if layer.merged_adapters:
        return "an adapter is merged into the base weight"
    if type(names) not in (list, tuple) or set(map(type, names)) != {str} or x.dim() < 2 or len(names) != len(x):
        return "adapter_names are not one name for each sequence"
    names, tokens = tuple(names), _tokens(x)
    with_offsets = {name for name in {*names} if _is_alora(layer, name)}
    last: Any = (tokens,) * len(names)
    if with_offsets:
        last = _last_tokens(x, offsets)
        if type(last) is str:
            return last
        last = tuple(n if name in with_offsets else tokens for name, n in zip(names, last, strict=True))
    return run_rows(layer, x, layout_of(names, last, tokens, x.device))


def _is_alora(layer: Any, name: str) -> bool:
    return ALORA_VARIANT is not None and name != NO_ADAPTER and type(layer.lora_variant.get(name)) is ALORA_VARIANT


def _tokens(x: Tensor) -> int:
    """Of each sequence."""
    return math.prod(x.shape[1:-1])


def _last_tokens(x: Tensor, offsets: Sequence[Any] | None) -> Any:
    """How many of each sequence's tokens the invocation and what follows it are, or why PEFT must
    run the call."""
    if x.dim() not in (2, 3):
        return f"aLoRA of an input of {x.dim()} dimensions"
    if offsets is None:
        return (0,) * len(x)
    if len(offsets) != len(x):
        return "alora_offsets are not one number for each sequence"
    tokens = _tokens(x)
    return tuple(0 if n is None else max(0, min(int(n), tokens)) for n in offsets)


def _active_name(layer: Any) -> str:
    name = layer._active_adapter
    if type(name) is str:
        return name
    (here,) = (each for each in name if each in layer.lora_A._modules)
    return str(here)


WAYS[ARGUMENTS] = Way(run_arguments)
WAYS[ALORA] = Way(
    lambda layer, x, args, kwargs: run_alora(layer, x, None),
    lambda layer: read_state(layer, _active_name(layer)),
)
