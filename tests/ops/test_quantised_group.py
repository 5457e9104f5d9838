"""A group some of whose weights are codes: the bits of calls one by one, but for dx, which is
rounded once."""

import pytest
import torch

from lora_kernels import Member, explain, lora_linear, lora_linear_group, use_backend
from lora_kernels.testing.tolerances import rms
from tests.ops.interpreted import deterministic
from tests.ops.quantised import FORMATS, KINDS, make_format, make_quantised

N_IN = 96


def members(dtype, seed=0):
    """One of each kind of codes, plain ones between them; ranks, widths and what is None differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = [make_quantised(kind, 40, N_IN, 64, dtype) for kind in KINDS]
    weights += [make_format(name, 33, N_IN, dtype) for name in FORMATS]
    weights[2:2] = [normal(24, N_IN) * N_IN**-0.5]
    found = []
    for i, w in enumerate(weights):
        n_out = w.shape[0]
        a, b = normal(3 + i % 4, N_IN) * 0.1, normal(n_out, 3 + i % 4)
        bias = None if i % 3 else normal(n_out)
        gain = None if i % 4 else normal(n_out).abs() + 0.5
        tensors = [None if t is None else t.requires_grad_() for t in (a, b, bias, gain)]
        found.append(Member(w, tensors[0], tensors[1], 0.5 + i / 8, tensors[2], tensors[3], torch.tensor(i + 1)))
    return found


def one_by_one(x, found, dropout=0.0):
    return [lora_linear(x, *m[:6], dropout, seed=m.seed if dropout else None) for m in found]


def gradients(ys, x, found, used):
    generator = torch.Generator().manual_seed(7)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]
    learnt = [x, *(t for m in found for t in (m.a, m.b, m.bias, m.gain) if t is not None)]
    return torch.autograd.grad([ys[i] for i in used], learnt, [dys[i] for i in used], allow_unused=True)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("tokens", [3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_by_one(dtype, tokens, dropout):
    found = members(dtype)
    x = torch.randn(tokens, N_IN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    ys, alone = lora_linear_group(x, found, dropout), one_by_one(x, found, dropout)
    assert all(torch.equal(one, two) for one, two in zip(ys, alone, strict=True))
    with torch.no_grad():
        again = lora_linear_group(x, found, dropout)
    assert all(torch.equal(one, two) for one, two in zip(again, ys, strict=True))
    for used in (range(len(found)), [1], [0, 2, 5]):
        calls = (lora_linear_group(x, found, dropout), one_by_one(x, found, dropout))
        of_group, of_each = (gradients(ys, x, found, used) for ys in calls)
        for one, two in zip(of_group[1:], of_each[1:], strict=True):
            assert (one is None) is (two is None) and (one is None or torch.equal(one, two))
        assert rms(of_group[0].double() - of_each[0].double()) <= (1e-2 if dtype is torch.bfloat16 else 1e-6) * rms(of_each[0])


@pytest.mark.parametrize("tokens, fixed", [(70, False), (3, True)])
def test_the_gradient_of_x_is_rounded_once(tokens, fixed):
    found = members(torch.bfloat16)
    x = torch.randn(tokens, N_IN, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    used = range(len(found))
    with deterministic(fixed):
        dx, summed = (gradients(ys, x, found, used)[0].double() for ys in (lora_linear_group(x, found), one_by_one(x, found)))
    wanted = 0
    generator = torch.Generator().manual_seed(7)
    for m in found:
        w = (m.w if isinstance(m.w, torch.Tensor) else m.w.dequantise()).double()
        dy = torch.randn(tokens, w.shape[0], generator=generator).bfloat16().double()
        dy = dy if m.gain is None else dy * m.gain.detach().double()
        wanted = wanted + dy @ w + m.scale * (dy @ m.b.detach().double()) @ m.a.detach().double()
    once = rms(wanted.bfloat16().double() - wanted)
    assert rms(dx - wanted) < 1.1 * once < rms(summed - wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_which_op_runs(backend):
    found = members(torch.bfloat16)[:4]
    for x, op in (
        (torch.randn(64, N_IN).bfloat16().requires_grad_(), "lora_linear_group_forward"),
        (torch.randn(8, 8, N_IN).bfloat16().requires_grad_(), "lora_linear_group_forward"),
        (torch.randn(63, N_IN).bfloat16().requires_grad_(), "lora_linear_forward"),
        (torch.randn(64, N_IN).bfloat16(), "lora_linear_forward"),
    ):
        with use_backend(backend), deterministic(False):
            assert {(d.op, d.chosen) for d in explain(lora_linear_group, x, found).decisions} == {(op, backend)}


def test_kernels_of_a_gpu_refuse_codes_in_a_group():
    found, x = members(torch.bfloat16)[:2], torch.randn(64, N_IN).bfloat16().requires_grad_()
    compiled = torch.compile(lambda x: lora_linear_group(x, found), fullgraph=True, backend="eager")
    with use_backend("triton", simulate=True), pytest.raises(NotImplementedError, match="a member's w is a QuantisedWeight"):
        compiled(x)


def test_compiled():
    found = members(torch.bfloat16)[:6]
    x = torch.randn(64, N_IN).bfloat16().requires_grad_()

    def call(x):
        return lora_linear_group(x, found)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(x), call(x), strict=True):
        assert torch.equal(one, two)
    used = range(len(found))
    for one, two in zip(*(gradients(f(x), x, found, used) for f in (compiled, call)), strict=True):
        assert torch.equal(one, two)


def test_gradients_of_gradients():
    found = members(torch.float32)[:5]
    x = torch.randn(3, N_IN, requires_grad=True)

    def twice(call):
        (dx,) = torch.autograd.grad(sum(y.square().sum() for y in call()), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *(m.a for m in found)])

    of_group, of_each = twice(lambda: lora_linear_group(x, found)), twice(lambda: one_by_one(x, found))
    for one, two in zip(of_group, of_each, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
