"""NormCache over a QuantisedWeight: what is kept, and what is seen."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.ops import NormCache, weight_norm
from tests.ops.quantised import KINDS, make_quantised

PARTS = ("codes", "scales", "table", "outer", "outer_table", "offset")


def made(kind):
    a, b = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)), torch.randn(48, 4) * 0.1
    return make_quantised(kind, 48, 128), a, b, NormCache()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kept(kind):
    w, a, b, cache = made(kind)
    first = cache(w, a, b, 2.0)
    assert torch.equal(first, weight_norm(w, a, b, 2.0))
    assert cache(w, a, b, 2.0) is first
    magnitude = torch.ones(48)
    assert cache.gain(w, a, b, 2.0, magnitude) is cache.gain(w, a, b, 2.0, magnitude)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_edits_of_every_part_are_seen(kind):
    """Of one element, which the sample of the codes may miss."""
    for part in PARTS:
        w, a, b, cache = made(kind)
        tensor = getattr(w, part)
        if tensor is None:
            continue
        before = cache(w, a, b, 2.0).clone()
        flat = tensor.view(torch.uint8).view(-1) if part == "codes" else tensor.view(-1)
        flat[-1] = flat[-1] ^ 0x35 if flat.dtype is torch.uint8 else flat[-1] + 1
        if part == "outer_table":
            tensor.add_(1)  # one of 256 entries may not be in use
        after = cache(w, a, b, 2.0)
        assert torch.equal(after, weight_norm(w, a, b, 2.0)) and not torch.equal(after, before), part


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_edits_of_factors_and_other_layouts_are_seen(kind):
    w, a, b, cache = made(kind)
    cache(w, a, b, 2.0)
    b.data[3, 1] += 1  # without a new version
    assert torch.equal(cache(w, a, b, 2.0), weight_norm(w, a, b, 2.0))
    w, a, b, cache = made(kind)
    cache(w, a, b, 2.0)
    other = w.to(torch.bfloat16)  # the same tensors
    assert torch.equal(cache(other, a, b, 2.0), weight_norm(other, a, b, 2.0))
    if kind == "int8":
        other = replace(w, codes=w.codes.view(96, 64), shape=(96, 64))
        a, b = a[:, :64].contiguous(), torch.cat([b, b])
        assert torch.equal(cache(other, a, b, 2.0), weight_norm(other, a, b, 2.0))
