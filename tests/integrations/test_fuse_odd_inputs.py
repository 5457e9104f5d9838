"""Where stock PEFT computes, a fused model does, too, and the same: derivatives of every kind,
inputs of every layout, whatever watches the call."""

import copy

import pytest
import torch
from fuse_helpers import inputs, model
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import fuse

pytestmark = pytest.mark.filterwarnings("ignore:.*(prototype|beta state|TracerWarning|torch.jit)")


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def leaf():
    return inputs().requires_grad_()


def learnt(one):
    return [p for p in one.parameters() if p.requires_grad]


def dual(one):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(one(forward_ad.make_dual(inputs(), inputs().cos()))).tangent


def twice(one):
    x = leaf()
    (g,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)[0]


def thrice(one):
    x = leaf()
    (g,) = torch.autograd.grad(one(x).pow(3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    return torch.autograd.grad(h.sum(), x)[0]


def hypergradient(one):
    """A step inside a step, as MAML takes it."""
    names = [n for n, p in one.named_parameters() if p.requires_grad]
    values = [p for p in one.parameters() if p.requires_grad]
    if not values:
        return one(inputs())
    gs = torch.autograd.grad(one(inputs()).square().mean(), values, create_graph=True)
    moved = {n: p - 0.1 * g for n, p, g in zip(names, values, gs, strict=True)}
    loss = torch.func.functional_call(one, moved, (inputs().flip(0),)).square().mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, values)])


def vectorized(one):
    return torch.autograd.functional.jacobian(lambda v: one(v).sum(0), inputs(), vectorize=True)


def nested(layout):
    def call(one):
        y = one(torch.nested.nested_tensor([inputs()[:2], inputs()[2:]], layout=layout))
        return torch.cat(list(y.unbind()))

    return call


def watched(manager):
    def call(one):
        with manager():
            return one(inputs())

    return call


ASKED = {
    "dual input": dual,
    "jvp": lambda one: torch.func.jvp(one, (inputs(),), (inputs().cos(),))[1],
    "vmap": lambda one: torch.func.vmap(one)(inputs()),
    "grad": lambda one: torch.func.grad(lambda v: one(v).square().sum())(inputs()),
    "torch.func.hessian": lambda one: torch.func.hessian(lambda v: one(v).square().sum())(inputs()[:1]),
    "hessian": lambda one: torch.autograd.functional.hessian(lambda v: one(v).square().sum(), inputs()[:1]),
    "vectorized jacobian": vectorized,
    "double backward": twice,
    "third derivative": thrice,
    "hypergradient": hypergradient,
    "nested": nested(torch.strided),
    "jagged": nested(torch.jagged),
    "coo": lambda one: one(inputs().to_sparse()),
    "csr": lambda one: one(inputs().to_sparse_csr()),
    "mkldnn": lambda one: one(inputs().to_mkldnn()).to_dense(),
    "dispatch mode": watched(Watch),
    "saved on cpu": watched(torch.autograd.graph.save_on_cpu),
    "no_grad": watched(torch.no_grad),
    "by name": lambda one: one(x=inputs()),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["learnt", "frozen"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("asked", ASKED)
def test_what_peft_computes(asked, use_dora, frozen):
    stock = model(use_dora=use_dora, net=Plain).eval().requires_grad_(True)
    if frozen:
        stock.requires_grad_(False)
    else:
        for name, p in stock.named_parameters():
            p.requires_grad_("lora_" in name)
    fused = copy.deepcopy(stock)
    assert len(fuse(fused).fused) == 2
    try:
        wanted = ASKED[asked](stock).detach()
    except RuntimeError:
        assert use_dora and asked in ("nested", "mkldnn")  # PEFT's DoRA cannot
        wanted = stock(inputs()).detach()
    found = ASKED[asked](fused).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


class Plain(torch.nn.Module):
    """Without an op of its own between the layers that a layout lacks."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(24, 40), torch.nn.Linear(40, 16, bias=False)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))
