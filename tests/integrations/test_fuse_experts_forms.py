"""Experts under PEFT's `target_parameters` whose forward is a form of its own, and what a call
keeps."""

import pytest
import torch
from experts_helpers import (
    EXPERTS,
    HIDDEN,
    INNER,
    NESTED,
    OUTER,
    TOP_K,
    Config,
    adapted,
    block,
    block_of,
    fused_of,
    inputs,
    left_to_peft,
    right,
)
from fuse_helpers import gradients
from torch import nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from lora_kernels import explain
from lora_kernels.nn.forms import gate_of

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@dtypes
def test_longcat_has_experts_that_are_the_token_itself(dtype):
    config = Config()
    config.n_routed_experts, config.zero_expert_num, config.hidden_act = EXPERTS - 2, 2, "silu"
    stock = block_of(LongcatFlashExperts, config, dtype=dtype)
    assert (stock.base_model.model.index >= EXPERTS - 2).any()
    _, report = right(stock, inputs(dtype))
    assert report.fused.keys() == {OUTER, NESTED}
    stock.base_model.model.experts.get_base_layer().identity_expert = nn.Dropout(0.0)
    left_to_peft(stock, "the identity of the experts is Dropout", inputs(dtype))


class Split(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.experts, self.sizes = JetMoeParallelExperts(EXPERTS, HIDDEN, INNER), sizes
        nn.init.normal_(self.experts.weight, std=0.3)

    def forward(self, x):
        return self.experts(x, self.sizes)


@dtypes
def test_jetmoe_gives_each_product_the_tokens_sorted_by_expert(dtype):
    torch.manual_seed(0)
    stock = adapted(Split([5, 0, 3, 2, 7, 0]).to(dtype), target_parameters=["experts.weight"])
    _, report = right(stock, inputs(dtype))
    assert list(report.fused) == [OUTER]
    stock.base_model.model.sizes = (5, 0, 3, 2, 7, 0)
    left_to_peft(stock, "the sizes are not how many of the tokens each of 6 experts has", inputs(dtype))


def test_no_copy_of_the_tokens_is_kept():
    """Of the tensors with a row for each choice up's output and the activation's, and down's for a
    router that learns."""
    fused, _ = fused_of(block())
    kept = []
    for learns in (True, False):
        fused.base_model.model.router.requires_grad_(learns)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
            fused(inputs().requires_grad_() if learns else inputs())
        rows = {shape for shape in kept if len(shape) == 2 and shape[0] == 17 * TOP_K and shape[1] > 3}
        assert rows == {(17 * TOP_K, 2 * INNER), (17 * TOP_K, INNER)} | ({(17 * TOP_K, HIDDEN)} if learns else set())


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": None, "relu2": None}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_which_gates_are_one_pass(activation):
    config = Config()
    config.hidden_act = activation
    stock = block_of(type(block().base_model.model.experts.get_base_layer()), config)
    module = stock.base_model.model.experts.get_base_layer()
    assert gate_of(module) == ACTIVATIONS[activation]
    right(stock, inputs())
    fused, _ = fused_of(stock)
    ran = {decision.op for decision in explain(fused, inputs()).decisions}
    assert ("gated_activation_forward" in ran) is (ACTIVATIONS[activation] is not None)
    if ACTIVATIONS[activation] is not None:
        seen = []
        handle = fused.base_model.model.experts.get_base_layer().act_fn.register_forward_hook(lambda *_: seen.append(1))
        gradients(fused, inputs())
        handle.remove()
        assert seen and gate_of(module) is not None


def test_gates_of_other_models_are_their_own():
    for name in ("GptOssExperts", "DeepseekV4Experts", "Step3p7Experts"):
        assert gate_of(block(name).base_model.model.experts.get_base_layer()) is None, name
