"""PEFT's embedding with a forward of few passes over [tokens, dim]:

    y = gain ⊙ (base(i) + c · (Aᵀ)[i] Bᵀ),   c = scaling · embed_scale                           (1)

The adapter is added in place to the rows that were gathered. DoRA's norm, over the table [entries,
dim], is taken without forming it, and kept as that of a linear layer is. `lora_dropout` has no
effect on an embedding in PEFT.
"""

from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.integrations.peft.adapters import (
    ON_META,
    active_names,
    call_refusal,
    factors_refusal,
    frozen_refusal,
    layer_refusal,
    on_meta,
)
from lora_kernels.integrations.peft.devices import device_refusal
from lora_kernels.integrations.peft.hooks import has_hooks
from lora_kernels.integrations.peft.linear import cached_gain, count_fallback
from lora_kernels.integrations.peft.state import PLAIN, type_name
from lora_kernels.integrations.report import Survey
from lora_kernels.ops.scale import traced_scale

try:
    from peft.tuners.lora import variants
    from peft.tuners.lora.dora import DoraEmbeddingLayer
    from peft.tuners.lora.layer import Embedding
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error

# MiCA differs from LoRA only in what it initialises and trains
_COMPUTED_AS_LORA = tuple(v for v in (getattr(variants, "MiCAEmbeddingVariant", None),) if v is not None)
_INDICES = (torch.int64, torch.int32)


class FusedEmbedding(Embedding):
    """peft.tuners.lora.layer.Embedding; a call that formula (1) covers runs there, any other in
    PEFT's own forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: Any = "the call has arguments besides the input" if args or kwargs else read_embedding(self)
        reason = state if type(state) is str else call_refusal(x) or _indices_refusal(x)
        if reason is None:
            return _adapted(self, x, state)
        count_fallback(self, reason)
        return super().forward(x, *args, **kwargs)


class EmbeddingState(NamedTuple):
    """What a call computes with."""

    base: Any
    terms: list[tuple[Tensor, Tensor, Any]]
    """(A [r, entries], B [dim, r], scaling) of each active adapter."""
    magnitude: Tensor | None


def read_embedding(layer: Any) -> EmbeddingState | str:
    """What the layer's next call computes with, or why PEFT must run it."""
    if refusal := layer_refusal(layer):
        return refusal
    children: dict[str, Any] = layer._modules
    base, all_a, all_b = children["base_layer"], children["lora_embedding_A"], children["lora_embedding_B"]
    if not isinstance(base, nn.Embedding):
        return f"base_layer is {type_name(base)}"
    if base.max_norm is not None or base.sparse:
        return f"base_layer has {'sparse gradients' if base.sparse else 'max_norm, by which a call changes its weights'}"
    if type(base._parameters.get("weight")) not in PLAIN:
        return f"the base weight is {type_name(base._parameters.get('weight'))}"
    if layer.__dict__.get("input_fns"):
        return "the embedding is sharded by tensor parallelism"
    names = active_names(layer, all_a._parameters)
    if not names:
        return "no active adapter has weights here"
    terms, magnitude = [], None
    for name in names:
        a, b = all_a._parameters[name], all_b._parameters[name]
        if refusal := factors_refusal(a, b):
            return refusal
        terms.append((a, b, layer.scaling[name]))
        variant = layer.lora_variant.get(name)
        if variant is None or type(variant) in _COMPUTED_AS_LORA:
            continue
        dora = children["lora_magnitude_vector"]._modules.get(name)
        covered = type(variant) is variants.DoraEmbeddingVariant and type(dora) is DoraEmbeddingLayer
        if not covered or has_hooks(dora):
            return f"{type_name(variant)} is not covered"
        if len(names) > 1:
            return "several adapters are active, one of them DoRA"
        magnitude = dora._parameters["weight"]
        if type(magnitude) not in PLAIN:
            return f"lora_magnitude_vector is {type_name(magnitude)}"
        if refusal := frozen_refusal(base._parameters.get("weight")):
            return refusal
    return EmbeddingState(base, terms, magnitude)


def _indices_refusal(x: Tensor) -> str | None:
    return None if x.dtype in _INDICES and x.layout is torch.strided else f"the indices are {x.dtype} and {x.layout}"


def _adapted(layer: Any, x: Tensor, state: EmbeddingState) -> Tensor:
    base, terms, magnitude = state
    w, indices = base.weight, x.reshape(-1)
    # a tensor that nobody else can hold may be added to in place
    fresh = type(base) is nn.Embedding and not w.requires_grad and not has_hooks(base)
    y = torch.embedding(w, indices) if fresh else base(x).reshape(indices.shape[0], -1)
    dtype, embed_scale = y.dtype, layer._get_embed_scale() if hasattr(base, "embed_scale") else None
    gain = None
    if magnitude is not None:
        gain = cached_gain(layer, w.t(), *terms[0], magnitude)
        alone = fresh and gain.dtype is dtype and not torch.is_grad_enabled()
        y, fresh = y.mul_(gain) if alone else y * gain, True
    for a, b, scale in terms:
        rows = _columns(base, a, indices)  # [r, tokens]
        if embed_scale is not None:
            rows = rows * embed_scale.to(rows.dtype)
        scale = traced_scale(scale)
        if isinstance(scale, Tensor):
            rows, scale = rows * scale, 1.0
        b = b if gain is None else b * gain[:, None]
        wide = torch.promote_types(torch.promote_types(y.dtype, rows.dtype), b.dtype)
        if y.dtype is not wide:
            y = y.to(wide)
        elif not fresh:
            y = y.clone()
        # in place, autocast does not act on it
        y, fresh = y.addmm_(rows.to(wide).t(), b.to(wide).t(), alpha=scale), True
    return y.to(dtype).view(*x.shape, y.shape[1])


def _columns(base: nn.Embedding, a: Tensor, indices: Tensor) -> Tensor:
    """A's columns at the indices, [r, tokens]; the gradient is that of an embedding with the base's
    options."""
    if a.device.type != "cpu" or base.scale_grad_by_freq:
        # on a GPU its backward, unlike that of index_select, sums in a fixed order
        return F.embedding(indices, a.t(), base.padding_idx, None, 2.0, base.scale_grad_by_freq).t()
    # such a gradient is contiguous, that of the transposed table is copied
    rows = a.index_select(1, indices)
    if base.padding_idx is None:
        return rows
    return torch.where(indices == base.padding_idx, rows.detach(), rows)


def survey_embedding(name: str, layer: Any, survey: Survey) -> None:
    """Adds to the survey what the layer's next call would do if it were fused."""
    state = read_embedding(layer)
    if isinstance(state, str):
        survey.left[name] = state
    elif on_meta(t for a, b, _ in state.terms for t in (a, b, state.magnitude)):
        survey.left[name] = ON_META
    elif reason := device_refusal(state.base.weight):
        survey.left[name] = reason
    else:
        survey.fused[name] = "torch"
