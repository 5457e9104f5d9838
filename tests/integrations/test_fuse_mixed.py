"""Models that hold more than plain LoRA layers: what is not ours stays PEFT's, works, and is named
with a reason."""

import copy

import peft
import pytest
import torch
from fuse_helpers import LLAMA_LAYERS, errs_as_stock, fused_copy, llama, model, step, tokens
from peft.tuners.lora.layer import MultiheadAttention
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from lora_kernels import fuse, unfuse
from lora_kernels.integrations.peft import FusedLinear

PREFIX = "base_model.model."


class Own(nn.Linear):
    """A linear layer of the user's, with a forward of its own."""

    def forward(self, x):
        return torch.sin(super().forward(x))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(11, 6), nn.Conv2d(1, 3, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.plain, self.own, self.head = nn.Linear(18, 12), Own(12, 8), nn.Linear(8, 5)

    def forward(self, ids):
        x = self.words(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.conv(x[:, None]).transpose(1, 2).flatten(2)
        return self.head(self.own(torch.tanh(self.plain(x))))


TARGETS = ["words", "conv", "attention", "plain", "own"]
LEFT = {"own": "base_layer is Own"}


def ids():
    return torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(4))


def losses(one, steps=3):
    """The outputs of some steps, and the gradients of the last."""
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
    found = {}
    for number in range(steps):
        optimizer.zero_grad()
        found[f"step {number}"] = one(ids())
        found[f"step {number}"].square().mean().backward()
        optimizer.step()
    return found | {name: p.grad for name, p in one.named_parameters() if p.grad is not None}


def test_each_kind_of_layer_is_named_with_its_reason():
    stock = model(net=Mixed, target_modules=TARGETS, modules_to_save=["head"]).train()
    fused = copy.deepcopy(stock)
    before = {name: type(m) for name, m in fused.named_modules()}
    report = fuse(fused)
    assert {name.removeprefix(PREFIX): reason for name, reason in report.left.items()} == LEFT
    kinds = {"words": peft.tuners.lora.Embedding, "conv": peft.tuners.lora.Conv2d, "plain": peft.tuners.lora.Linear}
    kinds["attention"] = MultiheadAttention
    assert {name.removeprefix(PREFIX) for name in report.fused} == set(kinds)
    changed = {name for name, m in fused.named_modules() if type(m) is not before[name]}
    assert all(f"{PREFIX}{name}" in changed and before[f"{PREFIX}{name}"] is kind for name, kind in kinds.items())
    assert all(before[name] in kinds.values() for name in changed)
    lines = str(report).splitlines()
    assert all(f"    {reason}: 1 layer: {PREFIX}{name}" in lines for name, reason in LEFT.items())

    with pytest.raises(ValueError, match=r"strict wants every LoRA layer on our kernels, found \d of \d left"):
        fuse(fused, strict=True)
    exact = losses(copy.deepcopy(stock).double())
    plain = losses(copy.deepcopy(stock))
    found = losses(fused)
    assert any("modules_to_save" in name for name in found)
    errs_as_stock(found, plain, exact)
    unfuse(fused)
    assert {name: type(m) for name, m in fused.named_modules()} == before


def test_pefts_attention():
    """The adapter of out_proj acts twice there."""
    stock = model(net=lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2)}), target_modules=["attention"])
    layer = stock.base_model.model["attention"]
    base, inner, x = layer.base_layer, layer.base_layer.out_proj, torch.randn(4, 1, 6)
    plain = nn.MultiheadAttention(6, 2)
    with torch.no_grad():
        plain.in_proj_weight.copy_(base.in_proj_weight + layer.get_delta_weight("default"))
        plain.out_proj.weight.copy_(inner.base_layer.weight + 2 * inner.get_delta_weight("default"))
    torch.testing.assert_close(layer(x, x, x)[0], plain(x, x, x)[0])


def test_a_classifier_head_that_is_trained_whole(tmp_path):
    def net():
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=48, num_labels=3, pad_token_id=0, **sizes)
        return LlamaForSequenceClassification(config)

    stock = model(net=net, target_modules=LLAMA_LAYERS, task_type="SEQ_CLS").train()
    fused = fused_copy(stock)
    batch = tokens() | {"labels": torch.tensor([2, 0])}
    steps = [step(one, batch) for one in (fused, stock, copy.deepcopy(stock).double())]
    assert any("score.modules_to_save" in name for name in steps[0])
    errs_as_stock(*steps)
    assert len(fuse(fused, strict=True).fused) == 2 * len(LLAMA_LAYERS)

    with torch.no_grad():
        fused.get_base_model().score.modules_to_save["default"].weight.mul_(-3)
    fused.save_pretrained(str(tmp_path))
    read = peft.PeftModel.from_pretrained(copy.deepcopy(stock).unload(), str(tmp_path))
    torch.testing.assert_close(read.eval()(**batch).logits, fused.eval()(**batch).logits)


def test_single_tokens_that_are_trained():
    stock = model(
        net=llama, target_modules=LLAMA_LAYERS, task_type="CAUSAL_LM", trainable_token_indices={"embed_tokens": [3, 5]}
    ).train()
    fused = fused_copy(stock)
    steps = [step(one, tokens()) for one in (fused, stock, copy.deepcopy(stock).double())]
    assert any("trainable_tokens" in name for name in steps[0])
    errs_as_stock(*steps)
    assert len(fuse(fused, strict=True).fused) == 2 * len(LLAMA_LAYERS)


def test_lora_on_a_parameter_beside_lora_on_layers():
    stock = model(target_modules=["a"], target_parameters=["b.weight"])
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    assert report.fused.keys() == {f"{PREFIX}a", f"{PREFIX}b"} and type(fused.base_model.model.a) is FusedLinear
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(fused(x), stock(x))
