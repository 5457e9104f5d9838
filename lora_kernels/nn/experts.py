"""The forward of a mixture of experts whose matrices have adapters:

    y[t] = Σ_j weights[t, j] · down[e](act(up[e](x[t]))),  e = index[t, j]                       (1)

up[e] and down[e] are `expert_lora_linear`, so no W + scale · BA is formed. The choices (t, j) are
sorted by expert once, and up[e] reads x through their tokens. Their sums over j are taken in the
wider of the dtypes of y and weights, in order; backward those of dx in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.nn.forms import Form, gate_of
from lora_kernels.ops.derivatives import transformed
from lora_kernels.ops.expert_lora_linear import expert_lora_linear
from lora_kernels.ops.gated_activation import gated_activation
from lora_kernels.ops.lora_linear.op import autocasts, without_autocast
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.registry import ON_GPU, forced_backend

_ELEMENTS_AT_ONCE = 1 << 18  # a megabyte in float32


class Adapted(NamedTuple):
    """A parameter [experts, out, in], or as `Form.transposed` has it, and its adapter."""

    w: Tensor | QuantisedWeight
    a: Tensor | None
    """[experts, r, in]; None without an active adapter."""
    b: Tensor | None
    """[experts, out, r]"""
    scale: float
    bias: Tensor | None
    """[experts, out]"""
    gain: Tensor | None = None
    """[experts, out], of DoRA."""


class Routing(NamedTuple):
    """Which choices each expert has; S = tokens · k choices, sorted by expert."""

    ends: Tensor
    """[experts], the end of each expert's rows; those after the last are of no expert."""
    choices: Tensor
    """[S], the choice t · k + j of each row."""
    tokens: Tensor
    """[S], the token of each row."""
    places: Tensor
    """[tokens, k], the row of each choice."""


Change = Callable[[int, Tensor, Tensor, Routing], None]
"""Gets the number of a product, y and the x that it is of, and may change y in place."""


def sort_choices(index: Tensor, experts: int) -> Routing:
    """Sorts index [tokens, k] by expert; what is no expert's comes last, as the sentinels of expert
    parallelism do."""
    ids, choices = torch.sort(index.reshape(-1), stable=True)
    ends = torch.searchsorted(ids, torch.arange(1, experts + 1, device=ids.device, dtype=ids.dtype))
    places = torch.empty_like(choices)
    places[choices] = torch.arange(choices.shape[0], device=ids.device)
    tokens = torch.div(choices, max(index.shape[1], 1), rounding_mode="floor")
    return Routing(ends, choices, tokens, places.view(index.shape))


class _Combine(torch.autograd.Function):
    """The choices' rows y [S, out] to Σ_j weights[t, j] · y[places[t, j]], [tokens, out]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, choices: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights, choices, tokens, places)
        ctx.like = y.shape, y.dtype
        wide = torch.promote_types(y.dtype, weights.dtype)
        if y.dtype is wide:
            return _bags(y, places, weights.to(wide))
        out = y.new_empty(places.shape[0], y.shape[1], dtype=wide)
        for part in _parts(len(out), places.shape[1], y):
            rows = y.index_select(0, places[part].reshape(-1)).to(wide)
            out[part] = torch.bmm(weights[part, None].to(wide), rows.view(*places[part].shape, y.shape[1]))[:, 0]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        y, weights, choices, tokens, places = ctx.saved_tensors
        of_rows = weights.reshape(-1).index_select(0, choices)[:, None]  # [S, 1]
        (shape, dtype), dweights = ctx.like, []
        dy = dout.new_empty(shape, dtype=dtype) if ctx.needs_input_grad[0] else None
        for part in _parts(len(choices), 1, dout):
            rows = dout.index_select(0, tokens[part])
            if dy is not None:
                dy[part] = rows * of_rows[part]
            if ctx.needs_input_grad[1]:
                dweights.append((rows * y[part]).sum(-1))
        found = torch.cat(dweights).index_select(0, places.reshape(-1)).view(places.shape) if dweights else None
        return dy, None if found is None else found.to(weights.dtype), None, None, None


def _parts(count: int, k: int, y: Tensor) -> list[slice]:
    """Slices of `count` things of k rows each, so that what is formed of one stays in the
    caches."""
    at_once = max(_ELEMENTS_AT_ONCE // max(y.shape[1] * k, 1), 1)
    if torch.compiler.is_compiling() or not y.is_cpu or count <= at_once:
        return [slice(None)]
    return [slice(first, first + at_once) for first in range(0, count, at_once)]


def _bags(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Σ_j weights[t, j] · rows[places[t, j]], [tokens, features]."""
    if rows.shape[0] == 0:
        return rows.new_zeros(places.shape[0], rows.shape[1])
    return F.embedding_bag(places, rows.contiguous(), mode="sum", per_sample_weights=weights)


def combine_choices(y: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Σ_j weights[t, j] · y[routing.places[t, j]], [tokens, out], in the wider of both dtypes."""
    if transformed():
        # torch.func and forward mode want torch's own ops
        wide, places = torch.promote_types(y.dtype, weights.dtype), routing.places
        rows = y.to(wide).index_select(0, places.reshape(-1)).view(*places.shape, y.shape[1])
        return (weights.to(wide)[..., None] * rows).sum(1)
    return _Combine.apply(y, weights, routing.choices, routing.tokens, routing.places)


def run_routed(
    module: Any, form: Form, adapted: list[Adapted], x: Tensor, index: Tensor, weights: Tensor, change: Change | None = None
) -> Tensor:
    """Formula (1) of a module of transformers: x [tokens, in], index and weights [tokens, k]."""
    routing = sort_choices(index, adapted[0].w.shape[0])
    h = _product(form, adapted[0], x, routing.ends, routing.tokens)
    if change is not None:
        change(0, h, x.index_select(0, routing.tokens).to(h.dtype), routing)
    h = _gated(module, h)
    y = _product(form, adapted[1], h, routing.ends)
    if change is not None:
        change(1, y, h, routing)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    return combine_choices(y, weights, routing).to(x.dtype)


def run_with_identities(module: Any, form: Form, adapted: list[Adapted], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same of LongCat, whose choices beyond the experts are the token itself."""
    of_tokens = (weights * (index >= adapted[0].w.shape[0])).sum(1, keepdim=True)
    return run_routed(module, form, adapted, x, index, weights) + (x * of_tokens).to(x.dtype)


def _gated(module: Any, rows: Tensor) -> Tensor:
    # the loops of some models know a gate alone, and have no such attribute
    if not getattr(module, "has_gate", True):
        return module.act_fn(rows)
    # a compiler does not trace the question for the backend
    simulated = not torch.compiler.is_compiling() and forced_backend() in ON_GPU
    if rows.is_cpu and not simulated and (kind := gate_of(module)) is not None:
        return gated_activation(rows, kind == "gelu_tanh")
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(rows)
    gate, up = rows.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def run_sorted(module: Any, form: Form, adapted: list[Adapted], x: Tensor) -> Tensor:
    """Of Llama 4, which gives every expert all tokens, weighted before: x [experts · tokens,
    in]."""
    experts = adapted[0].w.shape[0]
    rows = x.reshape(-1, module.hidden_size)
    ends = torch.arange(1, experts + 1, device=x.device) * (rows.shape[0] // experts)
    h = _gated(module, _product(form, adapted[0], rows, ends))
    return _product(form, adapted[1], h, ends).view(-1, module.hidden_size)


def run_split(form: Form, adapted: Adapted, x: Tensor, sizes: list[int]) -> Tensor:
    """One product of JetMoE, whose tokens come sorted by expert: x [tokens, in], and how many each
    expert has."""
    return _product(form, adapted, x, torch.tensor(sizes, device=x.device).cumsum(0))


def multiplies(form: Form, w: Any, x: Tensor) -> bool:
    """Whether the module, whose weights have the dtype of w, takes an x of its dtype."""
    if x.dtype is w.dtype or form.casts:
        return True
    return torch.float64 not in (x.dtype, w.dtype) and autocasts(x.device.type)


def product_dtype(form: Form, w: Tensor | QuantisedWeight, x: Tensor) -> torch.dtype:
    """The dtype in which the module multiplies."""
    if form.casts or x.dtype is torch.float64 or not autocasts(x.device.type):
        return w.dtype
    return torch.get_autocast_dtype(x.device.type)


def _product(form: Form, adapted: Adapted, x: Tensor, ends: Tensor, index: Tensor | None = None) -> Tensor:
    dtype = product_dtype(form, adapted.w, x)
    with without_autocast(x):
        (w, a, b, scale, bias, gain), ends = _in_dtype(adapted, ends, dtype)
        return expert_lora_linear(x.to(dtype), ends, w, a, b, scale, bias, gain, form.transposed, index)


def _in_dtype(adapted: Adapted, ends: Tensor, dtype: torch.dtype) -> tuple[Adapted, Tensor]:
    """W in a dtype, as autocast wants it. On a CPU that is a copy of the experts with tokens alone,
    which are then all there are."""
    w = adapted.w
    if w.dtype is dtype or not isinstance(w, Tensor) or not w.is_cpu or torch.compiler.is_compiling() or transformed():
        return adapted._replace(w=w.to(dtype)), ends
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    found = (ends > starts).nonzero()[:, 0]
    if len(found) == len(ends):
        return adapted._replace(w=w.to(dtype)), ends
    found = found if len(found) else ends.new_zeros(1, dtype=torch.int64)
    of_found = w.new_empty(len(found), *w.shape[1:], dtype=dtype)
    for out, e in zip(of_found, found.tolist(), strict=True):
        out.copy_(w[e])
    _, a, b, scale, bias, gain = adapted
    a, b, bias, gain = (None if t is None else t.index_select(0, found) for t in (a, b, bias, gain))
    return Adapted(of_found, a, b, scale, bias, gain), ends[found]
