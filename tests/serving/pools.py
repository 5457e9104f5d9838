"""A net of two layers, random adapters for it, and a pool with room for a few of their pages."""

import torch
from torch import nn

from lora_kernels.serving import Adapter, AdapterPool, Factors

SIZES = {"0": (24, 40), "2": (40, 16)}  # in, out


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16, bias=False)).requires_grad_(False)


def random_adapter(seed, r=8, modules=("0", "2"), dora=False, size=0.3):
    """An adapter of random numbers."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g) * size  # noqa: E731
    return Adapter({
        name: Factors(draw(r, SIZES[name][0]), draw(SIZES[name][1], r), 0.5 + seed % 3,
                      draw(SIZES[name][1]).abs() + 0.5 if dora else None)
        for name in modules
    })  # fmt: skip


def alone(model, adapter, x):
    """What the model computes with one adapter, in plain torch."""
    for name, layer in model.named_children():
        y = layer(x)
        if adapter is not None and name in adapter.factors:
            f = adapter.factors[name]
            delta = f.scale * f.b @ f.a
            gain = torch.ones(len(f.b)) if f.magnitude is None else f.magnitude / (layer.weight + delta).norm(dim=1)
            y = gain * (x @ (layer.weight + delta).T) + (0 if layer.bias is None else layer.bias)
        x = y
    return x


def pool_of(model, slots=4, pages=4, **options):
    """A pool with room for that many pages in each module."""
    page = sum(8 * 4 * (a + b) for a, b in SIZES.values())
    probe = options.pop("max_rank", 64)
    tables = len(SIZES) * slots * (4 * -(-probe // 8) + 12)
    return AdapterPool(model, capacity_bytes=tables + pages * page, slots=slots, max_rank=probe, **options)


def state(pool):
    """Everything a kernel can read."""
    return [t.clone() for site in pool.sites.values() for t in site.slots.tensors]


def same_state(one, other):
    return all(a.equal(b) for a, b in zip(one, other, strict=True))
