"""fuse learns which layers read one tensor: one op for all, the values of a call each, and alone
whatever is not as before."""

import copy
import gc
import pickle

import pytest
import torch
from fuse_helpers import LLAMA_LAYERS, errs_as_stock, llama, model, randomise, step, tokens
from group_helpers import (
    KINDS,
    Attention,
    alone_since,
    block,
    inputs,
    kinds,
    learn,
    learnt,
    ops,
    pair,
    qkv,
    results,
    siblings,
)
from torch import nn

from lora_kernels import fuse, unfuse
from lora_kernels.integrations.peft import groups


@pytest.fixture(autouse=True)
def always_pays(monkeypatch):
    monkeypatch.setattr(groups, "group_pays", lambda x: True)


def test_the_third_call_of_the_module_is_one_op():
    _, one = pair()
    x = inputs()
    with torch.no_grad():
        assert [ops(one, x) for _ in range(3)] == [["lora_linear_forward"] * 4] * 2 + [
            ["lora_linear_group_forward", "lora_linear_forward"]
        ]
    assert siblings(one).groups() == [("q", "k", "v")] and siblings(one).alone() == {}
    q, k, v = one(inputs().requires_grad_(), qkv)
    assert q.grad_fn is k.grad_fn is v.grad_fn


@kinds
@pytest.mark.parametrize("rows", [3, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_weights_gradients_have_the_bits_of_a_call_each(kind, dtype, rows):
    """So the masks are the same, too. The gradient of x, a sum over the layers, is rounded once: in
    16 bits it errs less, in float32 it is another order of the sum."""
    alone, grouped = learnt(dtype, **KINDS[kind])
    x = inputs(dtype, rows)
    assert "lora_linear_group_forward" in ops(grouped, x)
    for act in (None, qkv):
        expected, found = results(alone, x, act), results(grouped, x, act)
        assert [n for n in expected if n != "x" and not _equal(found[n], expected[n])] == []
    if "dropout" in kind:
        return
    exact = results(copy.deepcopy(alone).double(), x.double(), qkv)["x"]
    ours, theirs = ((each["x"].double() - exact).norm() for each in (found, expected))
    assert ours <= (2 if dtype is torch.float32 else 0.9 if rows == 90 else 1) * theirs


def _equal(one, other):
    return one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_llama_errs_as_pefts(kind):
    stock = model(net=llama, target_modules=LLAMA_LAYERS, task_type="CAUSAL_LM", **KINDS[kind]).eval()
    one = copy.deepcopy(stock)
    report = fuse(one)
    assert report.groups() == {} and "one op" not in str(report)
    for _ in range(2):
        step(one, tokens(5))
    assert "layers that share an input run as one op: 2 groups of 3, 2 of 2" in str(report)
    assert report.groups()["base_model.model.model.layers.1.mlp"] == [("gate_proj", "up_proj")]
    errs_as_stock(step(one, tokens()), step(stock, tokens()), step(copy.deepcopy(stock).double(), tokens()))
    assert report.alone() == {}


def test_groups_can_be_turned_off_and_on():
    one = model(net=Attention, target_modules=["q", "k", "v", "o"])
    before = [(name, set(vars(m))) for name, m in one.named_modules()]
    report = fuse(one, groups=False)
    for _ in range(3):
        one(inputs())
    assert report.groups() == {} and [(name, set(vars(m))) for name, m in one.named_modules()] == before
    report = fuse(one)
    learn(one)
    kept = siblings(one)
    assert len(block(one)._forward_hooks) == 1 and len(report.groups()) == 1
    fuse(one)
    assert siblings(one) is kept  # a second fuse changes nothing
    for turn_off in (lambda: fuse(one, groups=False), lambda: unfuse(one)):
        turn_off()
        assert not block(one)._forward_hooks and not block(one)._forward_pre_hooks and report.groups() == {}
        assert [(name, set(vars(m))) for name, m in one.named_modules()] == before
        fuse(one)
        learn(one)


def test_a_merged_and_unloaded_model_keeps_no_hook():
    _, one = learnt()
    base = one.merge_and_unload()
    assert [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_layers_that_are_in_no_group_are_watched_for_the_first_calls_alone():
    _, one = pair()
    for seed in range(64):
        assert groups.KEY in vars(block(one).o)
        one(inputs(seed=seed))
    assert groups.KEY not in vars(block(one).o) and groups.KEY in vars(block(one).q)
    _, other = pair()
    for seed in range(64):
        one_by_one = [inputs(seed=10 * seed + i) for i in range(3)]
        block(other)(None, lambda b, _, xs=one_by_one: [f(x) for f, x in zip((b.q, b.k, b.v), xs, strict=True)])
    # never called
    assert [name for name, m in other.named_modules() if groups.KEY in vars(m)] == ["base_model.model.o"]


def test_the_order_of_a_model_is_learnt_not_that_of_its_children():
    _, one = pair()
    for seed in range(3):
        one(inputs(seed=seed), lambda b, x: (b.v(x), b.q(x)))
    assert siblings(one).groups() == [("v", "q")]


def second_tensor(b, x):
    return b.q(x), b.k(x.clone()), b.v(x)


def changed_in_place(b, x):
    q = b.q(x)
    x.mul_(2)
    return q, b.k(x), b.v(x)


def grad_mode(b, x):
    q = b.q(x)
    with torch.no_grad():
        return q, b.k(x), b.v(x)


def autocast(b, x):
    q = b.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        return q, b.k(x), b.v(x)


def scale(b, x):
    q = b.q(x)
    b.k.set_scale("default", 5.0)
    return q, b.k(x), b.v(x)


def weight(b, x):
    q = b.q(x)
    with torch.no_grad():
        b.k.lora_B["default"].weight.mul_(3)
    return q, b.k(x), b.v(x)


def disabled(b, x):
    q = b.q(x)
    b.k.enable_adapters(False)
    found = q, b.k(x), b.v(x)
    b.k.enable_adapters(True)
    return found


def requires_grad(b, x):
    q = b.q(x)
    return q, b.k(x.requires_grad_()), b.v(x)


UNEXPECTED = {
    second_tensor: {"k: another tensor came": 1},
    changed_in_place: {"k: the tensor changed": 1},
    grad_mode: {"k: grad mode changed": 1},
    autocast: {"k: autocast changed": 1},
    requires_grad: {"k: whether the tensor requires grad changed": 1},
    scale: {"k: the adapter's state changed": 1},
    weight: {"k: a weight changed": 1},
    disabled: {"v: the order of the calls changed": 1},
    (lambda b, x: (b.q(x), b.v(x), b.k(x))): {"v: the order of the calls changed": 1},
    (lambda b, x: (b.k(x), b.q(x), b.v(x))): {"k was called before q": 1, "v: the order of the calls changed": 1},
    (lambda b, x: (b.q(x), b.q(x), b.k(x), b.v(x))): {"k was not called": 1},
    (lambda b, x: (b.q(x),)): {"k was not called": 1},
    (lambda b, x: (b.q(x), b.k(x))): {"v was not called": 1},
    (lambda b, x: (b.q(x), b.k(x[:2]), b.v(x[:2]))): {"k: another tensor came": 1},
}


@pytest.mark.parametrize("act", UNEXPECTED, ids=lambda act: act.__name__)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_not_expected_runs_alone_and_is_counted(act, kind):
    alone, grouped = learnt(**KINDS[kind])
    # what a backward reads was changed in place: torch raises, with groups and without
    grads = act not in (requires_grad, changed_in_place, weight)

    def run(one):
        ys = one(inputs(), act)
        found = [y.detach() for y in ys]
        if grads:
            torch.autograd.backward([y for y in ys if y.requires_grad], [torch.ones_like(y) for y in ys if y.requires_grad])
        return found, [p.grad for p in one.parameters()]

    expected, found = run(alone), []
    counted = alone_since(grouped, lambda: found.extend(run(grouped)))
    assert counted == UNEXPECTED[act]
    assert all(torch.equal(one, other) for one, other in zip(found[0], expected[0], strict=True))
    assert all(_equal(one, other) for one, other in zip(found[1], expected[1], strict=True))
    # and the next call is a group's again
    randomise(grouped), randomise(alone)
    assert "lora_linear_group_forward" in ops(grouped, inputs())
    assert torch.equal(grouped(inputs()), alone(inputs()))


def test_a_group_that_keeps_missing_is_given_up():
    _, one = learnt()
    for _ in range(60):
        one(inputs())
    assert len(siblings(one).groups()) == 1
    for _ in range(3):
        one(inputs(), lambda b, x: b.q(x))
    assert siblings(one).groups() == [("q", "k", "v")]  # three of 63
    watching = siblings(one)
    for _ in range(3):
        one(inputs(), lambda b, x: b.q(x))
    assert watching.groups() == [] and watching.alone() == {"k was not called": 5}
    assert ops(one, inputs()) == ["lora_linear_forward"] * 4
    report = fuse(one)
    learn(one)
    assert report.groups() == {"base_model.model": [("q", "k", "v")]}


def test_a_hook_of_a_layer_runs_and_what_it_changes_is_seen():
    alone, grouped = learnt()
    for one in (alone, grouped):
        block(one).k.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        block(one).q.register_forward_hook(lambda m, args, y: y + 1)
    assert torch.equal(grouped(inputs()), alone(inputs()))
    assert siblings(grouped).alone() == {"k: another tensor came": 1}


def test_calls_outside_of_the_modules_own_run_alone():
    alone, one = learnt()
    x = inputs()
    for call in (lambda m: qkv(block(m), x), lambda m: block(m).forward(x, qkv)):
        assert all(torch.equal(found, y) for found, y in zip(call(one), call(alone), strict=True))
        assert "lora_linear_group_forward" not in ops(call, one)
    assert siblings(one).alone() == {} and siblings(one)._thread.round is None


def test_an_adapter_that_one_of_the_layers_lacks():
    alone, grouped = learnt()
    for one in (alone, grouped):
        one.add_adapter("other", type(one.peft_config["default"])(r=2, target_modules=["q", "v"]))
        randomise(one, 3)
        one.set_adapter("other")
    assert torch.equal(grouped(inputs()), alone(inputs()))
    assert siblings(grouped).alone() == {"k is in a state that another op takes": 1}
    for one in (alone, grouped):
        one.set_adapter("default")
    assert "lora_linear_group_forward" in ops(grouped, inputs())
    assert torch.equal(grouped(inputs()), alone(inputs()))


def test_an_output_requires_grad_if_its_own_layer_is_trained():
    alone, grouped = learnt()
    for one in (alone, grouped):
        block(one).k.requires_grad_(False)
    for x in (inputs(), inputs().requires_grad_()):
        found, expected = ([y.requires_grad for y in one(x, qkv)] for one in (grouped, alone))
        assert found == expected == [True, x.requires_grad, True]
        with torch.no_grad():
            assert "lora_linear_group_forward" in ops(grouped, x)


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_outputs_may_be_changed_in_place(shape):
    def act(b, x):
        x = x[: shape[0], None].expand(*shape, 24).contiguous() if len(shape) > 1 else x
        q, k, v = b.q(x), b.k(x), b.v(x)
        q.mul_(2), k.view(-1)[1:].neg_(), v.add_(k)
        return tuple(y.flatten(0, -2) for y in (q, k, v))

    alone, grouped = learnt()
    expected, found = results(alone, inputs(), act), results(grouped, inputs(), act)
    assert [n for n in expected if n != "x" and not _equal(found[n], expected[n])] == []
    torch.testing.assert_close(found["x"], expected["x"])
    assert siblings(grouped).alone() == {}


def test_replicas_leave_the_group_as_it_is():
    """What nn.DataParallel makes of a module for one call."""
    alone, one = learnt()
    replica = block(one)._replicate_for_data_parallel()
    for name, child in block(one).named_children():
        setattr(replica, name, child._replicate_for_data_parallel())
    for seed in range(3):
        assert torch.equal(replica(inputs(seed=seed)), block(alone)(inputs(seed=seed)))
    del replica, child
    gc.collect()
    assert "lora_linear_group_forward" in ops(one, inputs()) and siblings(one).alone() == {}


def test_weights_that_come_with_the_layers_own_call():
    """As sharding has it: elsewhere and empty before."""
    alone, grouped = learnt()
    for one in (alone, grouped):
        weight = block(one).k.base_layer.weight
        whole, weight.data = weight.data, torch.empty(0)
        block(one).k.register_forward_pre_hook(lambda m, args, w=weight, whole=whole: setattr(w, "data", whole))
    assert torch.equal(grouped(inputs()), alone(inputs()))
    assert siblings(grouped).alone() == {"k is in a state that another op takes": 1}


@pytest.mark.parametrize("lora_bias", [False, True])
def test_a_bias_that_each_call_makes_anew_is_in_no_group(lora_bias):
    alone, grouped = pair(lora_bias=lora_bias, target_modules=["q", "v"])
    for seed in range(4):
        assert torch.equal(grouped(inputs(seed=seed)), alone(inputs(seed=seed)))
    assert len(siblings(grouped).groups()) == (not lora_bias) and siblings(grouped).alone() == {}


def test_autocast_is_the_groups_too():
    alone, grouped = learnt()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped(inputs()), alone(inputs()))
        assert "lora_linear_group_forward" in ops(grouped, inputs())


def test_inference_mode_and_transforms_run_alone():
    alone, grouped = learnt()
    with torch.inference_mode():  # such a tensor does not tell that it was changed
        assert "lora_linear_group_forward" not in ops(grouped, inputs())
        assert torch.equal(grouped(inputs()), alone(inputs()))
    ones = [torch.func.jvp(lambda x, one=one: one(x), (inputs(),), (inputs(),)) for one in (grouped, alone)]
    assert all(torch.equal(found, y) for found, y in zip(*ones, strict=True))
    second = [torch.autograd.functional.hvp(lambda x, one=one: one(x).sum(), inputs(), inputs())[1] for one in (grouped, alone)]
    torch.testing.assert_close(*second)


def test_a_layer_of_two_modules_and_one_that_is_called_twice():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention(), Attention()
            self.second.q = self.first.q

        def forward(self, x):
            return self.second(self.first(x)) + self.first(x)

    alone, grouped = pair(net=Two)
    for seed in range(4):
        assert torch.equal(grouped(inputs(seed=seed)), alone(inputs(seed=seed)))
    assert sum(len(found) for found in fuse(grouped).groups().values()) == 2


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_learns_its_own_group(way):
    alone, one = learnt()
    other = COPIES[way](one)
    assert siblings(other) is not siblings(one) and siblings(other) is block(other).v.__dict__[groups.KEY]
    randomise(other, 9), randomise(alone, 9)
    for seed in range(4):
        assert torch.equal(other(inputs(seed=seed)), alone(inputs(seed=seed)))
    assert "lora_linear_group_forward" in ops(other, inputs()) and len(block(other)._forward_hooks) == 1
    layer = COPIES[way](block(one).q)
    assert torch.equal(layer(inputs()), block(one).q(inputs()))
    # it takes no sibling with it
    assert sum(isinstance(m, nn.Linear) for m in layer.modules()) == 3
