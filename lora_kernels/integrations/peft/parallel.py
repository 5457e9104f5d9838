"""LoRA layers in tensor parallelism: base_layer's weight and one of A, B are DTensors.

    column parallel:  yₚ = x Wₚᵀ + s (x Aᵀ) Bₚᵀ + biasₚ          W, B, bias by rows, x whole
    row parallel:     y = Σₚ (xₚ Wₚᵀ + s (xₚ Aₚᵀ) Bᵀ) + bias     W, A by columns, x by features

One op on the shards of rank p, and one sum over the ranks: of dx (and of dA) in backward, or of y
(and of dB in backward). PEFT's layers sum h or its gradient besides.

The styles are those of torch's `parallelize_module` and of transformers' `tp_plan` with their
standard layouts, told by their names.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels.integrations.peft.hooks import HOOKED, has_hooks, plain_class
from lora_kernels.integrations.peft.linear import Linear, input_refusal
from lora_kernels.ops import lora_linear

COLUMNS, ROWS = "ColwiseParallel", "RowwiseParallel"
_TORCH = "torch.distributed.tensor.parallel.style"
_TRANSFORMERS = "transformers.distributed.tensor_parallel"
_FORWARD = "TensorParallelLayer.install_forward.<locals>.tp_forward"
_WHOLE = [("Replicate", None)]
# of input and output
_LAYOUTS = {COLUMNS: (_WHOLE, [("Shard", -1)]), ROWS: ([("Shard", -1)], _WHOLE)}
_WEIGHTS = {COLUMNS: [("Shard", 0)], ROWS: [("Shard", 1)]}
_BIASES = {COLUMNS: [("Shard", 0)], ROWS: _WHOLE}


class Shards(NamedTuple):
    """This rank's part of a layer."""

    style: str
    group: Any
    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    dropout: float


def is_parallel(layer: Any) -> bool:
    """Whether the weight of base_layer is a DTensor in its call, too: that of `fully_shard` is
    none there."""
    if plain_class(layer.base_layer) is not type(layer.base_layer):
        return False
    return _placements(layer.base_layer._parameters.get("weight")) is not None


def read_shards(layer: Any) -> Any:
    """This rank's part, or why PEFT must run the layer."""
    names = [name for name in layer.active_adapters if name in layer.lora_A._modules]
    if layer._disable_adapters or layer.merged_adapters or len(names) != 1:
        return HOOKED
    (name,) = names
    base, lora_a, lora_b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    drop = layer.lora_dropout[name]
    style, mesh = _style(base)
    split, whole = (lora_b, lora_a) if style == COLUMNS else (lora_a, lora_b)
    if style is None or has_hooks(whole) or has_hooks(drop):
        return HOOKED
    if _style(split) != (style, mesh):
        return f"base_layer is {style}, and lora_{'B' if style == COLUMNS else 'A'} is not in the same way"
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} in tensor parallelism"
    if layer.fan_in_fan_out or any(type(m) is not nn.Linear for m in (base, lora_a, lora_b)):
        return f"base_layer, lora_A and lora_B are {', '.join(type(m).__name__ for m in (base, lora_a, lora_b))}"
    w, part, kept = base._parameters["weight"], split._parameters["weight"], whole._parameters["weight"]
    bias, wanted = base._parameters["bias"], _WEIGHTS[style]
    sharded = _placements(w) == _placements(part) == wanted and _placements(kept) is None
    if not sharded or (bias is not None and _placements(bias) != _BIASES[style]):
        return f"the weights of base_layer, lora_A and lora_B are placed in another way than by {style}"
    if w.requires_grad:
        return "the base weight requires grad"
    if lora_a._parameters["bias"] is not None or lora_b._parameters["bias"] is not None:
        return "lora_bias in tensor parallelism"
    dropout = 0.0
    if type(drop) is nn.Dropout:
        dropout = drop.p if drop.training else 0.0
    if type(drop) not in (nn.Dropout, nn.Identity) or dropout >= 1.0 or getattr(drop, "inplace", False):
        return f"lora_dropout is {drop}"
    a, b = (kept, part.to_local()) if style == COLUMNS else (part.to_local(), kept)
    return Shards(
        style, mesh.get_group(), w.to_local(), None if bias is None else bias.to_local(), a, b, layer.scaling[name], dropout
    )


def run_shards(layer: Linear, x: Tensor) -> Any:
    """The output of a call, or why PEFT must run it."""
    shards = read_shards(layer)
    if type(shards) is str:
        return shards
    style, group, w, bias, a, b, scale, dropout = shards
    if reason := input_refusal(layer, x, (w, bias, a)):
        return reason
    rows = x.reshape(-1, x.shape[-1])
    if style == COLUMNS:
        rows, a = _SumOfGradients.apply(rows, group), _SumOfGradients.apply(a, group)
        y = lora_linear(rows, w, a, b, scale, bias, None, dropout)
    else:
        # of partial sums one holds the bias
        later = bias is None or bias.requires_grad or dist.get_rank(group) != 0
        b = _SumOfGradients.apply(b, group)
        y = _Sum.apply(lora_linear(rows, w, a, b, scale, None if later else bias, None, dropout), group)
        if bias is not None and bias.requires_grad:
            y = y + bias
    return y.view(*x.shape[:-1], y.shape[-1])


def read_parallel(layer: Any) -> Any:
    """The state of this rank's call of `lora_linear`, or a reason."""
    shards = read_shards(layer)
    return shards if type(shards) is str else (*shards[2:], None)


class _SumOfGradients(torch.autograd.Function):
    """What each rank has whole: its gradient is the sum of all ranks'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dx,) = grads
        return _Sum.apply(dx.clone(memory_format=torch.contiguous_format), ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum of all ranks' y, in place; each rank has its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        ctx.mark_dirty(y)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def _placements(parameter: Any) -> list[Any] | None:
    placements = getattr(parameter, "placements", None)
    return None if placements is None else [(type(p).__name__, getattr(p, "dim", None)) for p in placements]


def _style(module: Any) -> tuple[str | None, Any]:
    """The style of a module, if it has one and no hook besides, and its mesh."""
    held = vars(module).get("forward")
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if module._backward_hooks or module._backward_pre_hooks:
        return None, None
    if held is not None and not hooks and (held.__module__, held.__qualname__) == (_TRANSFORMERS, _FORWARD):
        return _style_of_transformers(module, _closure(held))
    if held is None and len(hooks) == 2 and all(hook.__qualname__.startswith("distribute_module.") for hook in hooks):
        return _style_of_torch(*map(_closure, hooks))
    return None, None


def _style_of_transformers(module: nn.Module, held: dict[str, Any]) -> tuple[str | None, Any]:
    style, mesh, forward = held["self"], held["mesh"], held["original_forward"]
    name = type(style).__name__
    known = type(style).__module__ == _TRANSFORMERS and style.use_local_output
    if not known or getattr(forward, "__func__", None) is not type(module).forward or mesh.ndim != 1:
        return None, None
    return _standard(name, (style.input_layouts,), (style.output_layouts,)), mesh


def _style_of_torch(before: dict[str, Any], after: dict[str, Any]) -> tuple[str | None, Any]:
    prepare, finish = before.get("input_fn"), after.get("output_fn")
    function: Any = getattr(prepare, "func", None)
    mesh = before.get("device_mesh")
    if prepare is None or finish is None or getattr(function, "__module__", None) != _TORCH or mesh is None or mesh.ndim != 1:
        return None, None
    name = function.__qualname__.partition(".")[0]
    (inputs, _), (outputs, local) = prepare.args, finish.args
    return (_standard(name, inputs, outputs) if local else None), mesh


def _standard(name: str, inputs: Any, outputs: Any) -> str | None:
    layouts = tuple([(type(p).__name__, getattr(p, "dim", None)) for p in each] for each in (inputs, outputs))
    return name if _LAYOUTS.get(name) == layouts else None


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}
