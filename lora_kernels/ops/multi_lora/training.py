"""The formula as a loop over adapters, each of them one differentiable `lora_linear` of its own
tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.ops.lora_linear.op import lora_linear
from lora_kernels.ops.multi_lora.plan import BIAS, GAIN, ROW, BatchPlan, Slots, members_of, rows_of


def trained(x: Tensor, w: Tensor, slots: Sequence[Slots], plan: BatchPlan, bias: Tensor | None) -> Tensor:
    """y [tokens, out]. What an adapter computes, and its gradients, have the bits that they have
    alone: the same call, on the same rows. With one adapter of weight 1 a token that is all; else
    what each adds to the base is summed, weighted."""
    slices, first = [], 0
    for s in slots:
        last = first + s.b.shape[1]
        of_w, of_bias = w[first:last], None if bias is None else bias[first:last]
        slices.append(_of_site(x, of_w, s, plan, of_bias))
        first = last
    return slices[0] if len(slices) == 1 else torch.cat(slices, 1)


def _of_site(x, w, s, plan, bias):
    alone = plan.ids.shape[1] == 1 and plan.weights is None
    members = list(members_of(s, plan.ids, plan.weights, plan.error))
    if alone:
        rest = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for rows, *_ in members:
            rest[rows] = False
        rest = rest.nonzero()[:, 0]
        pieces = [_adapted(x[rows], w, s, slot, bias) for rows, slot, _ in members] + [_base_product(x[rest], w, bias)]
        return torch.cat(pieces)[torch.cat([*(rows for rows, *_ in members), rest]).argsort()]
    base = _base_product(x, w, None)
    y = base
    for rows, slot, v in members:
        delta = _adapted(x[rows], w, s, slot, None) - base[rows]
        y = y.index_add(0, rows, delta if v is None else v[:, None].to(delta.dtype) * delta)
    return y if bias is None else y + bias.to(y.dtype)


def _base_product(x, w, bias):
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _adapted(x, w, s, slot, bias):
    rows, flags = rows_of(s, slot), int(s.flags[slot])
    gain = s.gain[flags >> ROW] if flags & GAIN else None
    if not len(rows):
        y = (
            _base_product(x, w, bias)
            if gain is None
            else _base_product(x, w, None) * gain.to(x.dtype) + (0 if bias is None else bias)
        )
    else:
        y = lora_linear(x, w, s.a[rows], s.b[rows].T, float(s.scale[slot]), bias, gain)
    return y + s.bias[flags >> ROW].to(y.dtype) if flags & BIAS else y
