"""Gradient checkpointing of fused models: the recomputed forward draws the same masks, the
gradients keep their bits."""

import copy

import pytest
import torch
from fuse_helpers import LLAMA_LAYERS, errs_as_stock, fused_copy, inputs, llama, model, step, tokens
from torch.utils.checkpoint import checkpoint

from lora_kernels import fuse
from lora_kernels.integrations.peft import FusedLinear

KINDS = {"lora": {}, "dora": {"use_dora": True}}
kinds = pytest.mark.parametrize("kind", KINDS)
reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def tiny_llama(kind, **values):
    return model(net=llama, target_modules=LLAMA_LAYERS, task_type="CAUSAL_LM", **KINDS[kind], **values).train()


def checkpointed(one, use_reentrant):
    one = copy.deepcopy(one)
    one.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    one.enable_input_require_grads()
    return one


def seeded_step(one):
    torch.manual_seed(5)
    return step(one, tokens())


def count_calls(monkeypatch):
    calls = []
    forward = FusedLinear.forward
    monkeypatch.setattr(FusedLinear, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x))
    return calls


@kinds
@reentrant
def test_a_checkpointed_llama_gives_the_bits_of_a_plain_one(kind, reentrant, monkeypatch):
    plain = fused_copy(tiny_llama(kind, lora_dropout=0.4))
    one = checkpointed(plain, reentrant)
    expected = seeded_step(plain)
    calls = count_calls(monkeypatch)
    found = seeded_step(one)
    # every layer ran twice, reentrant checkpoints the first time without gradients
    assert len(calls) == 2 * 2 * len(LLAMA_LAYERS) and calls.count(False) == (len(calls) // 2 if reentrant else 0)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert not torch.equal(step(one, tokens())["loss"], found["loss"])
    assert fuse(one).fallbacks() == {}


@kinds
@reentrant
def test_a_checkpointed_llama_errs_as_pefts(kind, reentrant):
    stock = tiny_llama(kind)
    one = checkpointed(fused_copy(stock), reentrant)
    errs_as_stock(step(one, tokens()), step(stock, tokens()), step(copy.deepcopy(stock).double(), tokens()))


@kinds
@reentrant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_around_layers_with_a_bias(kind, reentrant, dtype):
    """16-bit weights, and few and many rows, take other kernels."""
    fused = fused_copy(model(dtype, lora_dropout=0.3, bias="all", **KINDS[kind]))
    parameters = [p for p in fused.parameters() if p.requires_grad]
    for rows in (3, 200):
        results = []
        for run in (fused, lambda x: checkpoint(fused, x, use_reentrant=reentrant)):
            torch.manual_seed(3)
            x = inputs(dtype, rows).requires_grad_()
            run(x).float().square().sum().backward()
            results.append([x.grad, *(p.grad for p in parameters)])
            for p in parameters:
                p.grad = None
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_checkpoint_that_does_not_keep_the_generator_draws_a_new_mask():
    """The test above would pass if masks were drawn from anything but torch's generator."""
    fused = fused_copy(model(lora_dropout=0.5))
    grads = []
    for keep in (True, False):
        torch.manual_seed(3)
        out = checkpoint(fused, inputs(), use_reentrant=False, preserve_rng_state=keep)
        grads.append(torch.autograd.grad(out.sum(), fused.base_model.model.b.lora_A["default"].weight)[0])
    assert not torch.equal(*grads)
