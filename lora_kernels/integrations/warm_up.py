"""Compiles the kernels that a model will need before its first batch."""

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from lora_kernels.nn import GroupedLinear, LoRAExperts, LoRALinear
from lora_kernels.nn.forms import IDENTITIES, ROUTED, SORTED, SPLIT, Form, form_of
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

    Layers that run as one op (`report.groups()`) are called so, too, once `fuse` has found them:
    after two calls of the model. Of experts each token gets as many as the module, or its config,
    says (`top_k`, `num_experts_per_tok`), one where neither does.

    With `tune` the ways to compute each of these calls are timed on the GPU
    (`lora_kernels.ops.tuning`), those of the most rows first, for about `seconds` in all. The
    fastest is kept in the user's cache directory, and `explain` says "measured here". Without
    `tune` nothing is timed.

    Parameters, their gradients and torch's random numbers are left as they are; hooks of the layers
    run, those of their parameters on gradients of zero. It takes the memory of one layer's call;
    with `tune` of another, and a gigabyte.

    Returns the names of the layers that were called, of a group that of its module.

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
    layers = [each for each in _fused_layers(model) if each.device.type == "cuda" or simulates()]
    problems: dict[torch.device, list[Problem]] = {}
    with torch.random.fork_rng({layer.device for layer in layers if layer.device.type == "cuda"}):
        for layer in layers:
            for count in counts:
                x = torch.zeros(count * layer.copies, layer.width, dtype=dtype or layer.dtype, device=layer.device)
                if tune:
                    problems.setdefault(x.device, []).extend(_problems(layer, x))
                else:
                    _call_layer(layer, x)
        for device, found in problems.items():
            tuning.tune(sorted(found, key=lambda p: -p.m), device, seconds / len(problems))
    return [layer.name for layer in layers]


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


class _Layer(NamedTuple):
    """What is called on zeros."""

    name: str
    modules: list[nn.Module]
    """Whose parameters and mode count."""
    call: Callable[[Tensor], Any]
    width: int
    """The features of x."""
    device: torch.device
    dtype: torch.dtype
    """In which the base weight is multiplied."""
    copies: int = 1
    """Rows of x for a token."""


def _fused_layers(model: nn.Module) -> Iterator[_Layer]:
    """Each layer on our kernels; those of a group of lora_kernels.nn as one, and those of one that
    `fuse` found as one, too."""
    within: set[nn.Module] = set()
    peft = sys.modules.get("lora_kernels.integrations.peft")
    for name, module in model.named_modules():
        if module in within:
            continue
        if isinstance(module, GroupedLinear):
            members = [layer for layer in module.children() if isinstance(layer, LoRALinear)]
            within.update(members)
            if members:
                yield _of_module(name, module, members[0].in_features, members[0].weight, _own_dtype(members[0]))
        elif isinstance(module, LoRALinear):
            yield _of_module(name, module, module.in_features, module.weight, _own_dtype(module))
        elif isinstance(module, LoRAExperts):
            form: Any = form_of(module, module._origin[0])
            if not isinstance(form, str):
                yield _experts(name, module, module, form, getattr(module, form.weights[0]))
        elif peft is None:
            continue
        elif isinstance(module, peft.FUSED_LINEAR):
            base: Any = module.get_base_layer()
            weight = base.W_q if "W_q" in base._parameters else base.weight  # HQQ's codes
            own = weight.dtype if isinstance(module, peft.FusedLinear) else form_of_codes(base)[1]
            yield _of_module(name, module, module.in_features, weight, own)
        elif isinstance(module, peft.FusedParamWrapper):
            within.update(module.modules())
            found = peft.read_parameters(module)
            if not isinstance(found, str):
                experts, form, adapted = found
                yield _experts(name, module, experts, form, adapted[0].w)
        else:
            yield from _groups(name, module, peft)


def _of_module(name: str, module: nn.Module, width: int, weight: Tensor, dtype: torch.dtype) -> _Layer:
    return _Layer(name, [module], module, width, weight.device, dtype)


def _groups(name: str, parent: nn.Module, peft: Any) -> Iterator[_Layer]:
    """The groups that `fuse` found among the children of a module."""
    for layers, siblings in peft.formed_groups(parent):
        first = layers[0]

        def call(x: Tensor, layers: Any = layers, siblings: Any = siblings) -> tuple[Tensor, ...]:
            # outside of its module's call each layer would run alone
            siblings.enter(parent)
            try:
                return tuple([layer(x) for layer in layers])
            finally:
                siblings.leave()

        weight = first.get_base_layer().weight
        yield _Layer(name, layers, call, first.in_features, weight.device, weight.dtype)


def _experts(name: str, layer: nn.Module, module: nn.Module, form: Form, w: Tensor) -> _Layer:
    """A layer of the parameters of a module, the first of which is w."""

    def call(x: Tensor) -> Any:
        return layer(x, *_routing(module, form, x, w.shape[0]))

    # every expert of Llama 4 gets all tokens
    copies = w.shape[0] if form.kind == SORTED else 1
    return _Layer(name, [layer], call, w.shape[-2 if form.transposed else -1], w.device, w.dtype, copies)


def _routing(module: Any, form: Form, x: Tensor, experts: int) -> tuple[Any, ...]:
    """Experts of each token, one after another, and their weights; or how many tokens each has."""
    if form.kind == SPLIT:
        return ([len(x) // experts + (e < len(x) % experts) for e in range(experts)],)
    if form.kind not in (ROUTED, IDENTITIES):
        return ()
    holders = (module, getattr(module, "config", None))
    found = [getattr(holder, name, None) for holder in holders for name in ("top_k", "num_experts_per_tok")]
    k = next((k for k in found if type(k) is int and 0 < k <= experts), 1)
    index = torch.arange(len(x) * k, device=x.device).view(len(x), k) % experts
    return index, torch.ones(index.shape, dtype=x.dtype, device=x.device)


def _own_dtype(layer: LoRALinear) -> torch.dtype:
    held = layer._quantised
    return layer.weight.dtype if held is None else held.compute_dtype(None)


def _problems(layer: _Layer, x: Tensor) -> Iterator[Problem]:
    """Those that a call of a layer has several candidates for."""
    # in this thread, or before torch 2.13 nobody would see what a GPU's backward chooses
    with torch.autograd.set_multithreading_enabled(False):
        decisions = explain(_call_layer, layer, x).decisions
    yield from (decision.plan.problem for decision in decisions if decision.plan is not None)


def _call_layer(layer: _Layer, x: Tensor) -> None:
    """The layer's call as in an evaluation, or as in a step: for an input that wants its gradient
    and for one that does not."""
    trained = [p for module in layer.modules for p in module.parameters() if p.requires_grad]
    if not (layer.modules[0].training and torch.is_grad_enabled()):
        layer.call(x)
        return
    for wanted in (True, False) if trained else (True,):
        ys = layer.call(x.requires_grad_(wanted))
        ys = [y for y in (ys if isinstance(ys, tuple) else (ys,)) if y.requires_grad]
        # not backward(): that would add to the gradients that the parameters hold
        if ys:
            torch.autograd.grad(ys, [*trained, *([x] if wanted else [])], list(map(torch.zeros_like, ys)), allow_unused=True)
