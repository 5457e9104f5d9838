"""aLoRA on the kernels: tokens from the invocation on have the adapter, those before it the base
alone."""

import copy

import peft
import pytest
import torch
from fuse_helpers import LLAMA_LAYERS, Net, errs_as_stock, fused_copy, gradients, llama, model, randomise, tokens
from peft.tuners.lora.variants import ALoraLinearVariant

from lora_kernels import explain, fuse

ACTIVATED = {"alora_invocation_tokens": [7, 9]}
OFFSETS = {
    "mixed": [3, None, 5, 0, 2, 1, None],
    "all tokens": [5, 9, 6, 5, 5, 5, 5],
    "one sequence": [None, None, 4, None, None, None, None],
    "none found": [None] * 7,
    "not given": None,
}


def activated(dtype=torch.float32, **values):
    """Two layers whose aLoRA adapters learn; PEFT's class for causal models wants a generator."""
    torch.manual_seed(0)
    common = {"r": 4, "lora_alpha": 6, "target_modules": ["a", "b"], "task_type": "CAUSAL_LM"}
    made = peft.PeftModel(Net().to(dtype), peft.LoraConfig(**(common | ACTIVATED | values)))
    randomise(made)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return made


def batch(length=5, dtype=torch.float32, count=7):
    shape = (count, 24) if length is None else (count, length, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize("lora_bias", [False, True], ids=["no bias", "bias"])
def test_outputs_and_all_gradients_are_pefts(offsets, dtype, length, lora_bias):
    stock = activated(dtype, lora_bias=lora_bias)
    fused = fused_copy(stock)
    given = {} if OFFSETS[offsets] is None else {"alora_offsets": OFFSETS[offsets]}
    x, found = batch(length, dtype), []
    for one, kind in ((fused, dtype), (stock, dtype), (copy.deepcopy(stock).double(), torch.float64)):
        layer = one.base_model.model.a
        found.append(gradients(layer, x.to(kind), **given))
        with torch.no_grad():
            found[-1]["without grad"] = layer(x.to(kind), **given)
    zero = [name for name, t in found[2].items() if not t.any()]
    assert all(not found[0].pop(name).any() and not found[1].pop(name).any() for name in zero)
    found[2] = {name: t for name, t in found[2].items() if name not in zero}
    assert bool(zero) is (offsets in ("none found", "not given"))
    errs_as_stock(*found)
    report = fuse(fused, strict=True)
    assert len(report.fused) == 2 and report.fallbacks() == {}


def test_tokens_that_all_have_the_adapter_are_one_call():
    fused = fused_copy(activated()).base_model.model.a
    for keywords, expected in ((OFFSETS["all tokens"], {"lora_linear_forward"}), (OFFSETS["mixed"], {"multi_lora_forward"})):
        with torch.no_grad():
            decisions = explain(fused, batch(), alora_offsets=keywords).decisions
        assert {d.op for d in decisions} == expected


def test_dropout_is_torchs_on_the_tokens_of_the_adapter():
    stock = activated(lora_dropout=0.5).train()
    fused, found = fused_copy(stock), []
    for one in (stock, fused):
        torch.manual_seed(0)
        found.append(gradients(one.base_model.model.a, batch(), alora_offsets=OFFSETS["mixed"]))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-4, msg=name)
    assert fuse(fused).fallbacks() == {}


def test_names_of_lora_alora_and_the_base_in_one_batch():
    stock = activated()
    stock.add_adapter("plain", peft.LoraConfig(r=3, target_modules=["a", "b"], task_type="CAUSAL_LM"))
    stock.add_adapter("late", peft.LoraConfig(r=9, target_modules=["a"], task_type="CAUSAL_LM", **ACTIVATED))
    randomise(stock)
    for name, p in stock.eval().named_parameters():
        p.requires_grad_("lora_" in name)
    fused = fused_copy(stock)
    names = ["plain", "default", "__base__", "late", "late", "default", "plain"]
    for offsets in ([None, 3, None, 2, 9, None, None], None):
        given = {"adapter_names": names, "alora_offsets": offsets}
        models = (fused, stock, copy.deepcopy(stock).double())
        found = [gradients(one.base_model.model.a, batch().to(next(one.parameters()).dtype), **given) for one in models]
        zero = [name for name, t in found[2].items() if not t.any()]
        assert all(not found[0].pop(name).any() and not found[1].pop(name).any() for name in zero)
        errs_as_stock(found[0], found[1], {name: t for name, t in found[2].items() if name not in zero})
    assert fuse(fused).fallbacks() == {}


def test_offsets_for_other_adapters_are_passed_by():
    for values in ({}, {"use_dora": True}):
        stock = model(**values)
        fused = fused_copy(stock)
        layer, plain = fused.base_model.model.a, stock.base_model.model.a
        torch.testing.assert_close(layer(batch(), alora_offsets=[1] * 7), plain(batch(), alora_offsets=[1] * 7))
        assert fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_learns_and_generates(checkpointing):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=LLAMA_LAYERS, task_type="CAUSAL_LM", alora_invocation_tokens=[7, 9]
    )
    stock = peft.get_peft_model(llama(), config)
    randomise(stock)
    ids = tokens()["input_ids"].clone()
    ids[0, 3:5] = torch.tensor([7, 9])
    ids[1, 6:8] = torch.tensor([7, 9])
    fused = fused_copy(stock)
    found = []
    for one in (fused, stock, copy.deepcopy(stock).double()):
        one.train()
        if checkpointing:
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        out = one(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        assert len(grads) == 4 * len(LLAMA_LAYERS)
        found.append({"loss": out.loss.detach(), "logits": out.logits.detach()} | grads)
    errs_as_stock(*found)
    made = [one.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for one in (stock, fused)]
    assert torch.equal(*made)
    assert fuse(fused, strict=True).fallbacks() == {}


def test_autocast_and_a_compiled_graph():
    stock = activated()
    fused = fused_copy(stock)
    layer, plain = fused.base_model.model.a, stock.base_model.model.a
    given = {"alora_offsets": OFFSETS["mixed"]}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer(batch(), **given)
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found, plain(batch(), **given), rtol=5e-2, atol=5e-2)
    assert fuse(fused).fallbacks() == {}
    torch._dynamo.reset()
    with torch.no_grad():
        call = torch.compile(lambda x: layer(x, **given), backend="aot_eager")
        torch.testing.assert_close(call(batch()), plain(batch(), **given))
        call = torch.compile(layer, backend="aot_eager")
        torch.testing.assert_close(call(batch()), plain(batch()))
    torch._dynamo.reset()


def test_what_is_left_to_peft_is_counted():
    fused = fused_copy(activated()).base_model.model.a
    assert type(fused.lora_variant["default"]) is ALoraLinearVariant
    for x in (batch(), batch()[None]):
        with pytest.raises(IndexError):
            fused(x, alora_offsets=[2])
    counted = fuse(fused).fallbacks()[""]
    assert counted == {
        "alora_offsets are not one number for each sequence": 1,
        "aLoRA of an input of 4 dimensions": 1,
    }
