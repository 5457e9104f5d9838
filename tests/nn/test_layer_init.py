"""Initialisation: PEFT's, bit for bit from the same seed; and what it does to the base weight."""

import peft
import pytest
import torch
from layer_helpers import TOLERANCES, adapter, bits, linear, oracle, peft_adapter
from torch import nn

from lora_kernels.nn import DoRALinear, LoRAEmbedding, LoRALinear

INITS = [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"]
inits = pytest.mark.parametrize("init", INITS)
CHANGES_BASE = ("pissa", "olora")


def pefts(base, init, r, use_dora=False):
    """PEFT's adapter of a base layer, as get_peft_model leaves it: float32 over a 16-bit base."""
    model = nn.ModuleDict({"q": base})
    config = peft.LoraConfig(
        r=r, lora_alpha=6, init_lora_weights=init, use_dora=use_dora, target_modules=["q"], bias="none"
    )
    model.forward = lambda x: model["q"](x)
    wrapped = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model["q"]
    return layer, layer.get_base_layer().weight


@inits
@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("r", [2, 6])
def test_float32_is_pefts_bit_for_bit(init, cls, r):
    base = linear(12, 10)
    before = bits(base.weight)
    torch.manual_seed(7)
    layer = cls.from_linear(base, r=r, lora_alpha=6, init_lora_weights=init)
    after_ours = bits(torch.get_rng_state())
    other = linear(12, 10)
    torch.manual_seed(7)
    theirs, weight = pefts(other, init, r, cls is DoRALinear)
    assert bits(torch.get_rng_state()) == after_ours
    for mine, its in zip(adapter(layer)[:2], peft_adapter(theirs)[:2], strict=True):
        assert bits(mine) == bits(its)
    assert bits(layer.weight) == bits(weight)
    assert (bits(layer.weight) != before) == str(init).startswith(CHANGES_BASE)
    assert layer.weight is base.weight
    if cls is DoRALinear:
        torch.testing.assert_close(layer.lora_magnitude_vector, peft_adapter(theirs)[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_random_values_are_pefts_over_a_base_of_any_dtype(init, dtype):
    base = linear(12, 10, dtype=dtype)
    torch.manual_seed(7)
    layer = LoRALinear.from_linear(base, r=4, lora_alpha=6, init_lora_weights=init)
    other = linear(12, 10, dtype=dtype)
    torch.manual_seed(7)
    theirs, weight = pefts(other, init, 4)
    for mine, its in zip(adapter(layer), peft_adapter(theirs), strict=True):
        assert mine.dtype is its.dtype
        assert bits(mine) == bits(its)
    assert bits(layer.weight) == bits(weight)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pissa_and_olora_over_16_bits_are_pefts_before_its_rounding(init, dtype):
    base, other = linear(12, 10, dtype=dtype), linear(12, 10, dtype=dtype)
    first = base.weight.detach().double()
    torch.manual_seed(7)
    layer = LoRALinear.from_linear(base, r=4, lora_alpha=6, init_lora_weights=init)
    torch.manual_seed(7)
    theirs, weight = pefts(other, init, 4)
    assert bits(layer.weight) == bits(weight)
    for mine, its in zip(adapter(layer), peft_adapter(theirs), strict=True):
        assert bits(mine.to(dtype).float()) == bits(its)

    def distance(a, b):
        return (weight.double() + layer.scaling * (b.double() @ a.double()) - first).abs().max()

    assert distance(*adapter(layer)) < distance(*peft_adapter(theirs))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@inits
def test_only_a_random_b_changes_the_output(init, dtype):
    base = linear(dtype=dtype)
    x = torch.randn(7, 12, dtype=dtype)
    before = base(x).detach()
    layer = LoRALinear.from_linear(base, r=4, lora_alpha=6, init_lora_weights=init)
    same = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else TOLERANCES[dtype]
    if init is False or init == "orthogonal":
        torch.testing.assert_close(layer(x).double(), oracle(layer, x), **same)
    else:
        torch.testing.assert_close(layer(x), before, **same)
    if init == "pissa":
        rest = torch.linalg.svdvals(layer.weight.detach())
        torch.testing.assert_close(rest[:6], torch.linalg.svdvals(linear(dtype=dtype).weight.detach())[4:], **same)
        assert rest[6:].max() < 1e-4


def test_the_base_weight_is_changed_in_place():
    base = linear()
    place, version = base.weight.data_ptr(), base.weight._version
    LoRALinear.from_linear(base, r=4, init_lora_weights="pissa")
    assert base.weight.data_ptr() == place
    assert base.weight._version > version


def test_case_does_not_matter_in_names():
    layers = []
    for name in ("Gaussian", "gaussian"):
        base = linear()
        torch.manual_seed(0)
        layers.append(LoRALinear.from_linear(base, init_lora_weights=name))
    assert bits(layers[0].lora_A) == bits(layers[1].lora_A)
    assert not layers[0].lora_B.any()


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
def test_given_tensors_are_copied(cls):
    a, b = torch.randn(3, 12, dtype=torch.float16), torch.randn(3, 10, dtype=torch.float64).T
    layer = cls.from_linear(linear(), r=3, init_lora_weights=(a, b))
    assert torch.equal(layer.lora_A, a.float())
    assert torch.equal(layer.lora_B, b.float())
    assert layer.lora_A.dtype is layer.lora_B.dtype is torch.float32
    assert layer.lora_B.is_contiguous()
    a.zero_()
    assert layer.lora_A.any()
    with pytest.raises(TypeError, match="two tensors"):
        cls.from_linear(linear(), init_lora_weights=(a, b, a))
    with pytest.raises(TypeError, match="found list"):
        cls.from_linear(linear(), init_lora_weights=[a, b])


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_embedding_is_pefts_bit_for_bit(init, dtype):
    torch.manual_seed(0)
    base = nn.Embedding(11, 6, dtype=dtype)
    torch.manual_seed(7)
    layer = LoRAEmbedding.from_embedding(base, r=3, init_lora_weights=init)
    state = bits(torch.get_rng_state())
    torch.manual_seed(7)
    config = peft.LoraConfig(r=3, init_lora_weights=init)
    other = peft.tuners.lora.layer.Embedding(base, "default", config=config, r=3, lora_alpha=8)
    assert state == bits(torch.get_rng_state())
    wide = torch.promote_types(dtype, torch.float32)
    assert bits(layer.lora_embedding_A) == bits(other.lora_embedding_A["default"].to(wide))
    assert bits(layer.lora_embedding_B) == bits(other.lora_embedding_B["default"].to(wide))
    assert layer.lora_embedding_A.dtype is wide
