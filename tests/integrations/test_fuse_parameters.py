"""PEFT's `target_parameters` beside experts: one matrix, and what stays PEFT's."""

import pytest
import torch
from experts_helpers import (
    EXPERTS,
    GATED,
    HIDDEN,
    NESTED,
    OUTER,
    adapted,
    block,
    experts_class,
    fused_of,
    inputs,
    left_to_peft,
    right,
    routed,
)
from torch import nn
from transformers.integrations import moe


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(HIDDEN, 10)), nn.Parameter(torch.randn(10))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("made", [lambda: nn.Linear(HIDDEN, 10), lambda: nn.Linear(HIDDEN, 10, bias=False), Product])
def test_one_matrix(made, dtype):
    torch.manual_seed(0)
    stock = adapted(nn.ModuleDict({"layer": made()}).to(dtype), target_parameters=["layer.weight"])
    layer = stock.base_model.model.layer
    fused, report = right(layer, inputs(dtype))
    assert report.fused == {"": "reference" if dtype is torch.float64 else "cpu"}
    right(layer, inputs(dtype).view(1, 17, HIDDEN))


def test_hooks_are_pefts():
    stock = block()
    seen = []
    stock.base_model.model.experts.get_base_layer().register_forward_hook(lambda *_: seen.append(1))
    assert left_to_peft(stock, "a hook waits for the call of base_layer").left.keys() == {OUTER, NESTED}
    assert len(seen) == 2
    stock = block()
    stock.base_model.model.experts.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert left_to_peft(stock, "a hook waits for the call of base_layer").left.keys() == {OUTER}


def test_weights_that_learn_are_pefts():
    stock = block()
    stock.base_model.model.experts.get_base_layer().down_proj.requires_grad_()
    left_to_peft(stock, "the base weight requires grad (down_proj)")


def test_other_implementations_are_pefts(monkeypatch):
    def mine(self, x, index, weights):
        return 2 * moe.grouped_mm_experts_forward(self, x, index, weights)

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "mine", mine)
    left_to_peft(block(implementation="mine"), "the experts' implementation is mine")
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "grouped_mm", mine)
    left_to_peft(block(implementation="grouped_mm"), "the experts' implementation is grouped_mm")
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "eager", mine)
    left_to_peft(block(), "the experts' implementation is eager")


def test_a_forward_that_a_library_replaces_later_is_pefts(monkeypatch):
    mixtral = experts_class("MixtralExperts")
    stock = block()
    fused, report = fused_of(stock)
    fused(inputs())
    own = mixtral.forward
    monkeypatch.setattr(mixtral, "forward", lambda *args: 2 * own(*args))
    torch.testing.assert_close(fused(inputs()), stock(inputs()))
    assert report.fallbacks()[OUTER] == {"the forward of MixtralExperts is not known": 1}
    monkeypatch.setattr(mixtral, "forward", own)
    fused(inputs())
    assert report.fallbacks()[OUTER] == {"the forward of MixtralExperts is not known": 1}


def test_unknown_classes_are_pefts(monkeypatch):
    mixtral = experts_class("MixtralExperts")

    class Doubled(mixtral):
        def forward(self, *args):
            return 2 * super().forward(*args)

    class Eager(mixtral):
        """Whose forward transformers chooses; its own may not be what the attributes say."""

    for cls, implementation, reason in (
        (Doubled, "eager", "the forward of Doubled is not known"),
        (Eager, "eager", "the eager forward of Eager is not known"),
    ):
        stock = block(implementation=implementation)
        stock.base_model.model.experts.get_base_layer().__class__ = cls
        left_to_peft(stock, reason)


def test_parametrised_weights_are_pefts():
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    stock = block()
    nn.utils.parametrize.register_parametrization(stock.base_model.model.experts.get_base_layer(), "down_proj", Half())
    left_to_peft(stock, "another parametrization is on the module")


def test_other_parameters_are_pefts():
    stock = block("GptOssExperts", target_parameters=["experts.down_proj_bias", *GATED])
    left_to_peft(stock, "the adapted parameter is down_proj_bias")


def test_odd_indices_are_pefts():
    stock = block()
    fused, report = fused_of(stock)
    index, weights = routed(fused, inputs())
    for one in (fused, stock):
        with pytest.raises(RuntimeError, match="non-negative"):
            one.base_model.model.experts(inputs(), index - 1, weights)
    reason = "in the call of the experts index must hold numbers of experts, found a negative one"
    assert report.fallbacks()[OUTER] == {reason: 1}
    for implementation, error in (("eager", RuntimeError), ("batched_mm", IndexError)):
        stock = block(implementation=implementation)
        fused, report = fused_of(stock)
        beyond = index.clone()
        beyond[3, 1] = EXPERTS + 1
        for one in (fused, stock):
            with pytest.raises(error, match="Class values|out of bounds"):
                one.base_model.model.experts(inputs(), beyond, weights)
        reason = f"in the call of the experts index must hold numbers of experts up to {EXPERTS}, found {EXPERTS + 1}"
        assert report.fallbacks()[OUTER] == {reason: 1}


def test_other_arguments_are_pefts():
    stock = block()
    fused, report = fused_of(stock)
    x = inputs()
    index, weights = routed(fused, x)
    for one in (fused, stock):
        one.found = one.base_model.model.experts(x, top_k_index=index, top_k_weights=weights)
    torch.testing.assert_close(fused.found, stock.found)
    assert report.fallbacks()[OUTER] == {"the call has arguments besides the input": 1}
