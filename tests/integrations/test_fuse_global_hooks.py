"""Global module hooks: trackers and FLOP counters that want no inner modules leave the calls on the
kernels; whatever may look inside a layer has PEFT's calls."""

import contextlib

import pytest
import torch
from torch.nn.modules import module as module_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from lora_kernels import fuse, nn
from tests.integrations.fuse_helpers import inputs, pair

EVERY = "a hook waits for the call of every module"
REGISTER = {
    "pre-forward": module_hooks.register_module_forward_pre_hook,
    "forward": module_hooks.register_module_forward_hook,
    "backward": module_hooks.register_module_full_backward_hook,
    "pre-backward": module_hooks.register_module_full_backward_pre_hook,
}


def results(one):
    x = inputs().requires_grad_()
    y = one(x)
    one.zero_grad()
    y.square().mean().backward()  # trackers know no torch.autograd.grad
    return [y, x.grad, *(p.grad for p in one.parameters() if p.requires_grad)]


@contextlib.contextmanager
def registered(kind, hook):
    handle = REGISTER[kind](hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_module_tracker_leaves_calls_on_the_kernels(use_dora):
    stock, fused = pair(use_dora=use_dora)
    report, seen = fuse(fused), []
    fused.base_model.model.a.register_forward_pre_hook(lambda *_: seen.append(set(tracker.parents)))
    with ModuleTracker() as tracker:
        torch.testing.assert_close(results(fused), results(stock))
        with torch.no_grad():
            fused(inputs())
        assert tracker.parents == {"Global"}
    net = "PeftModel.base_model.model"
    assert seen == [{"Global", "PeftModel", net, f"{net}.a"}] * 2 and not report.fallbacks()


@pytest.mark.parametrize("values", [{}, {"lora_dropout": 0.2}], ids=["lora", "dropout"])
def test_flops_are_counted_as_of_peft(values):
    counts = []
    for one in pair(**values):
        with FlopCounterMode(display=False) as counter:
            results(one)
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(inputs())
        counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:] and counts[0] > counts[1] > 0
    assert not fuse(one).fallbacks()


def test_flops_of_dora_are_those_of_the_kernels():
    """PEFT's layer forms BA and multiplies with A and B twice."""
    stock, fused = pair(use_dora=True)
    counts = []
    for one in (stock, fused):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(inputs())
        counts.append(counter.get_total_flops())
    forward = sum(2 * 7 * (n * k + 4 * (n + k)) for n, k in ((40, 24), (16, 40)))
    norm = sum(2 * 4 * (n * k + 4 * k + 4 * n) for n, k in ((40, 24), (16, 40)))
    assert counts[1] == forward + norm < counts[0]


def test_flops_of_a_native_layer_and_a_formula_of_the_users():
    layer = nn.LoRALinear(24, 40, r=4)
    with FlopCounterMode(display=False) as counter:
        layer(inputs())
    assert counter.get_total_flops() == 2 * 7 * (24 * 40 + 4 * 64)
    forward = torch.ops.lora_kernels.lora_linear_forward
    with FlopCounterMode(display=False, custom_mapping={forward: lambda *args, **kwargs: 5}) as counter:
        layer(inputs())
    assert counter.get_total_flops() == 5


@pytest.mark.parametrize("kind", REGISTER)
def test_an_unknown_hook_sees_every_call(kind):
    stock, fused = pair()
    report, seen = fuse(fused), []
    with registered(kind, lambda module, *_: seen.append(type(module).__name__)):
        results(stock)
        expected, seen = seen, []
        results(fused)
    assert [name.replace("Fused", "") for name in seen] == [name.replace("Fused", "") for name in expected]
    assert seen.count("Linear") >= 4
    assert list(report.fallbacks().values()) == [{EVERY: 1}] * 2
    results(fused)
    assert list(report.fallbacks().values()) == [{EVERY: 1}] * 2


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", REGISTER)
def test_an_unknown_hook_sees_the_tensors_that_it_saw_under_peft(kind, use_dora):
    seen = []

    def hook(module, *values):
        tensors = [t.detach().clone() for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
        seen.append((type(module).__name__.replace("Fused", ""), tensors))

    calls = []
    for one in pair(use_dora=use_dora):
        with registered(kind, hook):
            results(one)
        calls.append(seen[:])
        seen.clear()
    stock, fused = calls
    assert len(stock) > 8 and [name for name, _ in stock] == [name for name, _ in fused]
    for (_, wanted), (_, found) in zip(stock, fused, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(wanted, found, strict=True))


def test_what_a_hook_makes_of_an_inner_module_counts():
    def hook(module, args, output):
        return 3 * output if getattr(module, "out_features", None) == 4 else None  # lora_A

    stock, fused = pair()
    plain = stock(inputs())
    with registered("forward", hook):
        found, wanted = fused(inputs()), stock(inputs())
    assert torch.equal(found, wanted) and not torch.allclose(wanted, plain)


class Words(torch.nn.Module):
    """A layer of each kind that is no linear one."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = torch.nn.Embedding(12, 24), torch.nn.Conv1d(24, 24, 3, padding=1)
        self.attend = torch.nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        return self.attend(x, x, x, need_weights=False)[0]


def test_an_unknown_hook_sees_into_layers_of_every_kind():
    stock, fused = pair(torch.float64, net=Words, target_modules=["embed", "conv", "attend"])
    report, seen, ids = fuse(fused), [], torch.arange(10).view(2, 5)
    assert len(report.fused) == 3
    with torch.no_grad():
        torch.testing.assert_close(fused(ids), stock(ids))
        assert not report.fallbacks()
        with registered("forward", lambda module, *_: seen.append(type(module).__name__)):
            expected = stock(ids)
            wanted, seen = seen, []
            assert torch.equal(fused(ids), expected)
    assert [name.replace("Fused", "") for name in seen] == wanted
    assert list(report.fallbacks().values()) == [{EVERY: 1}] * 3


def test_a_profiler_leaves_calls_on_the_kernels():
    stock, fused = pair()
    report = fuse(fused)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_modules=True, record_shapes=True):
        torch.testing.assert_close(results(fused), results(stock))
    assert not report.fallbacks()


def test_a_hook_says_that_it_wants_whole_layers_only():
    stock, fused = pair()
    report, seen = fuse(fused), []

    def hook(module, args, output):
        seen.append((type(module).__name__, output))

    hook.whole_lora_layers = True
    with registered("forward", hook):
        torch.testing.assert_close(results(fused), results(stock))
    assert [name for name, _ in seen][:2] == ["FusedLinear", "FusedLinear"] and not report.fallbacks()
    torch.testing.assert_close(seen[0][1], stock.base_model.model.a(inputs()))

    with registered("forward", hook), registered("forward", lambda *_: None):
        results(fused)
    assert list(report.fallbacks().values()) == [{EVERY: 1}] * 2
