"""PEFT's MultiheadAttention, which adds its adapters to the weights of torch's in each call and
takes them off again. Here the projections take them beside W, and W stays:

    [q k v] = x Wᵀ + s · x Aᵀ Bᵀ + bias,     y = o W'ᵀ + t · s' · o A'ᵀ B'ᵀ + bias'              (1)

Between the two is torch's attention. t is how often the installed PEFT adds the adapter of
out_proj, 2 in its 0.21, of which one has gradients. Neither lora_dropout nor the bias of in_proj's
lora_B takes part; that of out_proj's has no gradient.
"""

from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_kernels.integrations.peft.adapters import (
    ON_META,
    active_names,
    call_refusal,
    factors_refusal,
    frozen_refusal,
    layer_refusal,
)
from lora_kernels.integrations.peft.bias import with_lora_bias
from lora_kernels.integrations.peft.devices import device_refusal
from lora_kernels.integrations.peft.hooks import has_hooks
from lora_kernels.integrations.peft.linear import count_fallback
from lora_kernels.integrations.peft.state import PLAIN, type_name
from lora_kernels.integrations.report import Survey
from lora_kernels.ops import lora_linear
from lora_kernels.ops.lora_linear.op import autocasts

try:
    from peft.tuners.lora.layer import Linear, MultiheadAttention
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error

_HALF = (torch.bfloat16, torch.float16)
_INNER = (nn.Linear, NonDynamicallyQuantizableLinear)


class FusedMultiheadAttention(MultiheadAttention):
    """peft.tuners.lora.layer.MultiheadAttention; a call that formula (1) covers runs there, any
    other in PEFT's own forward."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = _run(self, query, args, kwargs)
        return super().forward(query, *args, **kwargs) if type(found) is not tuple else found


class Projection(NamedTuple):
    """What one of the two products of formula (1) computes with."""

    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: Any


class AttentionState(NamedTuple):
    """What a call computes with."""

    base: Any
    inward: Projection
    outward: Projection


class Call(NamedTuple):
    """The arguments of nn.MultiheadAttention."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


def read_attention(layer: Any) -> AttentionState | str:
    """What the layer's next call computes with, or why PEFT must run it."""
    if refusal := layer_refusal(layer):
        return refusal
    base: Any = layer._modules["base_layer"]
    if type(base) is not nn.MultiheadAttention or has_hooks(base):
        return f"base_layer is {type_name(base)}, or a hook waits for its call"
    out: Any = base._modules["out_proj"]
    if not issubclass(type(out), Linear) or type(out._modules["base_layer"]) not in _INNER:
        return f"out_proj is {type_name(out)}"
    if out._disable_adapters or out.merged_adapters or out.active_adapters != layer.active_adapters:
        return "the adapters of out_proj are in another state than the layer's"
    names = active_names(layer, layer._modules["lora_A"]._modules)
    if not names:
        return "no active adapter has weights here"
    if len(names) > 1:
        return "several adapters are active, of which PEFT's MultiheadAttention trains the last alone"
    name, inner = names[0], out._modules["base_layer"]
    inward = _read_projection(layer, name, base._parameters.get("in_proj_weight"), base._parameters["in_proj_bias"])
    if isinstance(inward, str):
        return inward
    outward = _read_projection(out, name, inner._parameters.get("weight"), inner._parameters["bias"])
    if isinstance(outward, str):
        return outward
    if inward.w.dtype is not outward.w.dtype:
        return f"the base weights are {inward.w.dtype} and {outward.w.dtype}"
    own = out._modules["lora_B"]._modules[name]._parameters["bias"]
    if own is not None:
        if outward.bias is None or type(own) not in PLAIN:
            return "lora_bias of out_proj beside no bias of its base"
        outward = outward._replace(bias=with_lora_bias(outward.bias, own.detach(), outward.scale))
    return AttentionState(base, inward, outward)


def _read_projection(layer: Any, name: str, w: Any, bias: Any) -> Projection | str:
    lora_a, lora_b = layer._modules["lora_A"]._modules[name], layer._modules["lora_B"]._modules[name]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"lora_A and lora_B are {type_name(lora_a)} and {type_name(lora_b)}"
    if (variant := layer.lora_variant.get(name)) is not None:
        return f"{type_name(variant)} is not covered in MultiheadAttention"
    a: Any = lora_a._parameters.get("weight")
    b: Any = lora_b._parameters.get("weight")
    if refusal := factors_refusal(a, b) or frozen_refusal(w):
        return refusal
    if bias is not None and type(bias) not in PLAIN:
        return f"the bias of a projection is {type_name(bias)}"
    return ON_META if a.is_meta or b.is_meta else Projection(w, bias, a, b, layer.scaling[name])


def _run(layer: Any, query: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(output, attention weights or None), or None where PEFT's own forward must run; the reason is
    counted."""
    call = _named_arguments(query, args, kwargs)
    state: Any = call if isinstance(call, str) else read_attention(layer)
    terms: Any = state if isinstance(state, str) else out_proj_terms()
    reason = terms if isinstance(terms, str) else _call_refusal(call, state)
    if reason is not None:
        count_fallback(layer, reason)
        return None
    y, weights = _attend(call, state, terms)
    dtype = query.dtype
    return y.to(dtype), None if weights is None else weights.to(dtype)


def _named_arguments(query: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call, or why its arguments are PEFT's to refuse."""
    given = dict(zip(Call._fields, (query, *args), strict=False))
    known = len(args) < len(Call._fields) and all(name in Call._fields and name not in given for name in kwargs)
    given.update(kwargs)
    return Call(**given) if known and "key" in given and "value" in given else "the arguments are not those of attention"


def _call_refusal(call: Call, state: AttentionState) -> str | None:
    query, key, value = call.query, call.key, call.value
    for x in (query, key, value):
        if reason := call_refusal(x):
            return reason
        if x.is_nested or x.layout is not torch.strided:
            return "query, key or value is nested or sparse"
    base, w = state.base, state.inward.w
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    batch = () if query.dim() == 2 else (0 if base.batch_first else 1,)
    fits = (
        query.dim() in (2, 3)
        and key.dim() == query.dim()
        and shapes[1] == shapes[2]
        and query.shape[-1] == key.shape[-1] == w.shape[1]
        and all(query.shape[i] == key.shape[i] for i in batch)
    )
    if not fits:
        return f"query, key and value are {', '.join(map(str, shapes))}"
    dtype = query.dtype
    if not (dtype is key.dtype is value.dtype):
        return f"query, key and value are {dtype}, {key.dtype} and {value.dtype}"
    casts = autocasts(query.device.type) and torch.float64 not in (dtype, w.dtype)
    if dtype is not w.dtype and not casts:
        return f"the input is {dtype}, the base weight {w.dtype}"
    return _mask_refusal(call, base)


def _mask_refusal(call: Call, base: Any) -> str | None:
    padding, mask, dtype = call.key_padding_mask, call.attn_mask, call.query.dtype
    for each in (padding, mask):
        if each is not None and (type(each) not in PLAIN or each.dtype not in (torch.bool, dtype)):
            return f"a mask is {each.dtype if isinstance(each, Tensor) else type_name(each)}"
    if padding is not None and mask is not None and padding.dtype is not mask.dtype:
        return f"the masks are {padding.dtype} and {mask.dtype}"
    if call.is_causal and mask is None:
        return "is_causal without attn_mask"
    _, queries, keys, batch = _sizes(call, base)
    if padding is not None and tuple(padding.shape) != ((batch, keys) if call.query.dim() == 3 else (keys,)):
        return f"key_padding_mask is {tuple(padding.shape)}"
    if mask is not None and tuple(mask.shape) not in ((queries, keys), (batch * base.num_heads, queries, keys)):
        return f"attn_mask is {tuple(mask.shape)}"
    return None


def _sizes(call: Call, base: Any) -> tuple[bool, int, int, int]:
    """Whether the batch comes first, and the numbers of queries, keys and sequences."""
    if call.query.dim() == 2:
        return True, call.query.shape[0], call.key.shape[0], 1
    first = base.batch_first
    return first, call.query.shape[int(first)], call.key.shape[int(first)], call.query.shape[1 - int(first)]


def _attend(call: Call, state: AttentionState, terms: tuple[float, float]) -> tuple[Tensor, Tensor | None]:
    """Formula (1) and what torch computes between its two halves."""
    base = state.base
    first, queries, keys, batch = _sizes(call, base)
    q, k, v = (_heads(each, base.num_heads, first) for each in _projected(call, state.inward))
    causal = call.is_causal and call.key_padding_mask is None and not call.need_weights
    mask = None if causal else _mask(call, (batch, base.num_heads, queries, keys))
    if base.bias_k is not None:
        k, v, mask = _with_key(k, base.bias_k), _with_key(v, base.bias_v), _padded(mask)
    if base.add_zero_attn:
        k, v, mask = _with_key(k, None), _with_key(v, None), _padded(mask)
    dropout = base.dropout if base.training else 0.0
    weights = None
    if call.need_weights:
        o, weights = _weighted(q, k, v, mask, dropout)
        weights = _averaged(weights) if call.average_attn_weights else weights
    elif _scores_are_kept(call, base, q):
        o, _ = _weighted(q, k, v, mask, dropout)
    else:
        o = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    o = o.permute(0, 2, 1, 3) if first else o.permute(2, 0, 1, 3)
    y = _out(o.flatten(2), state.outward, terms)
    if call.query.dim() == 2:
        return y[0], None if weights is None else weights[0]
    return y, weights


def _projected(call: Call, inward: Projection) -> list[Tensor]:
    """q, k and v, [..., E] each, of one call of `lora_linear` for each input that differs."""
    query, key, value = call.query, call.key, call.value
    if query is key is value:
        inputs = [(query, 3)]
    else:
        inputs = [(query, 1), (key, 2)] if key is value else [(query, 1), (key, 1), (value, 1)]
    w, bias, a, b, scale = inward
    width = w.shape[1]
    rows = [count * width for _, count in inputs]
    biases = [None] * len(rows) if bias is None else bias.split(rows)
    found: list[Tensor] = []
    for (x, _), w_rows, b_rows, bias_rows in zip(inputs, w.split(rows), b.split(rows), biases, strict=True):
        found.extend(lora_linear(x, w_rows, a, b_rows, scale, bias_rows).split(width, -1))
    return found


def _out(o: Tensor, outward: Projection, terms: tuple[float, float]) -> Tensor:
    w, bias, a, b, scale = outward
    times, trained = terms
    if times != trained and torch.is_grad_enabled():
        # their values, and a share of their gradients
        a, b = (torch.lerp(each.detach(), each, trained / times) if trained else each.detach() for each in (a, b))
    return lora_linear(o, w, a, b, scale * times, bias)


def _heads(y: Tensor, heads: int, first: bool) -> Tensor:
    """[N, L, E], or [L, N, E], as [N, heads, L, E / heads]."""
    y = y.unflatten(-1, (heads, y.shape[-1] // heads))
    if y.dim() == 3:
        y = y[None]
    return y.permute(0, 2, 1, 3) if first else y.permute(1, 2, 0, 3)


def _with_key(k: Tensor, bias: Tensor | None) -> Tensor:
    """k [N, heads, S, D] with one more key: a bias [1, 1, E], or zeros."""
    n, heads, _, width = k.shape
    last = k.new_zeros(n, heads, 1, width) if bias is None else bias.view(1, heads, 1, width).expand(n, -1, -1, -1)
    return torch.cat([k, last], 2)


def _padded(mask: Tensor | None) -> Tensor | None:
    """The mask where one more key is seen by all."""
    return None if mask is None else F.pad(mask, (0, 1))


def _mask(call: Call, sizes: tuple[int, int, int, int]) -> Tensor | None:
    """What is added to the scores, broadcast to [N, heads, L, S]."""
    batch, heads, queries, keys = sizes
    padding, mask = (_added(each, call.query.dtype) for each in (call.key_padding_mask, call.attn_mask))
    if mask is not None:
        mask = mask[None, None] if mask.dim() == 2 else mask.view(batch, heads, queries, keys)
    if padding is None:
        return mask
    padding = padding.view(batch, 1, 1, keys)
    return padding if mask is None else mask + padding


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """(the values' sums [N, heads, L, D], their weights [N, heads, L, S])."""
    n, heads, queries, width = q.shape
    keys = k.shape[2]
    q, k_t = (q * width**-0.5).flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
    if mask is None:
        scores = torch.bmm(q, k_t)
    else:
        mask = mask[0] if mask.shape[:2] == (1, 1) else mask.expand(n, heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(mask, q, k_t)
    in_place = not (scores.requires_grad or autocasts(q.device.type))
    weights = torch.softmax(scores, -1, out=scores) if in_place else scores.softmax(-1)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    o = torch.bmm(weights, v.flatten(0, 1))
    return o.view(n, heads, queries, width), weights.view(n, heads, queries, keys)


def _averaged(weights: Tensor) -> Tensor:
    """The mean over the heads; torch's of 16 bits makes a float32 copy of the weights first."""
    if weights.requires_grad or weights.dtype not in _HALF:
        return weights.mean(dim=1)
    return weights.sum(dim=1).div_(weights.shape[1])


def _scores_are_kept(call: Call, base: Any, q: Tensor) -> bool:
    """Whether torch would compute [N, heads, L, S] for such a call, in its own kernel. Of 16 bits
    on a CPU that is several times as fast as `scaled_dot_product_attention`."""
    return (
        q.dtype in _HALF
        and q.is_cpu
        and not (q.requires_grad or base.training)
        and base.batch_first
        and call.query is call.key is call.value
        and base.num_heads % 2 == 0
        and base.in_proj_bias is not None
        and base.bias_k is None
        and not base.add_zero_attn
        and all(mask is None or mask.dtype is torch.bool for mask in (call.attn_mask, call.key_padding_mask))
        and torch.backends.mha.get_fastpath_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


_terms: tuple[float, float] | None = None


def out_proj_terms() -> Any:
    """(how often the installed PEFT adds out_proj's adapter, how many of these have gradients), or
    why that is not known."""
    global _terms
    if _terms is None:
        if torch.compiler.is_compiling():
            return "the first call of a MultiheadAttention is compiled, before fuse"
        _terms = _ask_peft()
    return _terms


def _ask_peft() -> tuple[float, float]:
    """Of a layer whose only numbers are out_proj's factors, 1, and its input, 1."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        config = peft.LoraConfig(r=1, lora_alpha=1)
        layer: Any = MultiheadAttention(nn.MultiheadAttention(1, 1), "default", config=config, r=1, lora_alpha=1)
        out: Any = layer.base_layer.out_proj
        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()
            layer.base_layer.in_proj_bias[2] = 1.0
            out.lora_A["default"].weight.fill_(1.0)
            out.lora_B["default"].weight.fill_(1.0)
        x = torch.zeros(1, 1)
        y = layer(x, x, x)[0].sum()
        (da,) = torch.autograd.grad(y, out.lora_A["default"].weight, allow_unused=True)
        return y.item(), 0.0 if da is None else da.item()


def survey_attention(name: str, layer: Any, survey: Survey) -> None:
    """Adds to the survey what the layer's next call would do if it were fused."""
    state: Any = read_attention(layer)
    reason = state if isinstance(state, str) else device_refusal(state.inward.w)
    if reason is None and isinstance(terms := out_proj_terms(), str):
        reason = terms
    if reason is not None:
        survey.left[name] = reason
    else:
        w, bias, a, b, scale = state.inward
        survey.add_layer(name, w, bias, a, b, scale, 0.0, False)
