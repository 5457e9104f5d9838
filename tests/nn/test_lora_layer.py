"""LoRALinear and DoRALinear beside PEFT's layer and a float64 oracle; what they refuse."""

import pytest
import torch
from layer_helpers import (
    KINDS,
    TOLERANCES,
    SameMask,
    adapter,
    bits,
    fit,
    gradients,
    linear,
    oracle,
    ours,
    peft_adapter,
    theirs,
)
from torch import nn
from torch.nn import functional as F

from lora_kernels.nn import DoRALinear, LoRALinear

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (0,)], ids=str)
def test_output_and_gradients_are_pefts(kind, dtype, bias, shape):
    layer = ours(kind, dtype, bias=bias)
    other = theirs(layer)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*shape, 12, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(*shape, 10, generator=generator, dtype=torch.float64).to(dtype)
    y, grads = gradients(layer, adapter(layer), x, dy)
    y_peft, grads_peft = gradients(other, peft_adapter(other), x, dy)
    torch.testing.assert_close(y, y_peft, **TOLERANCES[dtype])
    torch.testing.assert_close(y.double(), oracle(layer, x), **TOLERANCES[dtype])
    for mine, its in zip(grads, grads_peft, strict=True):
        torch.testing.assert_close(mine, its, **TOLERANCES[dtype])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, **TOLERANCES[dtype])


@kinds
def test_a_single_token_without_batch_dimension(kind):
    layer = ours(kind, torch.float64)
    x = torch.randn(12, dtype=torch.float64)
    y, grads = gradients(layer, adapter(layer), x, torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(y, oracle(layer, x), **TOLERANCES[torch.float64])
    assert grads[0].shape == (12,)


@kinds
@dtypes
def test_training_follows_pefts_path(kind, dtype):
    layer = ours(kind, dtype)
    other = theirs(layer)
    losses, losses_peft = fit(layer, adapter(layer), dtype=dtype), fit(other, peft_adapter(other), dtype=dtype)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(losses, losses_peft, **tolerance)
    assert losses[-1] < losses[0]
    for mine, its in zip(adapter(layer), peft_adapter(other), strict=True):
        torch.testing.assert_close(mine.detach(), its.detach(), **tolerance)


@kinds
def test_dropout_is_pefts_with_the_same_mask(kind):
    layer = ours(kind, torch.float64, lora_dropout=0.3).train()
    other = theirs(layer)
    other.lora_dropout["default"] = SameMask(0.3)
    x, dy = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    torch.manual_seed(5)
    y, grads = gradients(layer, adapter(layer), x, dy)
    torch.manual_seed(5)
    y_peft, grads_peft = gradients(other, peft_adapter(other), x, dy)
    for mine, its in zip([y, *grads], [y_peft, *grads_peft], strict=True):
        torch.testing.assert_close(mine, its, **TOLERANCES[torch.float64])
    assert not torch.allclose(layer(x), y)
    torch.testing.assert_close(layer.eval()(x), oracle(layer, x), **TOLERANCES[torch.float64])


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_output_is_rounded_once(kind, dtype):
    layer = ours(kind, dtype)
    x = torch.randn(64, 12).to(dtype)
    assert layer.lora_A.dtype is layer.lora_B.dtype is torch.float32
    exact = oracle(layer, x)
    with torch.no_grad():
        error = (layer(x).double() - exact).square().mean().sqrt()
    floor = (exact.to(dtype).double() - exact).square().mean().sqrt()
    assert error <= 1.5 * floor


@kinds
def test_autocast(kind):
    layer = ours(kind)
    x = torch.randn(7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.double(), oracle(layer, x), rtol=2e-2, atol=2e-1)


@kinds
def test_a_layer_made_from_sizes(kind):
    cls, options = KINDS[kind]
    torch.manual_seed(0)
    layer = cls(12, 10, bias=False, **options, dtype=torch.bfloat16, lora_dropout=0.25)
    assert layer.weight.shape == (10, 12)
    assert layer.weight.dtype is torch.bfloat16
    assert layer.bias is None
    assert layer.training
    assert layer.lora_dropout == 0.25
    torch.manual_seed(0)
    assert torch.equal(nn.Linear(12, 10, False, dtype=torch.bfloat16).weight, layer.weight)
    torch.manual_seed(0)
    assert cls(12, 10, **options, device="meta").lora_A.is_meta


@kinds
def test_attributes_and_parameters(kind):
    cls, options = KINDS[kind]
    base = linear().eval()
    layer = cls.from_linear(base, **options)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert not layer.training
    root = options["r"] ** 0.5 if options.get("use_rslora") else options["r"]
    assert layer.scaling == options["lora_alpha"] / root
    assert (layer.in_features, layer.out_features, layer.r) == (12, 10, options["r"])
    assert (layer.lora_alpha, layer.use_rslora) == (options["lora_alpha"], options.get("use_rslora", False))
    trainable = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    expected = {"lora_A": (layer.r, 12), "lora_B": (10, layer.r)}
    assert trainable == expected | ({"lora_magnitude_vector": (10,)} if cls is DoRALinear else {})
    assert f"r={layer.r}" in repr(layer)
    defaults = cls.from_linear(linear())
    assert (defaults.r, defaults.lora_alpha, defaults.scaling, defaults.lora_dropout) == (8, 8, 1.0, 0.0)


@kinds
def test_a_bias_can_be_trained(kind):
    layer = ours(kind, torch.float64)
    layer.bias.requires_grad_(True)
    x, dy = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))
    assert layer.weight.grad is None


@kinds
def test_off_it_is_the_base_layer(kind):
    layer = ours(kind)
    x = torch.randn(7, 12)
    base = F.linear(x, layer.weight, layer.bias)
    on = layer(x)
    with layer.adapter_disabled():
        assert torch.equal(layer(x), base)
        assert not layer.enabled
        with layer.adapter_disabled():
            assert torch.equal(layer(x), base)
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), on)
    with pytest.raises(KeyError), layer.adapter_disabled():
        raise KeyError
    assert layer.enabled
    layer.enable_adapter(False)
    assert torch.equal(layer(x), base)
    assert "enabled=False" in repr(layer)
    layer.enable_adapter()
    assert torch.equal(layer(x), on)
    assert not torch.allclose(on, base)
    with pytest.raises(TypeError, match="enable_adapter: enabled must be True or False, found 'no'"):
        layer.enable_adapter("no")


@kinds
def test_set_scale_is_a_factor_of_the_first_scaling(kind):
    layer = ours(kind, torch.float64)
    other = theirs(layer)
    x = torch.randn(7, 12, dtype=torch.float64)
    first = layer.scaling
    for factor in (3, 0.5, -1.0, 0, 1):
        layer.set_scale(factor)
        other.set_scale("default", factor)
        assert layer.scaling == other.scaling["default"]
        torch.testing.assert_close(layer(x), other(x), **TOLERANCES[torch.float64])
    assert layer.scaling == first
    for bad, error in ((float("nan"), ValueError), (float("inf"), ValueError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match=rf"{type(layer).__name__}: set_scale: factor must be .* found '?{bad}"):
            layer.set_scale(bad)
    assert layer.scaling == first


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


BAD = {
    "r of zero": ({"r": 0}, ValueError, "r must be at least 1, found 0"),
    "r negative": ({"r": -3}, ValueError, "r must be at least 1, found -3"),
    "r of text": ({"r": "8"}, TypeError, "r must be an integer, found '8'"),
    "r float": ({"r": 8.0}, TypeError, "r must be an integer, found 8.0"),
    "r bool": ({"r": True}, TypeError, "r must be an integer, found True"),
    "alpha of NaN": ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite, found nan"),
    "alpha infinite": ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite, found inf"),
    "alpha of text": ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number, found '16'"),
    "dropout negative": ({"lora_dropout": -0.1}, ValueError, r"lora_dropout must be in \[0, 1\), found -0.1"),
    "dropout one": ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\), found 1.0"),
    "dropout NaN": ({"lora_dropout": float("nan")}, ValueError, r"lora_dropout must be in \[0, 1\), found nan"),
    "dropout None": ({"lora_dropout": None}, TypeError, "lora_dropout must be a number, found None"),
    "rslora of text": ({"use_rslora": "yes"}, TypeError, "use_rslora must be True or False, found 'yes'"),
    "init unknown": ({"init_lora_weights": "xavier"}, ValueError, "must be one of True, False, gaussian, .*'xavier'"),
    "init niter": ({"init_lora_weights": "pissa_niter_x"}, ValueError, r"pissa_niter_\[number\].*'pissa_niter_x'"),
    "init None": ({"init_lora_weights": None}, TypeError, "True, False, a name or a pair of tensors, found NoneType"),
    "init odd": ({"init_lora_weights": "orthogonal", "r": 3}, ValueError, "needs an even r, found 3"),
    "init pissa rank": ({"init_lora_weights": "pissa", "r": 11}, ValueError, r"r of at most 10 .*\[10, 12\].*found 11"),
    "init olora rank": ({"init_lora_weights": "olora", "r": 11}, ValueError, "'olora' needs an r of at most 10"),
    "init pissa scale": ({"init_lora_weights": "pissa", "lora_alpha": -1}, ValueError, "scaling, found -0.125"),
    "init one tensor": ({"init_lora_weights": (torch.ones(8, 12),)}, TypeError, r"two tensors .* found \(Tensor"),
    "init A shape": (
        {"init_lora_weights": (torch.ones(12, 8), torch.ones(10, 8))},
        ValueError,
        r"A must have shape \[8, 12\], found \[12, 8\]",
    ),
    "init B shape": (
        {"init_lora_weights": (torch.ones(8, 12), torch.ones(10, 7))},
        ValueError,
        r"B must have shape \[10, 8\], found \[10, 7\]",
    ),
    "init B int": (
        {"init_lora_weights": (torch.ones(8, 12), torch.ones(10, 8, dtype=torch.int32))},
        TypeError,
        "B must be floating, found torch.int32",
    ),
    "init A NaN": (
        {"init_lora_weights": (torch.full((8, 12), float("nan")), torch.ones(10, 8))},
        ValueError,
        "A has values that are not finite",
    ),
}


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_refused_and_changes_nothing(cls, case):
    options, error, says = BAD[case]
    base = linear()
    before = bits(base.weight), set(vars(base)), bits(torch.get_rng_state())
    with pytest.raises(error, match=f"^{cls.__name__}: .*{says}"):
        cls.from_linear(base, **options)
    assert before == (bits(base.weight), set(vars(base)), bits(torch.get_rng_state()))
    assert base.weight.requires_grad
    assert base.bias.requires_grad


def test_a_base_that_is_not_a_plain_linear_layer_is_refused():
    with pytest.raises(TypeError, match="LoRALinear: linear must be an nn.Linear, found Conv1d"):
        LoRALinear.from_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(TypeError, match="DoRALinear: linear must be an nn.Linear, found Odd with a forward of its own"):
        DoRALinear.from_linear(Odd(4, 4))
    whole = nn.Linear(4, 4)
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="LoRALinear: weight must be float32, .* found torch.int8"):
        LoRALinear.from_linear(whole)
    with pytest.raises(TypeError, match="weight must be a plain parameter, found NoneType"):
        LoRALinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="LoRALinear: weight must be float32, .* found torch.complex64"):
        LoRALinear(4, 4, dtype=torch.complex64)


@kinds
def test_an_input_that_does_not_fit_is_refused_by_name(kind):
    layer = ours(kind)
    with pytest.raises(TypeError, match="w must have the dtype of x, torch.bfloat16, found torch.float32"):
        layer(torch.ones(2, 12, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"x must have 12 features .* found \[2, 11\]"):
        layer(torch.ones(2, 11))
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="w is frozen and gets no gradient, but it requires grad"):
        layer(torch.ones(2, 12))
