"""What the tests of PEFT's MultiheadAttention share."""

import copy

import peft
import torch
from fuse_helpers import errs_as_stock, randomise
from torch import nn

from lora_kernels import fuse

NAME = "base_model.model.attention"
WIDTH, HEADS, BATCH, QUERIES, KEYS = 12, 2, 3, 5, 7


class Net(nn.Module):
    def __init__(self, width=WIDTH, heads=HEADS, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, **options)

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


def made(dtype=torch.float32, net=None, adapter_dtype=True, values=None, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["attention"]} | (values or {}))
    one = peft.get_peft_model((net or Net(**options)).to(dtype), config, autocast_adapter_dtype=adapter_dtype)
    randomise(one)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if "bias" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return one


def tensors(which="self", dtype=torch.float32, batch_first=False, seed=2, width=WIDTH):
    """(query, key, value): one tensor, two, or three."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens):
        shape = {"unbatched": (tokens, width)}.get(which, (BATCH, tokens, width) if batch_first else (tokens, BATCH, width))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if which in ("self", "unbatched"):
        return (draw(QUERIES),) * 3
    key = draw(KEYS)
    return draw(QUERIES), key, key if which == "cross" else draw(KEYS)


def results(one, qkv, **call):
    """The outputs with gradients and without, and all gradients, for random dy."""
    one.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with torch.no_grad():
        frozen = one(*qkv, **call)
    leaves = {id(t): t.detach().requires_grad_() for t in qkv}
    torch.manual_seed(5)
    outputs = one(*(leaves[id(t)] for t in qkv), **call)
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, t, without in zip(("y", "weights"), outputs, frozen, strict=True):
        assert (t is None) == (without is None)
        if t is not None:
            found |= {name: t, f"frozen {name}": without}
    parts = [
        (found[name] * torch.randn(found[name].shape, generator=generator, dtype=torch.float64).to(found[name].dtype)).sum()
        for name in ("y", "weights")
        if name in found
    ]
    sum(parts).backward()
    found = {name: t.detach() for name, t in found.items()}
    found |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves.values())}
    return found | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}


def doubled(call):
    """The call's masks for a model in float64."""
    return {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in call.items()}


def right(stock, qkv, times=8, **call):
    """A fused copy errs as PEFT does, in outputs, attention weights and all gradients; (copy, its
    report)."""
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    found, theirs = results(fused, qkv, **call), results(stock, qkv, **call)
    assert not report.left and not report.fallbacks() and list(report.fused) == [NAME]
    assert {"y", "frozen y", "input 0"} < found.keys() and sum("lora" in name for name in found) == 4
    if qkv[0].dtype is torch.float64:
        torch.testing.assert_close(found, theirs)
    else:
        doubles = {id(t): t.double() for t in qkv}
        exact = results(copy.deepcopy(stock).double(), [doubles[id(t)] for t in qkv], **doubled(call))
        errs_as_stock(found, theirs, exact, times)
    return fused, report


def masks(kind, dtype=torch.float32, batch=BATCH):
    """(key_padding_mask, attn_mask), of which no query sees nothing."""
    generator = torch.Generator().manual_seed(8)
    padding = torch.rand(batch, QUERIES, generator=generator) < 0.4
    each = torch.rand(batch * HEADS, QUERIES, QUERIES, generator=generator) < 0.4
    padding[:, 0], each[..., 0] = False, False
    if kind == "float":
        added = [torch.randn(m.shape, generator=generator).masked_fill(m, float("-inf")).to(dtype) for m in (padding, each)]
        return tuple(added)
    return padding, each
