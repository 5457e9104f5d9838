"""A call of PEFT's layer in which tokens have different adapters, or none:

    y[t] = W x[t] + bias + s B A x[t] + s c        of LoRA, with c the bias of its B
    y[t] = g ⊙ (W x[t] + s B A x[t]) + bias        of DoRA

with the matrices of token t's adapter. Without gradients that is `multi_lora`. With them the
backward here adds to each token what its adapter has for it, and nothing is copied for the others.
Where W is quantised, W x is a call of its own with gradients.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.integrations.peft.bias import base_bias, with_lora_bias
from lora_kernels.integrations.peft.linear import cached_gain, input_refusal
from lora_kernels.integrations.peft.state import read_codes, read_state
from lora_kernels.nn.quantised_base import product_of_codes
from lora_kernels.ops import BatchPlan, QuantisedWeight, Slots, lora_linear, multi_lora, multi_lora_add_
from lora_kernels.ops.lora_linear.op import autocasts, without_autocast
from lora_kernels.ops.multi_lora.plan import BASE, BIAS, GAIN, PAGE, ROW

NO_ADAPTER = "__base__"
"""PEFT's name for the base model."""

Weight = Tensor | QuantisedWeight

FEW = 4
"""16-bit tokens on the CPU, up to which copies of the adapters cost more than the fewer passes
save."""


class Layout(NamedTuple):
    """Which tokens have which adapter: the same for every layer of a forward."""

    names: tuple[str, ...]
    rows: tuple[Any, ...]
    """The tokens of each: a slice where they are neighbours, else int64."""
    counts: tuple[int, ...]
    plan: BatchPlan
    """For slots in the order of the names."""
    whole: bool
    """Whether one adapter has every token."""


@lru_cache(maxsize=16)
def layout_of(names: tuple[str, ...], last: tuple[int, ...], tokens: int, device: torch.device) -> Layout:
    """The layout of a batch of sequences of `tokens` tokens each: the adapter of each sequence, and
    how many of its last tokens have it."""
    found = tuple(dict.fromkeys(name for name in names if name != NO_ADAPTER))
    # what is kept must be of use in every mode
    with torch.inference_mode(False):
        ids = torch.full((len(names), tokens), BASE, dtype=torch.int64)
        for i, (name, count) in enumerate(zip(names, last, strict=True)):
            if name != NO_ADAPTER and count:
                ids[i, tokens - count :] = found.index(name)
        ids = ids.flatten()
        each = [(ids == slot).nonzero()[:, 0] for slot in range(len(found))]
        counts = tuple(map(len, each))
        rows = tuple(_as_slice(t) or t.to(device) for t in each)
        plan = BatchPlan.build(ids.to(device), max(len(found), 1))
    return Layout(found, rows, counts, plan, len(found) == 1 and counts[0] == len(ids))


def _as_slice(index: Tensor) -> slice | None:
    if not len(index):
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else None


class Adapter(NamedTuple):
    """One of a layout's adapters in one layer."""

    slot: int
    a: Tensor
    b: Tensor
    scale: float
    dropout: float
    own_bias: Tensor | None
    magnitude: Tensor | None


def run_rows(layer: Any, x: Tensor, layout: Layout) -> Any:
    """The output of a call, x [sequences, ..., in], or why PEFT must run it."""
    found: list[Adapter] = []
    state: Any = None
    for slot, name in enumerate(layout.names):
        if name in layer.lora_A._modules:
            state = read_state(layer, name)
            if type(state) is str:
                return state
            _, _, a, b, scale, dropout, magnitude = state
            if type(scale) is not float:
                return f"adapters differ by token and a scaling is {type(scale).__name__}"
            if dropout and magnitude is not None:
                return "adapters differ by token and DoRA drops some of the input"
            own = layer.lora_B._modules[name]._parameters.get("bias")
            found.append(Adapter(slot, a, b, scale, dropout, own, magnitude))
    if not found:
        return _base_output(layer, x, read_codes(layer))
    if any(each.a.dtype is not found[0].a.dtype for each in found):
        return "adapters differ by token and in dtype"
    if reason := input_refusal(layer, x, state):
        return reason
    w, bias, learns = state[0], base_bias(layer.base_layer), torch.is_grad_enabled()
    gains = [_gain(layer, layout.names[each.slot], w, each) for each in found]
    if layout.whole:
        each, joined = found[0], state[1]
        return lora_linear(x, w, each.a, each.b, each.scale, joined, gains[0], each.dropout)
    if not learns and not any(layout.counts[each.slot] for each in found):
        if isinstance(w, QuantisedWeight) or _is_vendors(x) or autocasts(x.device.type):
            return _base_output(layer, x, w)
        found, gains = [], []
    rows = x.reshape(-1, x.shape[-1])
    if autocasts(x.device.type):
        cast = x.dtype if x.dtype is torch.float64 else torch.get_autocast_dtype(x.device.type)
        with without_autocast(x):
            y = _differing(rows.to(cast), w.to(cast), bias, layout, found, gains)
    else:
        y = _differing(rows, w, bias, layout, found, gains)
    return y.view(*x.shape[:-1], y.shape[-1])


def _base_output(layer: Any, x: Tensor, w: Any) -> Tensor:
    """The base's alone; over codes not by its library, which may pack them anew."""
    if isinstance(w, QuantisedWeight):
        return product_of_codes(x, w, base_bias(layer.base_layer))
    y: Tensor = layer.base_layer(x)
    return y


def _gain(layer: Any, name: str, w: Weight, each: Adapter) -> Tensor | None:
    if each.magnitude is None:
        return None
    owner = layer.lora_magnitude_vector._modules[name]
    return cached_gain(owner, w, each.a, each.b, each.scale, each.magnitude)


def _differing(
    x: Tensor, w: Weight, bias: Tensor | None, layout: Layout, found: Sequence[Adapter], gains: Sequence[Tensor | None]
) -> Tensor:
    """y [tokens, out]."""
    factors = [t for each in found for t in (each.a, each.b, each.own_bias)]
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *factors, *gains))
    if any(each.dropout for each in found) or x.dtype is torch.float64 or (learns and any(g is not None for g in gains)):
        return _in_torch(x, w, bias, layout, found, gains)
    if not learns and len(x) <= FEW and _is_vendors(x) and isinstance(w, Tensor):
        return _in_torch(x, w, bias, layout, found, gains)
    if learns:
        slots = tuple((each.slot, each.scale) for each in found)
        y: Tensor
        if isinstance(w, QuantisedWeight):
            y = _AddedRows.apply(product_of_codes(x, w, bias), x, layout, slots, *factors)
        else:
            y = _Rows.apply(x, w, bias, layout, slots, *factors)
        return y
    return _on_kernels(x, w, bias, layout, found, gains)


def _on_kernels(
    x: Tensor, w: Weight, bias: Tensor | None, layout: Layout, found: Sequence[Adapter], gains: Sequence[Tensor | None]
) -> Tensor:
    slots = _slots(len(layout.names), x, w.shape[0], found, gains)
    if not _is_vendors(x) or isinstance(w, QuantisedWeight):
        return multi_lora(x, w, slots, layout.plan, bias)
    y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
    return multi_lora_add_(y, x, slots, layout.plan, bias)


def _is_vendors(x: Tensor) -> bool:
    """Whether the vendor's base product is the faster one."""
    return x.device.type == "cpu" and x.dtype is not torch.float32


def _slots(count: int, x: Tensor, n_out: int, found: Sequence[Adapter], gains: Sequence[Tensor | None]) -> Slots:
    """The adapters side by side in whole pages, for x [tokens, in]; none at all gives the base."""
    ranks, scales, flags = [0] * count, [0.0] * count, [0] * count
    for row, (each, gain) in enumerate(zip(found, gains, strict=True)):
        ranks[each.slot], scales[each.slot] = len(each.a), each.scale
        flags[each.slot] = GAIN * (gain is not None) + BIAS * (each.own_bias is not None) + (row << ROW)
    device = x.device
    table, rank, scale, flag, generation = _tables(tuple(ranks), tuple(scales), tuple(flags), device)
    empty = _no_vectors(n_out, device)
    gain_rows = bias_rows = empty
    if any(gain is not None for gain in gains):
        gain_rows = torch.stack([empty[0] if gain is None else gain.float() for gain in gains])
    if any(each.own_bias is not None for each in found):
        biases = (None if each.own_bias is None else with_lora_bias(None, each.own_bias, each.scale) for each in found)
        bias_rows = torch.stack([empty[0] if bias is None else bias.float() for bias in biases])
    if not found:
        none = x.new_empty(0, x.shape[1]), x.new_empty(0, n_out)
        return Slots(*none, table, rank, scale, flag, empty, empty, generation)
    pads = [-len(each.a) % PAGE for each in found]
    a = torch.cat([F.pad(each.a, (0, 0, 0, pad)) if pad else each.a for each, pad in zip(found, pads, strict=True)])
    b = torch.cat([F.pad(each.b.t(), (0, 0, 0, pad)) if pad else each.b.t() for each, pad in zip(found, pads, strict=True)])
    return Slots(a, b, table, rank, scale, flag, gain_rows, bias_rows, generation)


@lru_cache(maxsize=256)
def _tables(
    ranks: tuple[int, ...], scales: tuple[float, ...], flags: tuple[int, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """table, rank, scale, flags and generation of `Slots`."""
    pages, first = [-(-r // PAGE) for r in ranks], 0
    table = [[0] * max(1, *pages) for _ in ranks]
    for row, count in zip(table, pages, strict=True):
        row[:count] = range(first, first + count)
        first += count
    with torch.inference_mode(False):
        i32: dict[str, Any] = {"dtype": torch.int32, "device": device}
        return (
            torch.tensor(table, **i32), torch.tensor(ranks, **i32),
            torch.tensor(scales, dtype=torch.float32, device=device),
            torch.tensor(flags, **i32), torch.zeros(len(ranks), **i32),
        )  # fmt: skip


@lru_cache(maxsize=64)
def _no_vectors(n_out: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(1, n_out, device=device)


def _in_torch(
    x: Tensor, w: Weight, bias: Tensor | None, layout: Layout, found: Sequence[Adapter], gains: Sequence[Tensor | None]
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor
    if isinstance(w, QuantisedWeight):
        y = product_of_codes(x, w, bias)
    else:
        y = _Rows.apply(x, w, bias, layout, ()) if x.dtype is torch.float32 else F.linear(x, w, bias)
    for each, gain in zip(found, gains, strict=True):
        rows = layout.rows[each.slot]
        wide = torch.promote_types(x.dtype, each.a.dtype)
        xs = x[rows].to(wide)
        xs = F.dropout(xs, each.dropout) if each.dropout else xs
        c = None if each.own_bias is None else each.own_bias.to(wide)
        delta = F.linear(F.linear(xs, each.a.to(wide)), each.b.to(wide), c) * each.scale
        if gain is not None:
            z = y[rows].clone() if bias is None else y[rows] - bias
            delta = (gain - 1) * z + gain * delta
        if type(rows) is slice:
            y[rows].add_(delta)
        else:
            y.index_put_((rows,), (y[rows] + delta).to(y.dtype))
    return y


class _Rows(torch.autograd.Function):
    """Of LoRA. Backward is made of differentiable torch ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, layout: Layout, slots: Any, *factors: Any) -> Tensor:
        ctx.save_for_backward(x, w, *factors)
        ctx.layout, ctx.slots, ctx.bias_dtype = layout, slots, None if bias is None else bias.dtype
        found = _adapters(slots, factors)
        return _on_kernels(x, w, bias, layout, found, [None] * len(found))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with without_autocast(dy):
            dx: Any = dy @ w if needs[0] else None
            dbias = dy.sum(0).to(ctx.bias_dtype) if needs[2] else None
            grads = _gradients(ctx.layout, ctx.slots, dy, x, dx, factors, needs[5:])
        return (dx, None, dbias, None, None, *grads)


class _AddedRows(torch.autograd.Function):
    """The adapters' terms, added to y = W x + bias in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, layout: Layout, slots: Any, *factors: Any) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.layout, ctx.slots = layout, slots
        ctx.mark_dirty(y)
        found = _adapters(slots, factors)
        held = _slots(len(layout.names), x, y.shape[1], found, [None] * len(found))
        return multi_lora_add_(y, x, held, layout.plan)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with without_autocast(dy):
            dx = torch.zeros_like(x) if needs[1] else None
            grads = _gradients(ctx.layout, ctx.slots, dy, x, dx, factors, needs[4:])
        return (dy, dx, None, None, *grads)


def _adapters(slots: Any, factors: Sequence[Any]) -> list[Adapter]:
    return [
        Adapter(slot, a, b, scale, 0.0, c, None)
        for (slot, scale), a, b, c in zip(slots, factors[::3], factors[1::3], factors[2::3], strict=True)
    ]


def _gradients(
    layout: Layout, slots: Any, dy: Tensor, x: Tensor, dx: Tensor | None, factors: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Of the factors; what the adapters have for dx is added to it."""
    grads: list[Tensor | None] = []
    for i, (slot, scale) in enumerate(slots):
        (a, b, c), (of_a, of_b, of_c) = factors[3 * i : 3 * i + 3], needs[3 * i : 3 * i + 3]
        rows, wide = layout.rows[slot], torch.promote_types(x.dtype, a.dtype)
        g, xs = dy[rows].to(wide), x[rows].to(wide)
        p: Any = (g @ b.to(wide)) * scale if dx is not None or of_a else None
        grads.append((p.T @ xs).to(a.dtype) if of_a else None)
        grads.append((g.T @ (xs @ a.to(wide).T * scale)).to(b.dtype) if of_b else None)
        grads.append((g.sum(0) * scale).to(c.dtype) if of_c else None)
        if dx is not None:
            dx[rows] = dx[rows] + (p @ a.to(wide)).to(dx.dtype)
    return grads
