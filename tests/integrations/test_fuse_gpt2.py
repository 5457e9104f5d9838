"""GPT-2, whose Conv1D keeps the weight transposed: outputs, gradients and merging are PEFT's."""

import copy

import pytest
import torch
from fuse_helpers import errs_as_stock, fused_copy, gpt2, model, step, tokens

from lora_kernels import fuse, lora_linear

LAYERS = ["c_attn", "c_proj", "c_fc"]
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"c_fc": 7}, "alpha_pattern": {"c_attn": 2}},
    "trained bias": {"bias": "lora_only"},
    "dora with trained bias": {"bias": "all", "use_dora": True},
}


def stock_gpt2(**values):
    return model(net=gpt2, target_modules=LAYERS, fan_in_fan_out=True, task_type="CAUSAL_LM", **values).train()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind):
    stock = stock_gpt2(**KINDS[kind])
    fused = fused_copy(stock)
    steps = [step(one, tokens()) for one in (fused, stock, copy.deepcopy(stock).double())]
    assert any("bias" in name for name in steps[0]) is ("bias" in kind)
    assert len(steps[0]) >= 2 + 2 * 8 + 8 * ("dora" in kind)
    errs_as_stock(*steps)
    assert len(fuse(fused, strict=True).fused) == 8 and fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merging_and_back(use_dora):
    stock = stock_gpt2(use_dora=use_dora).eval()
    fused = fused_copy(stock)
    with torch.no_grad():
        expected = fused(**tokens()).logits
        for act in ("merge_adapter", "unmerge_adapter"):
            for one in (stock, fused):
                getattr(one, act)()
            # merging rounds the weight, once for both
            torch.testing.assert_close(fused(**tokens()).logits, stock(**tokens()).logits)
        torch.testing.assert_close(fused(**tokens()).logits, expected)


def test_the_op_takes_the_transposed_weight_without_a_copy():
    layer = fused_copy(stock_gpt2()).get_base_model().transformer.h[0].mlp.c_fc
    w, bias = layer.base_layer.weight.t(), layer.base_layer.bias
    assert not w.is_contiguous()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(layer(x), lora_linear(x, w, a, b, layer.scaling["default"], bias))
