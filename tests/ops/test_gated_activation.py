"""gated_activation: values and gradients against float64 at every instruction set, what PyTorch
gives, further derivatives, compilers."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import use_backend
from lora_kernels.ops.gated_activation import gated_activation
from tests.ops.cpu import at_level
from tests.ops.test_cpu_levels import levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gelu(g):
    """As 1 + tanh it would cancel for gates far below zero."""
    return g * torch.sigmoid(math.sqrt(8 / math.pi) * (g + 0.044715 * g**3))


GATES = {False: F.silu, True: gelu}
gates = pytest.mark.parametrize("tanh", GATES, ids=["silu", "gelu"])


def drawn(tokens, n, dtype, size=4.0):
    generator = torch.Generator().manual_seed(tokens + n)
    x, dy = (torch.randn(tokens, c, generator=generator) for c in (2 * n, n))
    return (x * size).to(dtype), dy.to(dtype)


def plain(x, tanh):
    gate, up = x.chunk(2, -1)
    return GATES[tanh](gate) * up


def results(call, x, dy):
    x = x.detach().requires_grad_()
    y = call(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def assert_exact(x, dy, tanh):
    """One rounding of the formula in float64."""
    with use_backend("reference"):
        wanted = results(lambda x: plain(x, tanh), x.double(), dy.double())
    for found, exact in zip(results(lambda x: gated_activation(x, tanh), x, dy), wanted, strict=True):
        assert found.dtype is x.dtype
        info = torch.finfo(x.dtype)
        bound = (0.505 * info.eps + 6e-7) * exact.abs() + info.tiny * info.eps + 1e-37
        # a derivative near its zero is a difference
        assert ((found.double() - exact).abs() <= bound + 2e-7 * (x.double().abs().amax() + 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", levels())
@gates
def test_every_level(level, dtype, tanh):
    with at_level(level), use_backend("cpu"):
        for tokens, n in ((1, 1), (3, 16), (5, 33), (2, 130)):
            assert_exact(*drawn(tokens, n, dtype), tanh)
        assert [t.shape for t in results(lambda x: gated_activation(x, tanh), *drawn(0, 5, dtype))] == [(0, 5), (0, 10)]


@gates
def test_the_reference(tanh):
    with use_backend("reference"):
        for dtype in DTYPES:
            assert_exact(*drawn(5, 33, dtype), tanh)
    x, dy = drawn(5, 7, torch.float64)
    for found, wanted in zip(
        results(lambda x: gated_activation(x, tanh), x, dy), results(lambda x: plain(x, tanh), x, dy), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("level", levels())
@gates
def test_every_gate_of_bfloat16(level, tanh):
    """All finite numbers, infinities and NaN: relative errors, not one of what is far away; and the
    gradients of the finite ones and NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    gate = bits.view(torch.bfloat16)[:, None]
    gate = gate[gate[:, 0].abs() != torch.inf] if tanh else gate
    x = torch.cat([gate, torch.ones_like(gate)], 1).float()
    with at_level(level), use_backend("cpu"):
        y = gated_activation(x, tanh)
    wanted = plain(x.double(), tanh)
    torch.testing.assert_close(y.double(), wanted, rtol=3e-5 if tanh else 1e-5, atol=1e-35, equal_nan=True)
    x = x[x[:, 0].abs() != torch.inf]
    with at_level(level), use_backend("cpu"):
        _, found = results(lambda x: gated_activation(x, tanh), x, torch.ones(len(x), 1))
    _, wanted = results(lambda x: plain(x, tanh), x.double(), torch.ones(len(x), 1, dtype=torch.float64))
    torch.testing.assert_close(found.double(), wanted, rtol=3e-5, atol=1e-6, equal_nan=True)


def test_strides_and_twice(backend):
    if backend == "triton":
        pytest.skip("no such kernel")
    x, dy = drawn(9, 20, torch.bfloat16)
    wanted = results(gated_activation, x, dy)
    for view in (x.T.contiguous().T, torch.full((9, 80), torch.nan, dtype=x.dtype)[:, ::2].copy_(x)):
        for found, t in zip(results(gated_activation, view, dy), wanted, strict=True):
            assert found.equal(t)
    turned = dy.T.contiguous().T
    assert results(gated_activation, x, turned)[1].equal(wanted[1])
    rows = (torch.full((9, c + 7), torch.nan, dtype=x.dtype)[:, 3 : c + 3].copy_(t) for c, t in ((40, x), (20, dy)))
    for found, t in zip(results(gated_activation, *rows), wanted, strict=True):
        assert found.equal(t)


def test_the_gates_are_those_of_pytorch():
    x = drawn(3, 40, torch.float64)[0]
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"))
    torch.testing.assert_close(gated_activation(x), F.silu(x[:, :40]) * x[:, 40:])


def test_rows_do_not_see_each_other():
    x, dy = drawn(5, 37, torch.float32)
    x[2], dy[2] = torch.nan, torch.nan
    for t in results(gated_activation, x, dy):
        assert t[2].isnan().all() and t[[0, 1, 3, 4]].isfinite().all()


@gates
def test_derivatives(tanh):
    x = drawn(3, 4, torch.float64, 1.0)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gated_activation(x, tanh), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: gated_activation(x, tanh), x)
    narrow = x.detach().float().requires_grad_()
    (g,) = torch.autograd.grad(gated_activation(narrow, tanh).square().sum(), narrow, create_graph=True)
    (found,) = torch.autograd.grad(g.square().sum(), narrow)
    (g,) = torch.autograd.grad(plain(x, tanh).square().sum(), x, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(g.square().sum(), x)[0].float(), rtol=1e-4, atol=1e-4)


def test_opcheck_and_compiled_bits():
    x, dy = drawn(5, 12, torch.bfloat16)
    ops = torch.ops.lora_kernels
    torch.library.opcheck(ops.gated_activation_forward.default, (x, True))
    torch.library.opcheck(ops.gated_activation_backward.default, (dy, x, False))
    compiled = torch.compile(gated_activation, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(results(compiled, x, dy), results(gated_activation, x, dy), strict=True):
        assert found.equal(wanted)


@pytest.mark.parametrize(
    "x, error, words",
    [
        (torch.zeros(4), ValueError, "x must be a matrix with an even number of columns, found [4]"),
        (torch.zeros(4, 3), ValueError, "x must be a matrix with an even number of columns, found [4, 3]"),
        (torch.zeros(4, 2).long(), TypeError, "x must be floating, found torch.int64"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(x, error, words):
    with pytest.raises(error, match=re.escape(f"gated_activation: {words}")):
        gated_activation(x)
