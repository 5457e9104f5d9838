"""expert_lora_linear, autograd and compilers: gradcheck, who gets a gradient, what is saved,
opcheck, compiled bits."""

from dataclasses import replace

import pytest
import torch

from lora_kernels import expert_lora_linear, use_backend
from lora_kernels.testing import make_expert_problem, run_experts

OPS = torch.ops.lora_kernels
FLAGS = [{}, {"bias": True}, {"gain": True}, {"gain": True, "bias": True}, {"rank": 0, "bias": True}]
flags = pytest.mark.parametrize("flags", FLAGS, ids=str)


def called(problem, names):
    def call(*tensors):
        return expert_lora_linear(*replace(problem, **dict(zip(names, tensors, strict=True))).arguments())

    return call


@flags
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_gradcheck(flags, transposed):
    sizes = [2, 0, 1]
    p = make_expert_problem(sizes, 4, 3, dtype=torch.float64, left=1, transposed=transposed, peft=True, **{"rank": 2} | flags)
    leaves = p.require_grad()
    with use_backend("reference"):
        assert torch.autograd.gradcheck(called(p, leaves), list(leaves.values()), nondet_tol=0.0)


def test_second_derivatives_and_forward_mode():
    p = make_expert_problem([2, 0, 1], 4, 3, 2, torch.float64, left=1, bias=True, gain=True)
    leaves = p.require_grad()
    tensors = list(leaves.values())
    assert torch.autograd.gradgradcheck(called(p, leaves), tensors)
    assert torch.autograd.gradcheck(called(p, leaves), tensors, check_forward_ad=True, check_backward_ad=False)


def test_a_tensor_scale_gets_a_gradient(backend):
    p = make_expert_problem([2, 0, 5], bias=True)
    scale = torch.tensor(0.7, requires_grad=True)
    (grad,) = torch.autograd.grad(expert_lora_linear(*replace(p, scale=scale).arguments()), scale, p.dy)
    one, none = (expert_lora_linear(*replace(p, scale=s).arguments()) for s in (1.0, 0.0))
    torch.testing.assert_close(grad, ((one - none) * p.dy).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [("x",), ("a",), ("b",), ("bias",), ("gain",), ("x", "b"), ("a", "gain")], ids=str)
def test_who_gets_a_gradient(backend, names):
    for transposed in (False, True):
        p = make_expert_problem([2, 0, 30], 24, 20, 4, torch.bfloat16, bias=True, gain=True, transposed=transposed)
        everything = run_experts(p)
        for name in ("x", "a", "b", "bias", "gain"):
            getattr(p, name).requires_grad_(name in names)
        y = expert_lora_linear(*p.arguments())
        y.backward(p.dy)
        assert y.equal(everything["y"])
        for name in ("x", "a", "b", "bias", "gain"):
            grad = getattr(p, name).grad
            assert grad is None if name not in names else grad.equal(everything[name]), name


def test_parameters_of_peft_take_their_gradients_as_they_are(backend):
    p = make_expert_problem([2, 0, 30], 24, 20, 4, peft=True)
    wanted = run_experts(p)
    a = p.a.detach().reshape(-1, 24).clone().requires_grad_()
    b = p.b.detach().permute(1, 2, 0).reshape(20, -1).clone().requires_grad_()
    of = replace(p, a=a.view(3, 4, 24), b=b.view(20, 4, 3).permute(2, 0, 1))
    expert_lora_linear(*of.arguments()).backward(p.dy)
    assert a.grad.equal(wanted["a"].reshape(-1, 24)) and a.grad.is_contiguous()
    assert b.grad.equal(wanted["b"].permute(1, 2, 0).reshape(20, -1)) and b.grad.is_contiguous()


@pytest.mark.parametrize("name", ["x", "w", "a", "b", "offsets", "y"])
def test_a_saved_tensor_changed_in_place_raises(backend, name):
    p = make_expert_problem([2, 0, 30], gain=True)
    p.require_grad()
    y = expert_lora_linear(*p.arguments())
    with torch.no_grad():
        (y if name == "y" else getattr(p, name)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(p.dy)


def test_autocast_casts_x_and_w(backend):
    p = make_expert_problem([2, 0, 30], gain=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = expert_lora_linear(*p.arguments())
    assert found.equal(expert_lora_linear(*replace(p, x=p.x.bfloat16(), w=p.w.bfloat16()).arguments()))


def test_unrounded_gradients_of_16_bit_leaves(backend):
    p = make_expert_problem([2, 0, 30], dtype=torch.bfloat16)
    a = p.a.detach().requires_grad_()
    a.grad_dtype = torch.float32
    expert_lora_linear(*replace(p, a=a).arguments()).backward(p.dy)
    assert a.grad.dtype is torch.float32 and a.grad.bfloat16().equal(run_experts(p)["a"])


@pytest.mark.parametrize("flags", [FLAGS[0], *FLAGS[3:]], ids=str)
def test_opcheck(backend, flags):
    p = make_expert_problem([2, 0, 30, 1], 24, 20, dtype=torch.bfloat16, left=1, peft=True, **{"rank": 4} | flags)
    keep_z = p.gain is not None and p.bias is not None
    fields = (p.x, p.w, p.a, p.b, p.offsets, p.scale, p.bias, p.gain, False)
    torch.library.opcheck(OPS.expert_lora_linear_forward.default, (*fields, p.a is not None, keep_z))
    y, h, z = OPS.expert_lora_linear_forward.default(*fields, p.a is not None, keep_z)
    needs = [1, int(p.a is not None), int(p.a is not None), int(p.bias is not None), int(p.gain is not None)]
    kept = (h if p.a is not None else None, y if p.gain is not None and not keep_z else None, z if keep_z else None)
    torch.library.opcheck(OPS.expert_lora_linear_backward.default, (p.dy, *fields, *kept, needs))


def test_compiled_has_the_same_bits():
    p = make_expert_problem([2, 0, 30, 1], gain=True, bias=True, left=1, peft=True)
    wanted = run_experts(p)
    leaves = p.require_grad()
    y = torch.compile(expert_lora_linear, fullgraph=True, backend="aot_eager")(*p.arguments())
    found = {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    p = make_expert_problem([2, 0, 30, 1], 24, 20, 4)
    with FlopCounterMode(display=False) as counter:
        run_experts(p)
    forward, adapter = 2 * 33 * 24 * 20, 2 * 33 * 4 * (24 + 20)
    assert counter.get_total_flops() == 2 * forward + 3 * adapter
