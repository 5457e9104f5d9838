"""A LoRA head over trained tokens, tied to the embedding that trains them: PEFT's numbers, without
a copy of W."""

import copy

import peft
import pytest
import torch
from fuse_helpers import VOCABULARY, errs_as_stock, fused_copy, llama, model, step, tokens

from lora_kernels import fuse

HEAD = "base_model.model.lm_head"


def made(dtype=torch.float32, indices=(3, 5, 40), **values):
    config = {"trainable_token_indices": {"embed_tokens": list(indices)}, "target_modules": ["q_proj", "lm_head"]}
    one = model(dtype, net=lambda: llama(tie_word_embeddings=True), task_type="CAUSAL_LM", **config | values)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if "trainable_tokens_delta" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return one.train()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_pefts(dtype, dropout):
    stock = made(dtype, lora_dropout=dropout)
    fused = copy.deepcopy(stock)
    report = fuse(fused, strict=True)
    if dropout:
        stock.eval(), fused.eval()
    steps = [step(one, tokens()) for one in (fused, stock, copy.deepcopy(stock).double())]
    assert any("trainable_tokens_delta" in name for name in steps[0])
    errs_as_stock(*steps)
    assert HEAD in report.fused and report.fallbacks() == {}


def test_the_head_alone():
    stock = made()
    fused = fused_copy(stock)
    found = []
    for one in (fused, stock):
        layer = one.get_submodule(HEAD)
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append([y, x.grad] + [p.grad for p in layer.parameters() if p.grad is not None])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    # the tokens' own outputs, and no others, are corrected
    with torch.no_grad():
        for one in (fused, stock):
            one.get_submodule(HEAD).base_layer.token_adapter.trainable_tokens_delta["default"].mul_(-3)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
        y, before = fused.get_submodule(HEAD)(x), found[0][0]
        torch.testing.assert_close(y, stock.get_submodule(HEAD)(x))
        assert before.shape == (2, 3, VOCABULARY) and y.shape == (4, VOCABULARY)


def test_no_gradient_of_all_of_w(monkeypatch):
    fused = fused_copy(made())
    head = fused.get_submodule(HEAD)
    monkeypatch.setattr(type(head.base_layer.token_adapter), "get_merged_weights", lambda *args: pytest.fail("copied"))
    head(torch.randn(2, 32)).sum().backward()


def test_states_of_the_layer():
    stock = made()
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (one.get_submodule(HEAD)(x) for one in (fused, stock))
    assert found.dtype is wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    with fused.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(fused(**tokens()).logits, stock(**tokens()).logits)
    for one in (fused, stock):
        one.get_submodule(HEAD).base_layer.token_adapter.merge()
    torch.testing.assert_close(fused.get_submodule(HEAD)(x), stock.get_submodule(HEAD)(x))
    reasons = {"the adapters are disabled": 1, "the trained tokens are merged or disabled": 1}
    assert report.fallbacks()[HEAD] == reasons
    compiled = torch.compile(fused.get_submodule(HEAD), backend="eager")
    torch.testing.assert_close(compiled(x), stock.get_submodule(HEAD)(x))


@pytest.mark.parametrize("place", ["base_layer", "base_layer.token_adapter", "base_layer.token_adapter.base_layer", "lora_A"])
def test_hooks_inside_are_pefts(place):
    stock, calls = made(), []
    fused = copy.deepcopy(stock)
    fused.get_submodule(f"{HEAD}.{place}.default" if place == "lora_A" else f"{HEAD}.{place}").register_forward_hook(
        lambda module, args, y: calls.append(place)
    )
    assert HEAD in fuse(fused).left
    torch.testing.assert_close(fused(**tokens()).logits, stock(**tokens()).logits)
    # trained tokens are not asked for their inner layer
    assert calls == ([] if place.endswith("base_layer.token_adapter.base_layer") else [place])


def test_what_is_left_to_peft():
    assert fuse(made(indices=(3, 3))).left == {HEAD: "a token is trained twice"}
    stock = made()
    stock.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    stock.base_model.set_adapter(["default", "other"])
    several = copy.deepcopy(stock)
    assert fuse(several).left == {HEAD: "several adapters are active, over trainable tokens"}
    torch.testing.assert_close(several(**tokens()).logits, stock(**tokens()).logits)
