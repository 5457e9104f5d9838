"""What the tests of fuse's groups share: a net whose layers read one tensor, and how it is
called."""

import copy

import pytest
import torch
from fuse_helpers import model
from torch import nn

from lora_kernels import explain, fuse
from lora_kernels.integrations.peft import groups

LAYERS = ["q", "k", "v", "o"]
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.4},
    "dora dropout": {"use_dora": True, "lora_dropout": 0.4},
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 40), nn.Linear(24, 16, bias=False), nn.Linear(24, 16)
        self.o = nn.Linear(40, 24)

    def forward(self, x, act=None):
        """`act(self, x)` stands in for what a model does."""
        if act is not None:
            return act(self, x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q + torch.cat([k * v, k, v[:, :8]], 1))


def qkv(one, x):
    return one.q(x), one.k(x), one.v(x)


def pair(dtype=torch.float32, net=Attention, **values):
    """(without groups, with groups), of the same weights."""
    alone = model(dtype, net=net, **{"target_modules": LAYERS} | values)
    grouped = copy.deepcopy(alone)
    fuse(alone, groups=False)
    fuse(grouped)
    return alone, grouped


def learnt(dtype=torch.float32, **values):
    """The same; the second has formed its group."""
    alone, grouped = pair(dtype, **values)
    learn(grouped, dtype)
    return alone, grouped


def learn(one, dtype=torch.float32):
    state = torch.get_rng_state()
    for seed in range(2):
        one(inputs(dtype, seed=seed))
    torch.set_rng_state(state)


def block(one):
    """The module that holds the layers."""
    return one.base_model.model


def siblings(one):
    return block(one).q.__dict__.get(groups.KEY)


def inputs(dtype=torch.float32, rows=5, seed=2):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alone_since(one, call):
    """What was counted in a call."""
    before = siblings(one).alone()
    call()
    return {reason: n - before.get(reason, 0) for reason, n in siblings(one).alone().items() if n != before.get(reason, 0)}


def results(one, x, act=None, seed=4):
    """The output and every gradient."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = one(x, act)
    ys = y if isinstance(y, tuple) else (y,)
    named = {"x": x} | {n: p for n, p in one.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(sum(each.float().square().sum() for each in ys), named.values(), allow_unused=True)
    return {"y": torch.cat([each.detach().float() for each in ys], 1)} | dict(zip(named, grads, strict=True))


def ops(one, *args):
    """The ops of a call, in order."""
    return [d.op for d in explain(one, *args).decisions]
