"""LoRAEmbedding beside PEFT's embedding layer."""

import copy
import pickle

import peft
import pytest
import torch
from layer_helpers import TOLERANCES, bits
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_kernels import merge_and_unload
from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter
from lora_kernels.nn import LoRAEmbedding

OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "negative padding": {"padding_idx": -1},
    "max_norm": {"max_norm": 1.0},
    "norm of one": {"max_norm": 1.5, "norm_type": 1.0},
    "by frequency": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
}
options = pytest.mark.parametrize("option", OPTIONS)
IDS = torch.tensor([[0, 2, 2, 10], [5, 10, 5, 5]])


def table(dtype=torch.float32, **more):
    torch.manual_seed(0)
    return nn.Embedding(11, 6, dtype=dtype, **more)


def ours(dtype=torch.float32, **more):
    return LoRAEmbedding.from_embedding(table(dtype, **more), r=3, lora_alpha=5, init_lora_weights=False)


def theirs(layer, **more):
    config = peft.LoraConfig(r=layer.r, lora_alpha=layer.lora_alpha, use_rslora=layer.use_rslora)
    base = table(layer.weight.dtype, **more)
    other = peft.tuners.lora.layer.Embedding(base, "default", config=config, r=layer.r, lora_alpha=layer.lora_alpha)
    base.requires_grad_(False)
    other.lora_embedding_A["default"].data = layer.lora_embedding_A.detach().clone()
    other.lora_embedding_B["default"].data = layer.lora_embedding_B.detach().clone()
    return other, [other.lora_embedding_A["default"], other.lora_embedding_B["default"]]


@options
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_output_and_gradients_are_pefts(option, dtype):
    layer = ours(dtype, **OPTIONS[option])
    # PEFT's backward raises with sparse=True, which has no effect on the values
    other, parameters = theirs(layer, **{name: v for name, v in OPTIONS[option].items() if name != "sparse"})
    dy = torch.randn(2, 4, 6, dtype=dtype)
    y, y_peft = layer(IDS), other(IDS)
    torch.testing.assert_close(y, y_peft, **TOLERANCES[dtype])
    grads = torch.autograd.grad(y, [layer.lora_embedding_A, layer.lora_embedding_B], dy)
    grads_peft = torch.autograd.grad(y_peft, parameters, dy)
    for mine, its in zip(grads, grads_peft, strict=True):
        torch.testing.assert_close(mine, its, **TOLERANCES[dtype])
    if "padding" in option:
        assert not grads[0][:, layer.padding_idx].any()
    torch.testing.assert_close(layer.weight.detach(), other.get_base_layer().weight.detach(), **TOLERANCES[dtype])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_training_follows_pefts_path(use_rslora):
    layer = LoRAEmbedding.from_embedding(table(torch.float64), r=3, lora_alpha=5, use_rslora=use_rslora)
    other, parameters = theirs(layer)
    assert layer.scaling == other.scaling["default"]
    target = torch.randn(2, 4, 6, dtype=torch.float64)
    for module, trained in ((layer, [layer.lora_embedding_A, layer.lora_embedding_B]), (other, parameters)):
        optimizer = torch.optim.AdamW(trained, lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (module(IDS) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer(IDS), other(IDS), rtol=1e-9, atol=1e-9)
    assert layer.weight.grad is None


def test_the_formula_in_float64():
    layer = ours(torch.float64)
    a, b = layer.lora_embedding_A, layer.lora_embedding_B
    expected = (layer.weight + layer.scaling * (b @ a).T)[IDS]
    torch.testing.assert_close(layer(IDS), expected, **TOLERANCES[torch.float64])
    torch.testing.assert_close(layer(IDS.int()), expected, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_output_is_rounded_once(dtype):
    layer = ours(dtype)
    assert layer.lora_embedding_A.dtype is layer.lora_embedding_B.dtype is torch.float32
    delta = layer.lora_embedding_B.double() @ layer.lora_embedding_A.double()
    exact = (layer.weight.double() + layer.scaling * delta.T)[IDS]
    y = layer(IDS)
    assert y.dtype is dtype
    unit = 2**-8 if dtype is torch.bfloat16 else 2**-11
    assert ((y.double() - exact).abs() / exact.abs()).max() <= unit * (1 + 1e-3)


@options
def test_attributes_are_those_of_the_base(option):
    base = table(**OPTIONS[option]).eval()
    layer = LoRAEmbedding.from_embedding(base, r=3)
    for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse", "num_embeddings"):
        assert getattr(layer, name) == getattr(base, name), name
    assert layer.embedding_dim == 6
    assert layer.weight is base.weight
    assert not layer.training
    assert not layer.weight.requires_grad
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    assert shapes == {"lora_embedding_A": (3, 11), "lora_embedding_B": (6, 3)}
    torch.manual_seed(0)
    made = LoRAEmbedding(11, 6, **OPTIONS[option], r=3)
    assert torch.equal(made.weight, table(**OPTIONS[option]).weight)
    assert made.padding_idx == base.padding_idx
    assert "11, 6" in repr(made)


def test_at_first_and_off_it_is_the_base():
    base = table()
    layer = LoRAEmbedding.from_embedding(base, r=3)
    assert torch.equal(layer(IDS), base(IDS))
    other = ours()
    on = other(IDS)
    with other.adapter_disabled():
        assert torch.equal(other(IDS), base(IDS))
    assert torch.equal(other(IDS), on)
    other.set_scale(0)
    assert torch.equal(other(IDS), base(IDS))
    other.set_scale(2)
    torch.testing.assert_close(other(IDS) - base(IDS), 2 * (on - base(IDS)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_shares_nothing(copied):
    layer = ours()
    other = copied(layer)
    assert torch.equal(other(IDS), layer(IDS))
    assert {n: bits(t) for n, t in other.state_dict().items()} == {n: bits(t) for n, t in layer.state_dict().items()}
    other.lora_embedding_A.data.zero_()
    assert not torch.equal(other(IDS), layer(IDS))


def test_it_compiles():
    layer = ours()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(IDS)
    torch.testing.assert_close(y, layer(IDS))
    y.sum().backward()
    grad = layer.lora_embedding_A.grad.clone()
    layer.zero_grad()
    layer(IDS).sum().backward()
    torch.testing.assert_close(layer.lora_embedding_A.grad, grad)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, found 0"),
        ({"r": 2.0}, TypeError, "r must be an integer, found 2.0"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite, found inf"),
        ({"use_rslora": 1}, TypeError, "use_rslora must be True or False, found 1"),
        ({"init_lora_weights": "gaussian"}, TypeError, "init_lora_weights must be True or False, found 'gaussian'"),
    ],
)
def test_a_bad_option_is_refused_and_changes_nothing(more, error, says):
    base = table()
    state = bits(torch.get_rng_state())
    with pytest.raises(error, match=f"^LoRAEmbedding: {says}"):
        LoRAEmbedding.from_embedding(base, **more)
    assert base.weight.requires_grad
    assert bits(torch.get_rng_state()) == state


def test_a_base_that_is_not_a_plain_embedding_is_refused():
    with pytest.raises(TypeError, match="embedding must be an nn.Embedding, found Linear"):
        LoRAEmbedding.from_embedding(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="embedding must be an nn.Embedding, found Scaled with a forward of its own"):
        LoRAEmbedding.from_embedding(Scaled(2, 2))


def gemma(dtype):
    torch.manual_seed(0)
    return Gemma3TextScaledWordEmbedding(12, 10, None, embed_scale=10**0.5).to(dtype)


def bart(dtype):
    torch.manual_seed(0)
    return BartScaledWordEmbedding(12, 10, None, embed_scale=3.3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [gemma, bart])
def test_an_embedding_that_scales_its_rows_scales_the_adapter_too(make, dtype):
    model, base = nn.Sequential(make(dtype)), make(dtype)
    ids = torch.arange(12)
    inject_adapter(model, LoraConfig(target_modules=["0"], r=3))
    layer = model[0]
    assert torch.equal(layer(ids), base(ids))
    nn.init.normal_(layer.lora_embedding_A)
    scale = layer.embed_scale.to(dtype).double() if isinstance(layer.embed_scale, torch.Tensor) else layer.embed_scale
    delta = layer.scaling * (layer.lora_embedding_B.double() @ layer.lora_embedding_A.double()).T
    exact = ((layer.weight.double() + delta) * scale).detach()
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert ((layer(ids).double() - exact).abs() <= bound * exact.abs() + 1e-6 * (dtype is not torch.float64)).all()

    config = peft.LoraConfig(target_modules=["0"], r=3)
    theirs = peft.get_peft_model(nn.Sequential(make(dtype)), config, autocast_adapter_dtype=False).double()
    with torch.no_grad():
        other = theirs.base_model.model[0]
        other.lora_embedding_A["default"].copy_(layer.lora_embedding_A)
        other.lora_embedding_B["default"].copy_(layer.lora_embedding_B)
        torch.testing.assert_close(copy.deepcopy(model).double()(ids), theirs(ids), rtol=1e-6, atol=1e-6)

    y = layer(ids).detach()
    with layer.adapter_disabled():
        assert torch.equal(layer(ids), base(ids))
    layer.merge()
    torch.testing.assert_close(layer(ids), y, rtol=2 * bound + 1e-6, atol=2 * bound + 1e-6)
    layer.unmerge()
    merge_and_unload(model)
    assert type(model[0]) is type(base)
    torch.testing.assert_close(model(ids), y, rtol=2 * bound + 1e-6, atol=2 * bound + 1e-6)
    assert model.state_dict().keys() == nn.Sequential(base).state_dict().keys()


def test_a_scaled_embedding_that_does_more_is_refused():
    class OtherScaledWordEmbedding(nn.Embedding):
        embed_scale = 2.0

        def forward(self, ids):
            return super().forward(ids) * 2.0 + 1.0

    with pytest.raises(TypeError, match="with a forward of its own"):
        LoRAEmbedding.from_embedding(OtherScaledWordEmbedding(5, 4))
    with pytest.raises(AdapterError, match="computes in its own way"):
        inject_adapter(nn.Sequential(OtherScaledWordEmbedding(5, 4)), LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("cast", [False, True])
def test_autocast_and_16_bit_adapters_leave_the_sum_in_float32(cast):
    torch.manual_seed(0)
    layer = LoRAEmbedding(64, 48, r=32, init_lora_weights=False, dtype=torch.float32)
    layer = layer.bfloat16() if cast else layer
    ids = torch.arange(64)
    delta = layer.scaling * (layer.lora_embedding_B.double() @ layer.lora_embedding_A.double()).T
    exact = (layer.weight.double() + delta).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(ids)
    assert y.dtype is layer.weight.dtype
    correct = (exact.to(y.dtype).double() - exact).norm()
    assert (y.double() - exact).norm() <= 1.02 * correct + 1e-6 * exact.norm()
