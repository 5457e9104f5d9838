"""expert_weight_norm: each expert's norm against float64, with rows in which the terms cancel, and
its gradients."""

import re
from dataclasses import replace

import pytest
import torch

from lora_kernels import expert_weight_norm, use_backend, weight_norm
from tests.ops.test_weight_norm import LIMIT, draw, dtypes, exact_norm, relative_error

SHAPES = [(1, 1, 1, 1), (3, 31, 17, 3), (2, 48, 64, 8), (5, 65, 129, 17), (2, 7, 2050, 5), (17, 100, 33, 64)]


def experts(count, n_out, n_in, rank, dtype, adapter_dtype=None, peft=False, **sizes):
    drawn = [draw(n_out, n_in, rank, dtype, adapter_dtype, seed=e, **sizes) for e in range(count)]
    w, a, b = map(torch.stack, zip(*drawn, strict=True))
    return w, a, b.permute(1, 2, 0).contiguous().permute(2, 0, 1) if peft else b


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("peft", [False, True], ids=["", "peft"])
def test_typical(backend, dtype, shape, peft):
    w, a, b = experts(*shape, dtype, peft=peft)
    squared = w.float().square().sum(2)
    for options in ({}, {"w_squared": squared.T.contiguous().T}, {"w_squared": squared}):
        n = expert_weight_norm(w, a, b, 2.0, **options)
        assert n.dtype is torch.float32 and n.shape == w.shape[:2]
        for e in range(len(w)):
            assert relative_error(n[e], w[e], a[e], b[e], 2.0) <= (1e-6 if shape[2] > 16 else LIMIT[dtype])
    turned = expert_weight_norm(w.mT.contiguous(), a, b, 2.0, transposed=True)
    torch.testing.assert_close(turned, n, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype, adapter_dtype", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)], ids=str)
def test_adapters_in_another_dtype(backend, dtype, adapter_dtype):
    w, a, b = experts(3, 40, 100, 6, dtype, adapter_dtype, peft=True)
    n = expert_weight_norm(w, a, b, 1.5)
    assert max(relative_error(n[e], w[e], a[e], b[e], 1.5) for e in range(3)) <= 1e-6


@dtypes
def test_terms_that_cancel(backend, dtype):
    _, a, b = experts(3, 40, 100, 6, dtype, b_size=0.5)
    w = (-1.5 * (b.double() @ a.double()) + 0.01).to(dtype)
    w[1, 3], b[1, 3] = 0, 0
    n = expert_weight_norm(w, a, b, 1.5)
    truth = torch.stack([exact_norm(w[e], a[e], b[e], 1.5) for e in range(3)])
    torch.testing.assert_close(n.double(), truth, rtol=1e-4, atol=1e-6)
    assert n[1, 3] == 0


@dtypes
def test_gradients_are_those_of_each_layer(backend, dtype):
    w, a, b = experts(3, 40, 100, 6, dtype, peft=True)
    dn = torch.randn(3, 40)
    for transposed in (False, True):
        leaves = a.detach().requires_grad_(), b.detach().requires_grad_()
        n = expert_weight_norm(w.mT if transposed else w, *leaves, 1.5, transposed=transposed)
        found = torch.autograd.grad(n, leaves, dn)
        assert [g.stride() for g in found] == [a.stride(), b.stride()]
        for e in range(3):
            of_e = a[e].detach().requires_grad_(), b[e].detach().requires_grad_()
            wanted = torch.autograd.grad(weight_norm(w[e], *of_e, 1.5), of_e, dn[e])
            for g, right in zip(found, wanted, strict=True):
                torch.testing.assert_close(g[e], right)


def test_gradcheck_and_second_derivatives():
    w, a, b = experts(2, 3, 4, 2, torch.float64, b_size=1.0)
    leaves = a.requires_grad_(), b.requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def call(a, b, scale):
        return expert_weight_norm(w, a, b, scale)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, leaves, nondet_tol=0.0)
        assert torch.autograd.gradgradcheck(call, leaves)
        assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False)


def test_opcheck_and_compile(backend):
    w, a, b = experts(3, 24, 20, 4, torch.bfloat16, peft=True)
    ops = torch.ops.lora_kernels
    torch.library.opcheck(ops.expert_weight_norm_forward.default, (w, a, b, 1.5, None, False))
    n = ops.expert_weight_norm_forward.default(w, a, b, 1.5, None, False)
    torch.library.opcheck(ops.expert_weight_norm_backward.default, (torch.ones(3, 24), n, w, a, b, 1.5, False, [1, 1]))
    assert n.equal(torch.compile(expert_weight_norm, fullgraph=True, backend="aot_eager")(w, a, b, 1.5))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"w": torch.zeros(6, 5)}, ValueError, "w and a must have three dimensions, found w [6, 5]"),
        ({"a": torch.zeros(2, 3, 4)}, ValueError, "a must have shape [2, r, 5] with r of at least 1, found [2, 3, 4]"),
        ({"b": torch.zeros(2, 6, 2)}, ValueError, "b must have shape [2, 6, 3], found [2, 6, 2]"),
        ({"w_squared": torch.zeros(6)}, ValueError, "w_squared must have shape [2, 6], found [6]"),
        ({"b": torch.zeros(2, 6, 3).half()}, TypeError, "a and b must share one floating dtype"),
        ({"w": torch.zeros(2, 6, 5).long()}, TypeError, "w must be float32"),
        ({"w": torch.zeros(2, 6, 5, requires_grad=True)}, ValueError, "w is frozen and gets no gradient"),
        ({"scale": torch.zeros(2)}, ValueError, "scale must be a number or hold one, found [2]"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_named(backend, change, error, words):
    given = {"w": torch.zeros(2, 6, 5), "a": torch.zeros(2, 3, 5), "b": torch.zeros(2, 6, 3), "scale": 1.0, "w_squared": None}
    with pytest.raises(error, match=re.escape(f"expert_weight_norm: {words}")):
        expert_weight_norm(**given | change)


@pytest.mark.parametrize("kind", [None, "nested"])
@pytest.mark.parametrize("transposed", [False, True])
def test_triton_interpreted(transposed, kind):
    """As one layer after the other, with numbers or codes, and its gradients."""
    pytest.importorskip("triton")
    from tests.ops.interpreted import deterministic, interpreted
    from tests.ops.quantised import make_quantised

    w, a, b = experts(3, 40, 32, 6, torch.float32, peft=True)
    w = w.mT.contiguous() if transposed else w
    if kind:
        flat = make_quantised(kind, w.shape[0] * w.shape[1], w.shape[2], 32)
        of_codes = replace(flat, shape=tuple(w.shape))
        w = flat.dequantise().view(w.shape)
    dn, found = torch.randn(3, 40), {}
    for name, weight in (("interpreted", of_codes if kind else w), ("reference", w)):
        leaves = a.detach().requires_grad_(), b.detach().requires_grad_()
        with deterministic(False), interpreted() if name == "interpreted" else use_backend(name):
            n = expert_weight_norm(weight, *leaves, 1.5, transposed=transposed)
            found[name] = n.detach(), *torch.autograd.grad(n, leaves, dn)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
