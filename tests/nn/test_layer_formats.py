"""Layers with an adapter over weights that torchao, transformers and compressed-tensors have
quantised: against float64 of the numbers that the codes stand for, and through all that a layer is
put through."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_kernels.nn import DoRALinear, LoRALinear
from lora_kernels.testing.tolerances import rms
from tests.nn.format_modules import KINDS, module, torchao_configs
from tests.nn.layer_helpers import adapter, trained

LAYERS = {"lora": LoRALinear, "dora": DoRALinear}
REQUANTISED = ["int8 rows", "int8 groups", "float8 rows"]


def layer_over(base, kind="dora"):
    torch.manual_seed(2)
    return trained(LAYERS[kind].from_linear(base, r=4, lora_alpha=6))


def float64(layer, w, x, dy):
    """(y, gradients of x and of the adapter) of the layer's formula for W = w."""
    a, b, *m = leaves = [p.detach().double().requires_grad_() for p in adapter(layer)]
    x = x.detach().double().requires_grad_()
    adapted = w.double() + layer.scaling * b @ a
    if m:
        adapted = (m[0] / adapted.norm(dim=1).detach())[:, None] * adapted
    y = x @ adapted.T + layer.bias.detach().double()
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves], dy.double())]


def ours(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *adapter(layer)], dy)]


def close(found, wanted, bound):
    assert rms(found.double() - wanted.double()) <= bound * rms(wanted.double())


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind):
    for adapts in LAYERS:
        base, w = module(kind)
        layer = layer_over(base, adapts)
        assert base.weight is layer.weight if "weight" in base._parameters else base.weight_packed is layer.weight
        assert {n for n, p in layer.named_parameters() if p.requires_grad} >= {"lora_A", "lora_B"}
        assert not any(p.requires_grad for n, p in layer.named_parameters() if not n.startswith("lora"))
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            generator = torch.Generator().manual_seed(1)
            x, dy = (torch.randn(2, 5, n, generator=generator).to(dtype) for n in (64, 48))
            for one, other in zip(ours(layer, x, dy), float64(layer, w, x, dy), strict=True):
                close(one, other, bound)
        with layer.adapter_disabled():
            close(layer(x.float()), F.linear(x.float(), w, base.bias), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_to_floats_and_back(kind):
    base, w = module(kind)
    layer, x = layer_over(base).eval(), torch.randn(5, 64)
    codes, wanted = layer.weight, layer(x)
    for dtype in (None, torch.float16):
        layer.merge(dtype=dtype)
        assert layer.weight.dtype is (dtype or torch.float32) and {*layer.state_dict()} == {"weight", "bias"}
        close(layer(x), wanted, 1e-5 if dtype is None else 2e-3)
        layer.unmerge()
        assert layer.weight is codes and torch.equal(layer(x), wanted)
    if kind not in REQUANTISED:
        with pytest.raises(NotImplementedError, match="cannot be quantised again; merge it to floating numbers"):
            layer.merge(requantise=True)
    plain = layer.plain_layer(True)
    assert type(plain) is nn.Linear and "forward" not in vars(plain)
    close(plain(x), wanted, 1e-5)
    back = layer.plain_layer(False)
    assert type(back) is type(base) and {*back.state_dict()} == {*base.state_dict()}
    again = layer_over(back)
    assert torch.equal(again(x), wanted)


@pytest.mark.parametrize("kind", REQUANTISED)
def test_merged_and_quantised_again(kind):
    """Against the library's own quantiser of the merged numbers."""
    q = pytest.importorskip("torchao.quantization")
    base, _ = module(kind)
    layer, x = layer_over(base).eval(), torch.randn(5, 64)
    wanted = layer(x)
    other = nn.Sequential(nn.Linear(64, 48))
    other[0].weight = nn.Parameter(layer._adapted_weight(torch.float32))
    q.quantize_(other, torchao_configs(q)[kind])
    error = layer.merge(requantise=True)
    assert type(layer.weight) is type(base.weight) and layer.weight.block_size == base.weight.block_size
    assert torch.equal(layer.weight.dequantize(), other[0].weight.dequantize())
    assert 1e-3 < error < 0.05 and rms(layer(x) - wanted) < 2 * error * rms(wanted)
    again = layer.plain_layer(True)
    close(again(x), layer(x), 1e-5)
    layer.unmerge()
    assert layer.weight is base.weight and torch.equal(layer(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_copies_and_casts(kind):
    """The base's names and parts; other codes with all that they mean; no cast changes W."""
    base, w = module(kind)
    layer, x = layer_over(base), torch.randn(3, 64)
    wanted, found = layer(x), layer.state_dict()
    assert {*found} == {*base.state_dict(), "lora_A", "lora_B", "lora_magnitude_vector"}
    other = layer_over(module(kind, seed=5)[0])
    assert not torch.equal(other(x), wanted)
    other.load_state_dict({name: t.clone() for name, t in found.items()})
    assert torch.equal(other(x), wanted)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), wanted) and twin._quantised.parameter is twin.weight and twin.weight is not layer.weight
    with torch.no_grad():
        other.load_state_dict(layer_over(module(kind, seed=6)[0]).state_dict())
    assert torch.equal(twin(x), wanted) and not torch.equal(other(x), wanted)
    for change in (lambda: layer.to("cpu"), layer.double, layer.float, lambda: layer.to(torch.bfloat16), layer.float):
        change()
    assert torch.equal(layer._quantised.weight(torch.float32).dequantise(), w.float())
    close(layer(x), wanted, 1e-2)  # whose bias was rounded


def test_what_is_refused():
    q = pytest.importorskip("torchao.quantization")
    made = nn.Sequential(nn.Linear(64, 48))
    q.quantize_(made, q.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(TypeError, match="the weight of the Linear cannot be read: torchao changes the input of this layer"):
        LoRALinear.from_linear(made[0])
    base, _ = module("packed")
    base.quantization_status = type(base.quantization_status).FROZEN
    with pytest.raises(TypeError, match="the weight of the Linear cannot be read: .* it rounds its weight at each call"):
        LoRALinear.from_linear(base)


def test_over_a_decompressed_layer():
    """Which holds a forward of its library's, bound to it."""
    compressors = pytest.importorskip("compressed_tensors.compressors.base")
    base, w = module("packed")
    compressors.decompress_module(base)
    layer, x = layer_over(base).eval(), torch.randn(3, 64)
    assert layer._quantised is None and layer.weight is base.weight
    wanted = layer(x)
    plain, back = layer.plain_layer(True), layer.plain_layer(False)
    assert plain.forward.__self__ is plain and back.forward.__self__ is back
    close(plain(x), wanted, 1e-5)
    close(back(x), F.linear(x, w, base.bias), 1e-6)
