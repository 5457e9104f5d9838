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


@pytest.mark.parametrize("name, values", [
    ("MonteCLoRA samples", {"monteclora_config": peft.MontecloraConfig()}),
    ("VeLoRA keeps a projection", {"velora_config": peft.VeloraConfig(num_groups=4)}),
], ids=["MonteCLoRA", "VeLoRA"])  # fmt: skip
def test_what_differs_in_training_alone(name, values):
    stock = model(net=Net, **values)
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
    assert any(reason.startswith(name) for reason in reasons)


def test_a_truncation_that_was_put_off_is_pefts():
    stock = model(net=Net, kasa_config=peft.KasaConfig())
    for layer in (stock.base_model.model.a, stock.base_model.model.b):
        layer._lora_kasa_truncation_deferred.add("default")
    fused, x = copy.deepcopy(stock), inputs()
    assert set(fuse(fused).left.values()) == {"KaSA has yet to truncate the base weight"}
    for _ in range(2):
        same(stock, fused, x)
    assert len(fuse(fused).fused) == 2 and {sum(c.values()) for c in fuse(fused).fallbacks().values()} == {1}
