"""Gradients in float32 of adapters in 16 bits, where torch is told so: `a.grad_dtype =
torch.float32`."""

import pytest
import torch

from lora_kernels import Member, lora_linear, lora_linear_group, use_backend, weight_norm
from lora_kernels.ops.gradients import OWN_DTYPE, SUM_DTYPE, gradient_kind
from lora_kernels.ops.registry import ON_GPU
from lora_kernels.testing import exact, make_problem
from lora_kernels.testing.tolerances import rms

NAMES = ("a", "b", "bias", "gain")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=["reference", "cpu", "triton"])
def any_backend(request):
    """As `backend`, but Triton's counts as quick: the calls are few and small."""
    with use_backend(request.param, simulate=request.param in ON_GPU):
        yield request.param


def leaves(p, wide=NAMES):
    """The problem with all that is trained in the dtype of x, and of `wide` the gradients in
    float32."""
    for name in NAMES:
        leaf = getattr(p, name).to(p.x.dtype).requires_grad_()
        if name in wide:
            leaf.grad_dtype = torch.float32
        setattr(p, name, leaf)
    return p


@HALVES
def test_they_are_not_rounded(any_backend, dtype):
    for tokens in (3, 70):
        for flags in ({}, {"dropout": 0.4}) if tokens == 70 else ({},):
            p = leaves(make_problem(tokens, 40, 36, 4, dtype, gain=True, bias=True, **flags))
            lora_linear(*p.arguments()).backward(p.dy)
            truth = exact(p).values
            for name in ("a", "b", "bias"):  # gain's is a sum over z, which is kept in 16 bits
                found = getattr(p, name).grad
                assert found.dtype is torch.float32
                least = rms(truth[name].to(dtype).double() - truth[name])  # what one rounding costs
                assert rms(found.double() - truth[name]) < 0.05 * least, name
            assert p.gain.grad.dtype is torch.float32


def test_each_by_itself(any_backend):
    both = {name: leaves(make_problem(5, 40, 36, 4, torch.bfloat16, gain=True, bias=True), (name,)) for name in NAMES}
    for name, p in both.items():
        lora_linear(*p.arguments()).backward(p.dy)
        for other in NAMES:
            assert getattr(p, other).grad.dtype is (torch.float32 if other == name else torch.bfloat16)
            # the one is the other, rounded
            assert getattr(p, other).grad.bfloat16().equal(getattr(both["a"], other).grad.bfloat16()) or name == "a"


def test_small_gradients_add_up(any_backend):
    p = leaves(make_problem(3, 16, 16, 2, torch.bfloat16, gain=True, bias=True))
    for _ in range(4):
        lora_linear(*p.arguments()).backward(p.dy)
    once = torch.autograd.grad(lora_linear(*p.arguments()), [p.a, p.b], p.dy)
    for leaf, grad in zip((p.a, p.b), once, strict=True):
        assert leaf.grad.dtype is grad.dtype is torch.float32
        assert leaf.grad.equal(grad + grad + grad + grad)


def test_no_rows(any_backend):
    p = leaves(make_problem(0, 16, 16, 2, torch.bfloat16, gain=True, bias=True))
    lora_linear(*p.arguments()).backward(p.dy)
    for name in NAMES:
        grad = getattr(p, name).grad
        assert grad.dtype is torch.float32 and not grad.any()


@HALVES
def test_of_a_group(any_backend, dtype):
    one, two = (leaves(make_problem(9, 40, n, 4, dtype, gain=True, bias=True, seed=n)) for n in (36, 20))
    two.a.grad_dtype = dtype
    members = [Member(p.w, p.a, p.b, p.scale, p.bias, p.gain) for p in (one, two)]
    ys = lora_linear_group(one.x, members)
    torch.autograd.backward(ys, [one.dy, two.dy])
    found = [[getattr(p, name).grad for name in NAMES] for p in (one, two)]
    assert [[g.dtype is torch.float32 for g in grads] for grads in found] == [[True] * 4, [False, True, True, True]]
    for p, grads in zip((one, two), found, strict=True):
        for name in NAMES:
            getattr(p, name).grad = None
        lora_linear(one.x, *members[p is two][:6]).backward(p.dy)
        for name, grad in zip(NAMES, grads, strict=True):
            torch.testing.assert_close(getattr(p, name).grad, grad, rtol=1e-5, atol=1e-5)


@HALVES
def test_of_the_norm(any_backend, dtype):
    p = leaves(make_problem(5, 40, 36, 4, dtype, gain=True, bias=True))
    weight_norm(p.w, p.a, p.b, 1.5).sum().backward()
    w, a, b = (t.detach().double() for t in (p.w, p.a, p.b))
    a, b = a.requires_grad_(), b.requires_grad_()
    (w + 1.5 * b @ a).norm(dim=1).sum().backward()
    for found, truth in ((p.a.grad, a.grad), (p.b.grad, b.grad)):
        assert found.dtype is torch.float32
        assert rms(found.double() - truth) < 0.05 * rms(truth.to(dtype).double() - truth)


def test_who_asks_for_it():
    plain, other = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    assert (
        gradient_kind(None)
        == gradient_kind(plain)
        == gradient_kind(other)
        == gradient_kind(plain.clone().requires_grad_())
        == OWN_DTYPE
    )
    leaf = plain.clone().requires_grad_()
    leaf.grad_dtype = torch.float32
    assert gradient_kind(leaf) == SUM_DTYPE
    assert gradient_kind(leaf * 2) == OWN_DTYPE
