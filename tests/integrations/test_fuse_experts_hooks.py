"""accelerate's hooks on the experts of a fused model and within: those that only move weights run
around the kernels."""

import copy
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_submodules
from experts_helpers import GATED, NESTED, OUTER, adapted, block, fused_of, inputs, left_to_peft, right, routed
from fuse_helpers import gradients
from torch import nn

from lora_kernels import fuse

HOOKED = "a hook waits for the call of base_layer"


def layer(one):
    return one.base_model.model.experts


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
@pytest.mark.parametrize("first", ["offload", "fuse"])
def test_offloaded_experts_run_on_the_kernels(first, name):
    """PEFT's own layer cannot run so: A and B stay elsewhere."""
    stock = block(name).eval()
    with torch.no_grad():
        expected = stock(inputs())
        fused = copy.deepcopy(stock)
        reports = []
        acts = [lambda: accelerate.cpu_offload(layer(fused), execution_device="cpu"), lambda: reports.append(fuse(fused))]
        for act in acts if first == "offload" else reversed(acts):
            act()
        for _ in range(2):
            module = layer(fused).get_base_layer()
            assert module.down_proj.is_meta and layer(fused).lora_B["default"].weight.is_meta
            torch.testing.assert_close(fused(inputs()), expected)
        assert reports[0].fused == {OUTER: "cpu", NESTED: "cpu"} and not reports[0].fallbacks() and not reports[0].left
        remove_hook_from_submodules(fused)
        torch.testing.assert_close(fused(inputs()), expected)
        assert not reports[0].fallbacks()
        accelerate.cpu_offload(layer(stock), execution_device="cpu")
        with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
            stock(inputs())


def test_a_matrix_is_offloaded_too():
    torch.manual_seed(0)
    stock = adapted(nn.ModuleDict({"layer": nn.Linear(24, 10)}), target_parameters=["layer.weight"]).base_model.model.layer
    expected, (fused, report) = stock(inputs()), fused_of(stock)
    accelerate.cpu_offload(fused, execution_device="cpu")
    torch.testing.assert_close(fused(inputs()), expected)
    assert not report.fallbacks()


def test_offloaded_weights_stay_for_backward():
    """The gradients of offloaded parameters are lost; the input's and the router's are not."""
    stock = block(dtype=torch.float64)
    fused, report = fused_of(stock)
    accelerate.cpu_offload(layer(fused), execution_device="cpu")
    found, wanted = gradients_of_rest(fused), gradients_of_rest(stock)
    assert len(found) == 3 and not report.fallbacks()
    torch.testing.assert_close(found, wanted)


def gradients_of_rest(one):
    x, router = inputs(torch.float64).requires_grad_(), one.base_model.model.router.weight
    y = one(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, router])]


@pytest.mark.parametrize("target", [GATED, GATED[:1]], ids=str)
def test_hooks_on_every_module(target):
    stock = block(target_parameters=target)
    fused, report = fused_of(stock)
    accelerate.dispatch_model(fused, {"": "cpu"}, force_hooks=True)
    assert not fuse(fused).left
    torch.testing.assert_close(gradients(fused, inputs()), gradients(stock, inputs()))
    assert not report.fallbacks()
    remove_hook_from_submodules(fused)
    right(fused, inputs())


def test_a_hook_that_would_move_the_input_is_pefts():
    stock = block()
    fused, report = fused_of(stock)
    hook = AlignDevicesHook("cpu")
    add_hook_to_module(layer(fused).get_base_layer(), hook)
    torch.testing.assert_close(fused(inputs()), stock(inputs()))
    assert not report.fallbacks()
    hook.execution_device = "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        fused(inputs())
    (reason,) = report.fallbacks()[OUTER]
    assert reason == "accelerate runs base_layer, lora_A or lora_B on another device than the input's"


class Doubles(ModelHook):
    """Changes the input and the output, so that a hook that is passed over shows."""

    def pre_forward(self, module, x, *args):
        return (2 * x, *args), {}

    def post_forward(self, module, output):
        return output - 3


@pytest.mark.parametrize("where", ["base_layer", "base_layer.base_layer"])
def test_other_hooks_are_pefts(where):
    stock = block()
    add_hook_to_module(layer(stock).get_submodule(where), AlignDevicesHook("cpu"))
    add_hook_to_module(layer(stock).get_submodule(where), Doubles(), append=True)
    left_to_peft(stock, HOOKED)


def test_hooks_of_a_and_b_that_peft_never_calls():
    stock = block()
    add_hook_to_module(layer(stock).lora_A["default"], Doubles())
    layer(stock).lora_B["default"].register_forward_hook(lambda *_: 1 / 0)
    right(stock, inputs())


def test_what_the_kernels_do_not_cover_is_pefts_with_its_reason():
    stock = block()
    layer(stock).get_base_layer().down_proj.requires_grad_()
    fused, report = fused_of(stock)
    add_hook_to_module(layer(fused).get_base_layer(), AlignDevicesHook("cpu"))
    torch.testing.assert_close(fused(inputs()), stock(inputs()))
    assert report.fallbacks()[OUTER] == {"the base weight requires grad (down_proj)": 1}


def test_an_error_inside_leaves_every_module_as_it_was():
    fused, _ = fused_of(block())
    accelerate.dispatch_model(fused, {"": "cpu"}, force_hooks=True)
    before = [dict(vars(module)) for module in layer(fused).modules()]
    index, weights = routed(fused, inputs())
    with pytest.raises(ValueError, match="24 features"):
        layer(fused)(torch.randn(17, 23), index, weights)
    assert [dict(vars(module)) for module in layer(fused).modules()] == before
    right(fused, inputs())


def test_two_threads_call_one_layer():
    stock = block()
    fused, report = fused_of(stock)
    accelerate.dispatch_model(fused, {"": "cpu"}, force_hooks=True)
    wanted = stock(inputs())
    with ThreadPoolExecutor(2) as threads:
        for y in threads.map(lambda _: fused(inputs()), range(40)):
            torch.testing.assert_close(y, wanted)
    assert not report.fallbacks()
