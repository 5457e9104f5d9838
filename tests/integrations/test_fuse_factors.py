"""Variants of LoRA that are LoRA of other factors: PEFT's outputs and gradients, on the kernels."""

import copy

import peft
import pytest
import torch
from fuse_helpers import errs_as_stock, fused_copy, gradients, inputs, model, same
from torch import nn

from lora_kernels import fuse


class Net(nn.Module):
    """Both layers' features have three blocks."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 42), nn.Linear(42, 18, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def block_diagonal(**more):
    return {"use_bdlora": peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["a"], target_modules_bd_b=["b"], nblocks=3)} | more


VARIANTS = {
    "BD-LoRA": block_diagonal(r=6),
    "BD-LoRA, one block": block_diagonal(r=6) | {"target_modules": ["b"]},
    "BD-LoRA, dropout": block_diagonal(r=3),
    "KaSA": {"kasa_config": peft.KasaConfig()},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
DTYPES = {"float32": (torch.float32, True), "bfloat16": (torch.bfloat16, True), "all bfloat16": (torch.bfloat16, False)}
dtypes = pytest.mark.parametrize("dtype, adapter_dtype", DTYPES.values(), ids=DTYPES)


@variants
@dtypes
@pytest.mark.parametrize("rows", [1, 70])
def test_outputs_and_all_gradients_are_pefts(variant, dtype, adapter_dtype, rows):
    stock = model(dtype, net=Net, adapter_dtype=adapter_dtype, lora_alpha=5, **VARIANTS[variant])
    fused, x = fused_copy(stock), inputs(dtype, rows)
    exact = gradients(copy.deepcopy(stock).double(), x.double())
    assert any("lora_A" in name for name in exact) and any("diag" in name for name in exact) == (variant == "KaSA")
    errs_as_stock(gradients(fused, x), gradients(stock, x), exact)
    report = fuse(fused, strict=True)
    assert report.fallbacks() == {} and set(report.fused.values()) == {"cpu"}


def test_what_differs_in_training_alone():
    stock = model(net=Net, monteclora_config=peft.MontecloraConfig())
    fused, x = fused_copy(stock), inputs()
    for one in (stock, fused):
        one.eval()
    fused(x)
    before = sum(fuse(fused).fallbacks().get("base_model.model.a", {}).values())
    same(stock, fused, x)
    assert sum(fuse(fused).fallbacks().get("base_model.model.a", {}).values()) == before <= 1
    for one in (stock, fused):
        one.train()
    torch.manual_seed(3)
    wanted = gradients(stock, x)
    torch.manual_seed(3)
    found = gradients(fused, x)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=key)
    reasons = fuse(fused).fallbacks()["base_model.model.a"]
    assert any(reason.startswith("MonteCLoRA samples") for reason in reasons)


VELORA = {
    "one group": {"num_groups": 1},
    "of the first batch": {"num_groups": 5},
    "of each batch": {"num_groups": 4, "init_type": "batch_average"},
    "random": {"num_groups": 4, "init_type": "random", "scale": 0.7},
}


@pytest.mark.parametrize("projection", VELORA)
@dtypes
@pytest.mark.parametrize("rows", [1, 70])
def test_velora_in_training(projection, dtype, adapter_dtype, rows):
    values = {"velora_config": peft.VeloraConfig(**VELORA[projection]), "use_rslora": True}
    stock = model(dtype, net=Net, adapter_dtype=adapter_dtype, **values).train()
    fused, exact, x = fused_copy(stock), copy.deepcopy(stock).double(), inputs(dtype, rows)
    for batch in (x, x.flip(0) + 1):
        errs_as_stock(gradients(fused, batch), gradients(stock, batch), gradients(exact, batch.double()))
    assert not fuse(fused, strict=True).fallbacks()
    embeds = [{n: b for n, b in one.named_buffers() if "velora_embed" in n} for one in (fused, stock)]
    assert len(embeds[0]) == 2
    # that of b is an average of what a gave
    torch.testing.assert_close(*embeds, rtol=1e-5 if dtype is torch.float32 else 0.05, atol=1e-2)


def test_velora_keeps_what_pefts_does_and_draws_its_masks():
    """x is not kept for backward, but for the projection."""
    stock = model(net=Net, velora_config=peft.VeloraConfig(num_groups=4), lora_dropout=0.4).train()
    fused, x, kept = fused_copy(stock), inputs(rows=70), []
    for one in (stock, fused):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            one.base_model.model.a(x)
        kept.append(sum(sizes))
    assert kept[1] <= kept[0]
    found = []
    for one in (stock, fused):
        torch.manual_seed(3)
        found.append(gradients(one, x))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("case", ["autocast", "lora_bias", "several"])
def test_velora_that_is_pefts(case):
    values = {"velora_config": peft.VeloraConfig(num_groups=4), "lora_bias": case == "lora_bias"}
    stock = model(net=Net, **values).train()
    if case == "several":
        stock.add_adapter("other", peft.LoraConfig(r=2, target_modules=["a", "b"]))
        stock.base_model.set_adapter(["default", "other"])
    fused, x = fused_copy(stock), inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        found, wanted = (gradients(one.base_model.model.a, x) for one in (fused, stock))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert sum(fuse(fused).fallbacks()["base_model.model.a"].values()) == 1


def test_a_truncation_that_was_put_off_is_pefts():
    stock = model(net=Net, kasa_config=peft.KasaConfig())
    for layer in (stock.base_model.model.a, stock.base_model.model.b):
        layer._lora_kasa_truncation_deferred.add("default")
    fused, x = copy.deepcopy(stock), inputs()
    assert set(fuse(fused).left.values()) == {"KaSA has yet to truncate the base weight"}
    for _ in range(2):
        same(stock, fused, x)
    assert len(fuse(fused).fused) == 2 and {sum(c.values()) for c in fuse(fused).fallbacks().values()} == {1}
