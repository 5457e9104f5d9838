"""Compiles the kernels that a model will need before its first batch."""

import operator
import sys
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from lora_kernels.nn import GroupedLinear, LoRALinear
from lora_kernels.nn.quantised_base import form_of_codes
from lora_kernels.ops import tuning
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.lora_linear.op import FLOATS
from lora_kernels.ops.registry import explain, simulates


def warm_up(
    model: nn.Module, tokens: SupportsIndex | Sequence[SupportsIndex], *, dtype: torch.dtype | None = None, tune: bool = False,
    seconds: float = 60.0,
) -> list[str]:  # fmt: skip
    """Calls every LoRA layer of a model on zeros, so that Triton compiles, and the GPU loads, what
    they will run.

        fuse(model)
        warm_up(model, [1, 64, 4096])

    Layers of lora_kernels.nn and those that `fuse` took over, on a GPU; on the CPU there is nothing
    to compile. `tokens`: the row counts to expect (batch · sequence), since kernels differ between
    few rows and many. `dtype`: of the inputs; that of the base weight if not given. Call it as the
    model will be called: in train or eval mode, under `torch.autocast`, under `torch.no_grad()` or
    not. In train mode backward runs too, with a gradient of the input and without.

    With `tune` the ways to compute each of these calls are timed on the GPU
    (`lora_kernels.ops.tuning`), those of the most rows first, for about `seconds` in all. The
    fastest is kept in the user's cache directory, and `explain` says "measured here". Without
    `tune` nothing is timed.

    Parameters, their gradients and torch's random numbers are left as they are; hooks of the layers
    run, those of their parameters on gradients of zero. It takes the memory of one layer's call;
    with `tune` of another, and a gigabyte.

    Returns the names of the layers that were called.

    Raises:
        TypeError: model is not a torch.nn.Module, tokens are not integers, or dtype is not one of
            the layers'.
        ValueError: no number of tokens is given, or one is below 1. Nothing has run.
        RuntimeError: `tune`, and the layers are simulated: there is nothing to time.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warm_up: model must be a torch.nn.Module, found {type(model).__name__}")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"warm_up: dtype must be float32, bfloat16, float16 or float64, found {dtype}")
    counts = _row_counts(tokens)
    layers = [each for each in _fused_layers(model) if each[3].is_cuda or simulates()]
    problems: dict[torch.device, list[Problem]] = {}
    with torch.random.fork_rng({weight.device for *_, weight, _ in layers if weight.is_cuda}):
        for _, layer, width, weight, own in layers:
            for count in counts:
                x = torch.zeros(count, width, dtype=dtype or own, device=weight.device)
                if tune:
                    problems.setdefault(x.device, []).extend(_problems(layer, x))
                else:
                    _call_layer(layer, x)
        for device, found in problems.items():
            tuning.tune(sorted(found, key=lambda p: -p.m), device, seconds / len(problems))
    return [name for name, *_ in layers]


def _row_counts(tokens: Any) -> list[int]:
    """The numbers of rows, each once."""
    given = list(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else [tokens]
    for count in given:
        if isinstance(count, bool | Tensor) or not hasattr(count, "__index__"):
            raise TypeError(f"warm_up: tokens must be integers, found {count!r}")
    counts = list(dict.fromkeys(map(operator.index, given)))
    if not counts or min(counts) < 1:
        raise ValueError(f"warm_up: tokens must be one or more numbers from 1 on, found {tokens!r}")
    return counts


def _fused_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, Tensor, torch.dtype]]:
    """Each layer on our kernels: its name, itself, its in_features, its base weight, and the dtype
    in which that is multiplied; those of a group as one."""
    within: set[nn.Module] = set()
    peft = sys.modules.get("lora_kernels.integrations.peft")
    for name, module in model.named_modules():
        if module in within:
            continue
        if isinstance(module, GroupedLinear):
            members = [layer for layer in module.children() if isinstance(layer, LoRALinear)]
            within.update(members)
            if members:
                yield name, module, members[0].in_features, members[0].weight, _own_dtype(members[0])
        elif isinstance(module, LoRALinear):
            yield name, module, module.in_features, module.weight, _own_dtype(module)
        elif peft is not None and isinstance(module, peft.FUSED_LINEAR):
            base: Any = module.get_base_layer()
            weight = base.W_q if "W_q" in base._parameters else base.weight  # HQQ's codes
            own = weight.dtype if isinstance(module, peft.FusedLinear) else form_of_codes(base)[1]
            yield name, module, module.in_features, weight, own


def _own_dtype(layer: LoRALinear) -> torch.dtype:
    held = layer._quantised
    return layer.weight.dtype if held is None else held.compute_dtype(None)


def _problems(layer: nn.Module, x: Tensor) -> Iterator[Problem]:
    """Those that a call of a layer has several candidates for."""
    # in this thread, or before torch 2.13 nobody would see what a GPU's backward chooses
    with torch.autograd.set_multithreading_enabled(False):
        decisions = explain(_call_layer, layer, x).decisions
    yield from (decision.plan.problem for decision in decisions if decision.plan is not None)


def _call_layer(layer: nn.Module, x: Tensor) -> None:
    """The layer's call as in an evaluation, or as in a step: for an input that wants its gradient
    and for one that does not."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    if not (layer.training and torch.is_grad_enabled()):
        layer(x)
        return
    for wanted in (True, False) if trained else (True,):
        ys = layer(x.requires_grad_(wanted))
        ys = [y for y in (ys if isinstance(ys, tuple) else (ys,)) if y.requires_grad]
        # not backward(): that would add to the gradients that the parameters hold
        if ys:
            torch.autograd.grad(ys, [*trained, *([x] if wanted else [])], list(map(torch.zeros_like, ys)), allow_unused=True)
