"""accelerate's hooks on the layers of a fused model: they run, fuse and unfuse keep them, and they
can be removed."""

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from fuse_helpers import inputs, model, pair, same

from lora_kernels import fuse, unfuse
from lora_kernels.integrations.peft import FusedLinear

HOOKED = "a hook waits for the call of base_layer, lora_A, lora_B or lora_dropout"
INNER = ["base_layer", "lora_A.default", "lora_B.default"]


class Doubles(ModelHook):
    """Changes the input and the output, so that a hook that is passed over shows."""

    def pre_forward(self, module, x):
        return (2 * x,), {}

    def post_forward(self, module, output):
        return output - 3


def layer(one):
    return one.base_model.model.a


def hook(one, where=""):
    add_hook_to_module(layer(one).get_submodule(where), Doubles())


def runs_fused(one):
    before = sum(fuse(one).fallbacks().get("base_model.model.a", {}).values())
    one(inputs())
    return sum(fuse(one).fallbacks().get("base_model.model.a", {}).values()) == before


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("first", ["hook", "fuse"])
def test_a_hook_on_the_layer_wraps_the_fused_forward(first, use_dora):
    stock = model(use_dora=use_dora)
    plain = stock(inputs())
    fused = copy.deepcopy(stock)
    for act in (fuse, hook) if first == "fuse" else (hook, fuse):
        act(fused)
    hook(stock)
    assert not torch.allclose(stock(inputs()), plain)
    same(stock, fused, inputs())
    same(stock, copy.deepcopy(fused), inputs())
    assert runs_fused(fused)

    unfuse(fused)
    assert torch.equal(fused(inputs()), stock(inputs()))
    fuse(fused)
    remove_hook_from_module(layer(fused))
    torch.testing.assert_close(fused(inputs()), plain)
    assert runs_fused(fused)
    unfuse(fused)
    assert torch.equal(fused(inputs()), plain)


def test_a_hook_that_came_and_went_leaves_no_fused_forward_behind():
    """accelerate leaves the bound forward on the layer; kept through unfuse, it would be one of
    another class."""
    stock, fused = pair()
    hook(fused)
    remove_hook_from_module(layer(fused))
    assert "forward" in vars(layer(fused)) and runs_fused(fused)
    unfuse(fused)
    assert torch.equal(fused(inputs()), stock(inputs()))
    with fused.disable_adapter(), stock.disable_adapter():
        assert torch.equal(fused(inputs()), stock(inputs()))
    hook(fused)
    hook(stock)
    assert torch.equal(fused(inputs()), stock(inputs()))


def test_two_hooks_on_the_layer():
    stock, fused = pair()
    for one in (stock, fused):
        hook(one)
        add_hook_to_module(layer(one), AlignDevicesHook("cpu"), append=True)
    same(stock, fused, inputs())
    assert runs_fused(fused)
    unfuse(fused)
    assert torch.equal(fused(inputs()), stock(inputs()))


@pytest.mark.parametrize("where", INNER)
@pytest.mark.parametrize("first", ["hook", "fuse"])
def test_a_hook_on_an_inner_module_sends_calls_to_peft(where, first):
    stock, fused = model(), model()
    if first == "fuse":
        fuse(fused)
    hook(fused, where)
    hook(stock, where)
    report = fuse(fused)
    assert report.left == {"base_model.model.a": HOOKED} and list(report.fused) == ["base_model.model.b"]
    same(stock, fused, inputs())
    assert report.fallbacks() == {"base_model.model.a": {HOOKED: 1}}

    for one in (stock, fused):
        remove_hook_from_submodules(one)
    assert not fuse(fused).left and runs_fused(fused)
    same(stock, fused, inputs())


def test_a_forward_replaced_by_the_user_is_kept_under_a_hook_too():
    for hooked in (False, True):
        one = model()
        layer(one).forward = lambda x: x.new_ones(len(x), 40)
        if hooked:
            hook(one)
        expected = one(inputs())
        report = fuse(one)
        assert report.left == {"base_model.model.a": "its forward is replaced on the instance"}
        assert type(layer(one)) is not FusedLinear
        torch.testing.assert_close(one(inputs()), expected)


@pytest.mark.parametrize("first", ["offload", "fuse"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_cpu_offload_runs_on_the_kernels(first, use_dora):
    """PEFT's own DoRA layer cannot run under accelerate's offloading; here it does."""
    stock = model(use_dora=use_dora, lora_dropout=0.1).eval()
    with torch.no_grad():
        expected = stock(inputs())
        fused = copy.deepcopy(stock)
        reports = []
        acts = [
            lambda: accelerate.cpu_offload(fused, execution_device="cpu"),
            lambda: reports.append(fuse(fused, strict=True)),
        ]
        for act in acts if first == "offload" else reversed(acts):
            act()
        for _ in range(2):
            assert layer(fused).base_layer.weight.is_meta and layer(fused).lora_B["default"].weight.is_meta
            torch.testing.assert_close(fused(inputs()), expected)
        assert list(reports[0].fused.values()) == ["cpu"] * 2 and not reports[0].fallbacks()
        remove_hook_from_submodules(fused)
        torch.testing.assert_close(fused(inputs()), expected)
        assert runs_fused(fused)


def test_offloaded_weights_stay_for_backward():
    """The gradients of offloaded parameters are lost, in PEFT too; the input's is not."""
    stock, fused = pair()
    found = []
    for one in (stock, fused):
        accelerate.cpu_offload(one, execution_device="cpu")
        x = inputs().requires_grad_()
        one(x.view(1, *x.shape)).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])
    assert not fuse(fused).fallbacks()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_dispatch_with_hooks_on_every_module(use_dora):
    stock, fused = pair(use_dora=use_dora)
    accelerate.dispatch_model(fused, {"": "cpu"}, force_hooks=True)
    report = fuse(fused, strict=True)
    same(stock, fused, inputs())
    results = []
    for one in (stock, fused):
        one(inputs()).square().mean().backward()
        results.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    torch.testing.assert_close(results[1], results[0])
    assert not report.fallbacks()
    remove_hook_from_submodules(fused)
    assert not fuse(fused).left
    same(stock, fused, inputs())


def test_a_hook_that_would_move_the_input_sends_calls_to_peft():
    fused = pair()[1]
    hook = AlignDevicesHook("cpu")
    add_hook_to_module(layer(fused).base_layer, hook)
    same(model(), fused, inputs())
    assert runs_fused(fused)
    hook.execution_device = "meta"
    report = fuse(fused)
    with pytest.raises(RuntimeError):  # PEFT's: x is moved away from the weight
        fused(inputs())
    (reason,) = report.fallbacks()["base_model.model.a"]
    assert reason == "accelerate runs base_layer, lora_A or lora_B on another device than the input's"


def test_hooks_of_both_kinds_are_peft_s():
    stock, fused = pair()
    for one in (stock, fused):
        add_hook_to_module(layer(one).base_layer, AlignDevicesHook("cpu"))
        add_hook_to_module(layer(one).base_layer, Doubles(), append=True)
        layer(one).lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)
    same(stock, fused, inputs())
    assert not runs_fused(fused)


def test_what_the_kernels_do_not_cover_runs_in_peft_inside_the_hooks():
    stock, fused = (one.eval() for one in pair())
    layer(stock).base_layer.weight.requires_grad_()
    layer(fused).base_layer.weight.requires_grad_()
    for one in (stock, fused):
        accelerate.cpu_offload(one, execution_device="cpu")
    report = fuse(fused)
    assert report.left["base_model.model.a"] == "the base weight requires grad"
    same(stock, fused, inputs())
    assert report.fallbacks()["base_model.model.a"] == {"the base weight requires grad": 1}
    assert layer(fused).base_layer.weight.is_meta and "forward" in vars(layer(fused).base_layer)


def test_an_error_inside_leaves_every_module_as_it_was():
    fused = pair()[1]
    accelerate.dispatch_model(fused, {"": "cpu"}, force_hooks=True)
    before = [dict(vars(module)) for module in layer(fused).modules()]
    with pytest.raises(ValueError, match="24 features"):
        fused(torch.randn(3, 23))
    assert [dict(vars(module)) for module in layer(fused).modules()] == before
    assert layer(fused).base_layer is layer(fused)._modules["base_layer"]
    same(model(), fused, inputs())
