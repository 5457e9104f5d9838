"""Adapters that come, change and go under a fused model: hot swap, load, add, weighted sums,
delete."""

import copy

import peft
import pytest
import torch
from fuse_helpers import fused_copy, inputs, model, pair, randomise, same
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

from lora_kernels import fuse

CONFIG = {"target_modules": ["a", "b"], "lora_alpha": 6}
variants = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
ranks = pytest.mark.parametrize("r", [4, 2, 9], ids=["same rank", "smaller", "larger"])


def saved(path, seed=3, **values):
    """A directory with an adapter of the same base."""
    one = model(**values)
    randomise(one, seed)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if "magnitude" in name:
                p.mul_(1.25)
    one.save_pretrained(str(path))
    return str(path)


def both(stock, fused, act):
    for one in (stock, fused):
        act(one)


def swap(one, path):
    """peft.utils.hotswap.hotswap_adapter; for DoRA its inner half, since it misspells the
    magnitude's name (peft 0.21)."""
    config = peft.LoraConfig.from_pretrained(path)
    if not config.use_dora:
        return hotswap_adapter(one, path, "default", torch_device="cpu")
    saved = load_peft_weights(path, device="cpu")
    weights = {f"{name.removesuffix('.weight')}.default.weight": p for name, p in saved.items()}
    hotswap_adapter_from_state_dict(one, weights, "default", config)


@variants
@ranks
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_hot_swapped_adapter(use_dora, r, grad, tmp_path):
    """Hot swap writes through .data, which no version counter sees: a DoRA norm kept from before
    would be stale."""
    stock, fused = pair(use_dora=use_dora)
    # the scaling of the same rank stays too, so that nothing but weights changes
    path = saved(tmp_path, use_dora=use_dora, r=r, lora_alpha=6 if r == 4 else 3)
    fresh = peft.PeftModel.from_pretrained(copy.deepcopy(stock).unload(), path)
    with torch.set_grad_enabled(grad):
        before = [fused(inputs()) for _ in range(2)][-1]
        both(stock, fused, lambda one: swap(one, path))
        after = fused(inputs())
        assert not torch.allclose(before, after, rtol=0.01)
        torch.testing.assert_close(after, stock(inputs()))
        torch.testing.assert_close(after, fresh(inputs()))
    assert fuse(fused).fallbacks() == {}


@variants
def test_hot_swaps_of_a_prepared_model_and_of_a_compiled_one(use_dora, tmp_path):
    """Preparing pads the ranks and makes every scaling a tensor."""
    stock, fused = pair(use_dora=use_dora)
    expected = stock(inputs())
    both(stock, fused, lambda one: prepare_model_for_compiled_hotswap(one, target_rank=9))
    torch.testing.assert_close(fused(inputs()), expected)
    torch._dynamo.reset()
    call = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for r in (4, 2, 9):
            call(inputs())
            with torch._dynamo.config.patch(error_on_recompile=r != 4):
                path = saved(tmp_path / str(r), seed=r, use_dora=use_dora, r=r, lora_alpha=r + 1)
                both(stock, fused, lambda one, path=path: swap(one, path))
                same(stock, fused, inputs())
                torch.testing.assert_close(call(inputs()), stock(inputs()))
    assert fuse(fused).fallbacks() == {}
    torch._dynamo.reset()


@variants
def test_adapters_are_loaded_added_and_deleted(use_dora, tmp_path):
    stock, fused = pair(use_dora=use_dora)
    path = saved(tmp_path, use_dora=use_dora, r=5)

    def switch(one):
        one.load_adapter(path, "loaded")
        one.set_adapter("loaded")

    steps = {
        "load_adapter": switch,
        "set_adapter": lambda one: one.set_adapter("default"),
        "add_adapter": lambda one: (
            one.add_adapter("added", peft.LoraConfig(r=3, **CONFIG)),
            randomise(one, 8),
            one.set_adapter("added"),
        ),
        "delete the active one": lambda one: one.delete_adapter("added"),
        "delete another": lambda one: (one.set_adapter("default"), one.delete_adapter("loaded")),
    }
    with torch.no_grad():
        for name, act in steps.items():
            both(stock, fused, act)
            torch.testing.assert_close(fused(inputs()), stock(inputs()), msg=lambda m, name=name: f"{name}: {m}")
            assert fused.active_adapters == stock.active_adapters
    assert fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "dare_linear"])
def test_a_weighted_sum_of_adapters(combination):
    stock, fused = pair()

    def act(one):
        one.add_adapter("other", peft.LoraConfig(r=4, **CONFIG))
        randomise(one, 4)
        torch.manual_seed(0)
        options = {"density": 0.5} if combination in ("ties", "dare_linear") else {}
        one.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination, **options)
        one.set_adapter("sum")

    before = fused(inputs())
    both(stock, fused, act)
    same(stock, fused, inputs())
    assert not torch.allclose(fused(inputs()), before) and fuse(fused).fallbacks() == {}


@variants
def test_a_model_unloaded_or_merged_for_good_is_pefts(use_dora):
    stock, fused = pair(use_dora=use_dora)
    merged = [copy.deepcopy(one).merge_and_unload() for one in (stock, fused)]
    assert [type(m) for m in merged[0].modules()] == [type(m) for m in merged[1].modules()]
    assert torch.equal(merged[0](inputs()), merged[1](inputs()))
    assert torch.equal(*(one.unload()(inputs()) for one in (stock, fused)))


def test_layers_of_a_second_adapter_need_fuse_again():
    stock = model(target_modules=["a"])
    fused = fused_copy(stock)
    both(stock, fused, lambda one: (one.add_adapter("more", peft.LoraConfig(r=3, **CONFIG)), randomise(one, 5)))
    both(stock, fused, lambda one: one.set_adapter("more"))
    same(stock, fused, inputs())
    report = fuse(fused)
    assert list(report.fused) == ["base_model.model.a", "base_model.model.b"] and not report.left
    same(stock, fused, inputs())
    both(stock, fused, lambda one: one.set_adapter("default"))
    same(stock, fused, inputs())
    assert fuse(fused).left == {"base_model.model.b": "no active adapter has weights here"}
