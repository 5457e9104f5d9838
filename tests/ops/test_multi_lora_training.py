"""Gradients of a batch with several adapters: those of the formula, and bit for bit those of each
adapter alone."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from lora_kernels import lora_linear
from lora_kernels.ops.multi_lora import multi_lora, multi_lora_add_
from lora_kernels.ops.multi_lora.plan import rows_of
from tests.ops.interpreted import deterministic
from tests.ops.multi import exact
from tests.ops.test_multi_lora import draw, planned


def clean(slots):
    """Without the NaN between the rows, which a dense gradient check would meet."""
    return [replace(s, **{n: getattr(s, n).nan_to_num() for n in ("a", "b", "gain", "bias")}) for s in slots]


@pytest.mark.parametrize(("outs", "k"), [([5], 1), ([3, 4], 1), ([5], 2), ([3, 4], 2)], ids=str)
def test_gradcheck(k, outs):
    x, w, slots, slot, weights, bias = draw(5, 6, outs, [3, 2, 9], k, torch.float64)
    slots = clean(slots)
    plan = planned(slots, slot, weights)
    names = ("a", "b")
    leaves = [x.requires_grad_(), bias.requires_grad_(), *(getattr(s, n).requires_grad_() for s in slots for n in names)]

    def call(x, bias, *tensors):
        sites = [replace(s, **dict(zip(names, tensors[2 * i : 2 * i + 2], strict=True))) for i, s in enumerate(slots)]
        return multi_lora(x, w, sites, plan, bias)

    # number by number once; of a random direction where only the weights or the slices differ
    one = k == len(outs) == 1
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=not one)
    # the second derivatives are those of each call of lora_linear, whatever their number
    assert len(outs) > 1 or torch.autograd.gradgradcheck(call, leaves, fast_mode=not one)


def test_the_tangent_of_a_batch_without_gradients():
    """The kernels would drop it."""
    x, w, slots, slot, weights, bias = draw(5, 6, [3, 4], [3, 2, 9], 1, torch.float32)
    slots = clean(slots)
    plan = planned(slots, slot, weights)
    step = torch.randn_like(x)

    def call(x):
        return multi_lora(x, w, slots, plan, bias)

    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            found = torch.func.jvp(call, (x,), (step,))[1]
        torch.testing.assert_close(found, call(x + step) - call(x), rtol=1e-4, atol=1e-4)  # it is linear in x
    with forward_ad.dual_level(), pytest.raises(ValueError, match="multi_lora_add_: it is not differentiated"):
        multi_lora_add_(call(x), x, slots, plan, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_training_alone(dtype):
    x, w, slots, slot, _, bias = draw(90, 72, [56], [8, 3, 16, 40], 1, dtype)
    s = clean(slots)[0]
    leaves = [t.requires_grad_() for t in (s.a, s.b, s.gain, s.bias)]
    dy = torch.randn(90, 56).to(dtype)
    with deterministic(True):
        y = multi_lora(x.requires_grad_(), w, s, planned([s], slot), bias)
        dx, da, db, dgain, dbias = torch.autograd.grad(y, [x, *leaves], dy)
        for each in range(4):
            tokens, rows = (slot[:, 0] == each).nonzero()[:, 0], rows_of(s, each)
            at = int(s.flags[each]) >> 2
            own = [t.detach().clone().requires_grad_() for t in (x[tokens], s.a[rows], s.b[rows].T.contiguous(), s.gain[at])]
            gain = own[3] if s.flags[each] & 1 else None
            alone = lora_linear(own[0], w, own[1], own[2], float(s.scale[each]), bias, gain)
            if s.flags[each] & 2:
                alone = alone + s.bias[at].detach().to(dtype)
            assert y[tokens].equal(alone)
            grads = torch.autograd.grad(alone, own if gain is not None else own[:3], dy[tokens])
            assert dx[tokens].equal(grads[0]) and da[rows].equal(grads[1]) and db[rows].equal(grads[2].T)
            if gain is not None:
                assert dgain[at].equal(grads[3])
            if s.flags[each] & 2:
                torch.testing.assert_close(dbias[at], dy[tokens].float().sum(0), rtol=2e-2, atol=2e-2)
    free = torch.ones(len(s.a), dtype=torch.bool)
    free[torch.cat([rows_of(s, each) for each in range(4)])] = False
    assert not da[free].any() and not db[free].any()


def test_values_are_those_of_the_kernels():
    for case in ((40, 48, [24, 33], [8, 3, 0, 16], 1), (40, 48, [24], [8, 3, 16], 3)):
        x, w, slots, slot, weights, bias = draw(*case, torch.float32)
        slots = clean(slots)
        y = multi_lora(x.requires_grad_(), w, slots, planned(slots, slot, weights), bias)
        torch.testing.assert_close(y.double(), exact(x.detach(), w, slots, slot, weights, bias), rtol=1e-4, atol=1e-4)


def test_an_id_that_nobody_gave_gets_no_adapter():
    x, w, slots, slot, _, bias = draw(6, 16, [24], [8, 3], 1, torch.float32)
    slots = clean(slots)
    plan = planned(slots, slot)
    slots[0].generation.add_(1)
    y = multi_lora(x.requires_grad_(), w, slots, plan, bias)
    torch.testing.assert_close(y, x @ w.T + bias)
    with pytest.raises(LookupError):
        plan.raise_errors()


def test_in_place_is_not_differentiated():
    x, w, slots, slot, _, _ = draw(6, 16, [24], [8, 3], 1, torch.float32)
    plan = planned(slots, slot)
    with pytest.raises(ValueError, match="multi_lora_add_: it is not differentiated; use multi_lora, or torch.no_grad"):
        multi_lora_add_(torch.ones(6, 24), x.requires_grad_(), slots, plan)
    with torch.no_grad():
        multi_lora_add_(torch.ones(6, 24), x, slots, plan)
