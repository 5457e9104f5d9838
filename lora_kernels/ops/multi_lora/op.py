"""A frozen linear layer in which each token has its own adapter, none, or several:

    y[t] = W x[t] + Σᵢ vᵢ ((gᵢ − 1) ⊙ W x[t] + gᵢ ⊙ sᵢ Bᵢ Aᵢ x[t] + cᵢ) + bias                   (1)

over the adapters i of token t: v their weights, g = m / ‖W + s·BA‖ of DoRA and else 1, c the bias
of B times s. With one adapter of weight 1 that is g ⊙ (W x + s·B A x) + c + bias.
Sources: LoRA, arXiv:2106.09685, eq. 3; DoRA, arXiv:2402.09353, eq. 5; batches of adapters: Punica,
arXiv:2310.18547, §3; ragged ranks: S-LoRA, arXiv:2311.03285, §5.2.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.ops.derivatives import transformed, under_functorch
from lora_kernels.ops.lora_linear.op import FLOATS, _any_autocast, autocasts, without_autocast
from lora_kernels.ops.multi_lora.plan import BatchPlan, Slots, tensors_of
from lora_kernels.ops.multi_lora.training import trained
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.registry import declare


def multi_lora(
    x: Tensor, w: Tensor | QuantisedWeight, slots: Slots | Sequence[Slots], plan: BatchPlan, bias: Tensor | None = None
) -> Tensor:
    """Formula (1).

    Shapes: x [..., in], w [out, in], bias [out]; returns [..., out] in the dtype of x. `plan` has
    as many tokens as x has rows. `slots` are the adapters of w, or of several slices of its rows
    (q, k and v of one matrix) in their order. x and w share a dtype: float32, bfloat16, float16 or
    float64. So do a and b of the slots. Sums are float32 (float64 for float64), and y is rounded
    once. Under autocast x and w are cast to its dtype. w may be a `QuantisedWeight` of the dtype of
    x: a CPU reads its codes, and W is formed on a GPU and where gradients are wanted.

    An id that is out of range or stale counts as no adapter, and sets `plan.error`; weights of
    others are never read.

    Gradients flow to x, to bias, and to a, b, gain and bias of the slots where they require it; w
    is frozen. Then each adapter of the batch is one `lora_linear` of its tokens, so what its rows
    of a and b get has the bits of training it alone; the plan is read on the host. Forward mode and
    torch.func go the same way.

    Raises:
        TypeError: a tensor has a dtype that is not supported.
        ValueError: a shape or device does not fit; the message names the tensor.
        NotImplementedError: the forced backend refuses; the message says why.
    """
    if _any_autocast() and autocasts(x.device.type):
        cast = x.dtype if x.dtype is torch.float64 else torch.get_autocast_dtype(x.device.type)
        with without_autocast(x):
            return multi_lora(x.to(cast), w.to(cast), slots, plan, bias)
    n_out = w.shape[0] if isinstance(w, Tensor | QuantisedWeight) and w.dim() == 2 else -1
    sites = _check_arguments("multi_lora", x, slots, plan, bias, n_out)
    if w.shape[1] != x.shape[-1] or w.dtype is not x.dtype or w.device != x.device:
        wanted = f"[out, {x.shape[-1]}] {x.dtype} on {x.device} as x is"
        raise ValueError(f"multi_lora: w must be {wanted}, found {list(w.shape)} {w.dtype} on {w.device}")
    learns = torch.is_grad_enabled() and _wants_grad(x, bias, *(t for s in sites for t in (s.a, s.b, s.gain, s.bias)))
    if learns or ((forward_ad._current_level >= 0 or under_functorch()) and transformed()):
        y = trained(_as_rows(x), w if isinstance(w, Tensor) else w.dequantise(), sites, plan, bias)
    else:
        codes, parts, layout = (w, None, None) if isinstance(w, Tensor) else w.fields()
        y = _forward(MultiLoRA(*(_as_rows(x), codes, *_flat_tensors(sites, plan), bias, parts, layout)))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n_out)


def multi_lora_add_(
    y: Tensor, x: Tensor, slots: Slots | Sequence[Slots], plan: BatchPlan, bias: Tensor | None = None
) -> Tensor:
    """Makes formula (1) of y = W x + bias, in place, wherever W x came from: a quantised base,
    another library. y is read and written once, and returned. `bias` [out] is that which y holds
    already; it matters to DoRA alone, whose gain is not for it.

    Shapes: y [..., out], x [..., in]; the rest as `multi_lora`, which rounds once where this rounds
    twice, since y is rounded.

    Raises:
        TypeError, ValueError: as `multi_lora`; and if y has not its own memory for each element,
            or a gradient is wanted, or forward mode or torch.func is under way: there is none.
    """
    sites = _check_arguments("multi_lora_add_", x, slots, plan, bias, y.shape[-1] if isinstance(y, Tensor) and y.dim() else -1)
    if y.shape[:-1] != x.shape[:-1] or y.dtype is not x.dtype or y.device != x.device:
        wanted = f"{[*x.shape[:-1], y.shape[-1]]} {x.dtype} on {x.device} as x is"
        raise ValueError(f"multi_lora_add_: y must be {wanted}, found {list(y.shape)} {y.dtype} on {y.device}")
    learns = torch.is_grad_enabled() and _wants_grad(y, x, *(t for s in sites for t in (s.a, s.b, s.gain, s.bias)))
    if learns or transformed():
        raise ValueError("multi_lora_add_: it is not differentiated; use multi_lora, or torch.no_grad()")
    rows = y if y.dim() == 2 else y.view(math.prod(y.shape[:-1]), y.shape[-1])
    if any(stride == 0 and size > 1 for size, stride in zip(rows.shape, rows.stride(), strict=True)):
        raise ValueError(f"multi_lora_add_: y must have its own memory for each element, found strides {list(y.stride())}")
    _add(MultiLoRAAdd(*(rows, _as_rows(x), *_flat_tensors(sites, plan), bias)))
    if not torch.compiler.is_compiling() and not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return y


def _wants_grad(*tensors):
    return any(t is not None and t.requires_grad for t in tensors)


def _as_rows(x):
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _flat_tensors(slots, plan):
    # Dynamo cannot enter the lock that a cached property has in Python 3.11
    if torch.compiler.is_compiling():
        return [t for s in slots for t in tensors_of(s)], *tensors_of(plan)
    return (slots[0].tensors if len(slots) == 1 else [t for s in slots for t in s.tensors]), *plan.tensors


def _check_arguments(op, x, slots, plan, bias, n_out):
    """The slots as a list, if everything fits. Sizes are read once: each costs as much as a small
    layer's row."""
    if not isinstance(x, Tensor) or x.dim() < 1 or n_out < 0:
        raise TypeError(f"{op}: x and w or y must be tensors, x of at least one dimension and w of two")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or float64, found {x.dtype}")
    slots = [slots] if isinstance(slots, Slots) else list(slots)
    if not slots or not all(isinstance(s, Slots) for s in slots) or not isinstance(plan, BatchPlan):
        raise TypeError(f"{op}: slots must be Slots, or several, and plan a BatchPlan")
    *outer, n_in = x.shape
    device, count, found = x.device, slots[0].rank.shape[0], 0
    for i, s in enumerate(slots):
        if s.a.shape[1] != n_in or s.a.device != device:
            wanted = f"{n_in} columns on {device} as x has"
            raise ValueError(f"{op}: a of slots[{i}] must have {wanted}, found {list(s.a.shape)} on {s.a.device}")
        found += s.b.shape[1]
    if found != n_out:
        raise ValueError(f"{op}: the slots' b must have {n_out} columns together, found {[s.b.shape[1] for s in slots]}")
    tokens, ids = math.prod(outer), plan.ids
    if ids.shape[0] != tokens or ids.device != device:
        raise ValueError(f"{op}: plan must be of {tokens} tokens on {device}, found {len(ids)} on {ids.device}")
    if plan.starts.shape[0] != count + 1 or any(s.rank.shape[0] != count for s in slots[1:]):
        counts = [len(s.rank) for s in slots]
        raise ValueError(f"{op}: plan and slots must have as many slots, found {len(plan.starts) - 1} and {counts}")
    if bias is not None and (bias.shape != (n_out,) or bias.dtype not in FLOATS or bias.device != device):
        wanted = f"[{n_out}], floating, on {device}"
        raise ValueError(f"{op}: bias must be {wanted}, found {list(bias.shape)} {bias.dtype} on {bias.device}")
    return slots


class MultiLoRA(NamedTuple):
    """The arguments of the op: x [tokens, in], the tensors of all `Slots` one after another, those
    of the `BatchPlan`."""

    x: Tensor
    w: Tensor
    slots: list[Tensor]
    ids: Tensor
    weights: Tensor | None
    order: Tensor
    starts: Tensor
    error: Tensor
    bias: Tensor | None
    parts: list[Tensor] | None = None
    layout: list[int] | None = None
    """Where W is quantised: w, parts and layout are then `QuantisedWeight.fields()`."""


class MultiLoRAAdd(NamedTuple):
    """The arguments of the op in place, y [tokens, out]."""

    y: Tensor
    x: Tensor
    slots: list[Tensor]
    ids: Tensor
    weights: Tensor | None
    order: Tensor
    starts: Tensor
    error: Tensor
    bias: Tensor | None


def _fake_result(call):
    return call.x.new_empty(call.x.shape[0], call.layout[1] if call.layout else call.w.shape[0])


_forward = declare("multi_lora_forward", MultiLoRA, "Tensor", _fake_result, changes=("error",))
_add = declare("multi_lora_add", MultiLoRAAdd, "()", lambda call: None, changes=("y", "error"))
