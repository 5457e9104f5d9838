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
def test_cpu_offload_runs_in_peft_and_its_removal_on_the_kernels(first):
    """LoRA only: PEFT's own DoRA layer cannot run under accelerate's offloading."""
    stock = model().eval()
    with torch.no_grad():
        expected = stock(inputs())
        fused = copy.deepcopy(stock)
        acts = [lambda: accelerate.cpu_offload(fused, execution_device="cpu"), lambda: fuse(fused)]
        for act in acts if first == "offload" else reversed(acts):
            act()
        assert layer(fused).base_layer.weight.is_meta
        torch.testing.assert_close(fused(inputs()), expected)
        assert layer(fused).base_layer.weight.is_meta and not runs_fused(fused)
        remove_hook_from_submodules(fused)
        torch.testing.assert_close(fused(inputs()), expected)
        assert runs_fused(fused)


def test_dispatch_with_hooks_on_every_module():
    stock, fused = pair()
    accelerate.dispatch_model(fused, {"": "cpu"}, force_hooks=True)
    report = fuse(fused)
    assert set(report.left.values()) == {HOOKED} and len(report.left) == 2
    same(stock, fused, inputs())
    remove_hook_from_submodules(fused)
    assert not fuse(fused).left
    same(stock, fused, inputs())
