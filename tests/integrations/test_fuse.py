"""fuse: PEFT's outputs, gradients and training, in every state that PEFT's own API can put a model
into."""

import copy
import warnings

import peft
import pytest
import torch
from fuse_helpers import inputs, model, pair, randomise, same
from torch import nn

import lora_kernels
from lora_kernels import fuse, unfuse
from lora_kernels.integrations.peft import FusedLinear

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {"rank_pattern": {"b": 5}, "alpha_pattern": {"a": 3}},
    "lora_bias": {"lora_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 100])
def test_outputs_and_gradients_are_pefts(kind, rows):
    stock, fused = pair(**KINDS[kind])
    for one in (stock, fused):
        one(inputs(rows=rows)).square().sum().backward()
    found = dict(fused.named_parameters())
    for name, p in stock.named_parameters():
        assert (p.grad is None) == (found[name].grad is None), name
        if p.grad is not None:
            # a float32 sum errs by the size of its terms, not of what is left after they cancel
            torch.testing.assert_close(found[name].grad, p.grad, rtol=1e-5, atol=2e-6 * float(p.grad.abs().max()))
    same(stock, fused, inputs(rows=rows))


@pytest.mark.parametrize("use_dora", [False, True])
def test_training_follows_pefts(use_dora):
    stock, fused = pair(use_dora=use_dora)
    for one in (stock, fused):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2, fused=True)
        for step in range(5):
            one(inputs() + step).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(stock.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-4, msg=name)


def test_a_16_bit_base_with_float32_adapters_runs_fused():
    stock, fused = pair(torch.bfloat16)
    x = inputs(torch.bfloat16)
    assert fused(x).dtype is torch.bfloat16
    torch.testing.assert_close(fused(x), stock(x), rtol=2e-2, atol=2e-2)
    assert fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("use_dora", [False, True])
def test_every_state_of_pefts_api(use_dora, tmp_path):
    stock, fused = pair(use_dora=use_dora)
    x = inputs()
    for one in (stock, fused):
        one.eval()
    with torch.no_grad():
        same(stock, fused, x)
        with stock.disable_adapter(), fused.disable_adapter():
            same(stock, fused, x)
        for one in (stock, fused):
            one.merge_adapter()
        same(stock, fused, x)
        for one in (stock, fused):
            one.unmerge_adapter()
        same(stock, fused, x)
        for one in (stock, fused):
            one.add_adapter("other", peft.LoraConfig(r=2, target_modules=["a"], use_dora=use_dora))
            randomise(one)
            one.set_adapter("other")
        same(stock, fused, x)
        for one in (stock, fused):
            one.base_model.set_adapter(["default", "other"])
        same(stock, fused, x)
        for one in (stock, fused):
            one.base_model.set_adapter("default")
            one.base_model.model.a.set_scale("default", 2.0)
        same(stock, fused, x)
        if not use_dora:
            names = ["default", "other", "__base__"] * 2 + ["other"]
            same(stock, fused, x, adapter_names=names)
    fused.save_pretrained(str(tmp_path))
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(stock).unload(), str(tmp_path)).eval()
    for name, p in peft.get_peft_model_state_dict(reloaded).items():
        assert torch.equal(p, peft.get_peft_model_state_dict(fused)[name]), name


def test_dora_under_no_grad_sees_every_edit():
    stock, fused = pair(use_dora=True)
    with torch.no_grad():
        for step in range(3):
            same(stock, fused, inputs())
            for one in (stock, fused):
                layer = one.base_model.model.a
                layer.lora_B["default"].weight.data.mul_(1.5)
                layer.lora_magnitude_vector["default"].weight.data.add_(0.1 * step)


def test_dropout_is_ours_and_off_in_eval():
    stock, fused = pair(lora_dropout=0.5)
    torch.manual_seed(0)
    one, two = fused(inputs()), fused(inputs())
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(fused(inputs()), one)
    same(stock.eval(), fused.eval(), inputs())


def test_unfuse_deepcopy_and_fusing_twice():
    stock, fused = pair()
    copied = copy.deepcopy(fused)
    assert isinstance(copied.base_model.model.a, FusedLinear)
    fuse(fused)
    unfuse(fused)
    assert type(fused.base_model.model.a) is type(stock.base_model.model.a)
    assert torch.equal(fused(inputs()), stock(inputs()))
    same(stock, copied, inputs())


def test_the_report_names_layers_backends_and_reasons():
    report = fuse(model())
    assert set(report.fused.values()) == {"cpu"} and not report.left
    assert "2 of 2 LoRA layers fused; backend cpu" in str(report)
    trained = model()
    for name in "ab":
        getattr(trained.base_model.model, name).base_layer.weight.requires_grad_()
    left = fuse(trained)
    assert not left.fused and set(left.left.values()) == {"the base weight requires grad"}


def test_bad_models_are_refused_unchanged():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        fuse(3)
    with pytest.raises(ValueError, match="must have LoRA layers"):
        fuse(nn.Linear(3, 3))
    one = model()
    one.base_model.model.b.base_layer.weight.requires_grad_()
    before = [type(m) for m in one.modules()]
    with pytest.raises(ValueError, match="strict wants every LoRA layer"):
        fuse(one, strict=True)
    assert [type(m) for m in one.modules()] == before


def test_a_fused_model_runs_the_kernels_without_a_warning():
    _, fused = pair(use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decisions = lora_kernels.explain(fused, inputs()).decisions
    assert {d.chosen for d in decisions if d.op == "lora_linear_forward"} == {"cpu"}
