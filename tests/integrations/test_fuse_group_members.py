"""Groups whose layers are not alike: in dropout, rank and scale."""

import pytest
import torch
from group_helpers import block, inputs, learnt, ops, results, siblings
from torch.utils.checkpoint import checkpoint

from lora_kernels.integrations.peft import groups

GROUP = "lora_linear_group_forward"
RATES = {"all": (0.4, 0.1, 0.7), "first": (0.4, 0.0, 0.0), "last": (0.0, 0.0, 0.4), "one evaluates": (0.4, None, 0.4)}
rates = pytest.mark.parametrize("which", RATES)


@pytest.fixture(autouse=True)
def always_pays(monkeypatch):
    monkeypatch.setattr(groups, "group_pays", lambda x: True)


def unlike(which, **values):
    """(without groups, with one) whose layers drop at these rates; None: in eval mode."""
    ones = learnt(lora_dropout=0.5, **values)
    for one in ones:
        for layer, rate in zip((block(one).q, block(one).k, block(one).v), RATES[which], strict=True):
            if rate is None:
                layer.eval()
            else:
                layer.lora_dropout["default"].p = rate
    return ones


def same_bits(one, other, but=("x",)):
    return [n for n in one if n not in but and not (one[n] is other[n] is None or torch.equal(one[n], other[n]))] == []


@rates
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_each_layer_has_its_own_dropout(which, use_dora):
    alone, grouped = unlike(which, use_dora=use_dora)
    expected, found = results(alone, inputs()), results(grouped, inputs())
    assert GROUP in ops(grouped, inputs()) and siblings(grouped).alone() == {}
    assert same_bits(found, expected)
    torch.testing.assert_close(found["x"], expected["x"])
    assert not torch.equal(results(grouped, inputs(), seed=9)["y"], found["y"])


@rates
def test_a_checkpoint_draws_the_masks_of_each_layer_again(which):
    _, grouped = unlike(which, use_dora=True)
    grads = []
    for run in (grouped, lambda x: checkpoint(grouped, x, use_reentrant=False)):
        torch.manual_seed(3)
        x, trained = inputs().requires_grad_(), [p for p in grouped.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad(run(x).square().sum(), [x, *trained]))
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))
    assert GROUP in ops(grouped, inputs()) and siblings(grouped).alone() == {}


def test_a_rate_that_changes_between_the_calls_is_seen():
    alone, grouped = unlike("all")

    def act(b, x):
        q = b.q(x)
        b.k.lora_dropout["default"].p = 0.9
        return q, b.k(x), b.v(x)

    for one in (alone, grouped):
        torch.manual_seed(0)
        one(inputs(), act)
    assert siblings(grouped).alone() == {"k: the adapter's state changed": 1}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_ranks_and_scales_of_their_own(use_dora):
    patterns = {"rank_pattern": {"q": 9, "v": 1}, "alpha_pattern": {"k": 20}}
    alone, grouped = learnt(use_dora=use_dora, **patterns)
    assert len({block(grouped).q.r["default"], block(grouped).k.r["default"], block(grouped).v.r["default"]}) == 3
    expected, found = results(alone, inputs()), results(grouped, inputs())
    assert GROUP in ops(grouped, inputs()) and same_bits(found, expected)
    torch.testing.assert_close(found["x"], expected["x"])
