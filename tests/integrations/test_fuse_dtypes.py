"""16-bit, float64 and autocast: the dtypes of PEFT's outputs and gradients, and values within what
rounding allows."""

import copy

import pytest
import torch
from fuse_helpers import errs_as_stock, fused_copy, inputs, model

from lora_kernels import explain, fuse

variants = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
rows = pytest.mark.parametrize("rows", [3, 40])
SIXTEEN = [torch.bfloat16, torch.float16]


def layers(dtype, use_dora, **values):
    """(stock, fused) layer [24 → 40] with a bias."""
    stock = model(dtype, use_dora=use_dora, **values)
    return stock.base_model.model.a, fused_copy(stock).base_model.model.a


def allowed(layer, x, dtype):
    """By how much two evaluations of the layer may differ, for each output, if `dtype` is what
    values are rounded to.

    Rounding multiplies a value by 1 + δ, |δ| ≤ u. On its way to y no value is rounded more often
    than LoRA: A, h, B, hB, its scaling, the base, the sum and y, once more for the other
    evaluation; and no value is larger than `size`, the formula with every sign made positive. Sums
    of k products, in float32 at least, add k of its roundings. DoRA's gain m/n: n is rounded as A,
    B, BA, its scaling, W + BA and n itself, where cancellation in W + BA magnifies by `condition`;
    m, m/n, gain - 1, the products and the sums add six more.
    """
    u, wide = torch.finfo(dtype).eps / 2, torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    w, a, b, x = (t.detach().double() for t in (layer.base_layer.weight, *adapter(layer), x))
    s, bias = layer.scaling["default"], layer.base_layer.bias.detach().double().abs()
    low_rank = s * x.abs() @ a.abs().T @ b.abs().T
    base = x.abs() @ w.abs().T + bias
    unit = 9 * u + (len(w.T) + len(a)) * wide
    if not layer.use_dora["default"]:
        return unit * (base + low_rank)
    n = (w + s * b @ a).norm(dim=1)
    gain = layer.lora_magnitude_vector["default"].weight.detach().double() / n
    condition = (w.abs() + s * b.abs() @ a.abs()).norm(dim=1) / n
    size = (1 + (gain - 1).abs()) * base + gain * low_rank
    return (unit + 6 * u) * size + 6 * (u + len(w.T) * wide) * condition * gain * (base + low_rank)


def adapter(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def check(stock, fused, x, rounded_to, autocast=None):
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        one, two = stock(x), fused(x)
    assert two.dtype is one.dtype and fuse(fused).fallbacks() == {}
    error = (two.double() - one.double()).abs().detach()
    worst = float((error / allowed(fused, x, rounded_to)).max())
    assert worst <= 1, worst
    return two


@variants
@rows
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("adapter_dtype", [True, False], ids=["float32 adapter", "16-bit adapter"])
def test_a_16_bit_base(dtype, adapter_dtype, use_dora, rows):
    stock, fused = layers(dtype, use_dora, adapter_dtype=adapter_dtype)
    assert adapter(fused)[0].dtype is (torch.float32 if adapter_dtype else dtype)
    assert check(stock, fused, inputs(dtype, rows), dtype).dtype is dtype


@variants
@rows
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("base", [torch.float32, *SIXTEEN], ids=str)
def test_autocast(base, dtype, use_dora, rows):
    """Also of a base that has another 16-bit dtype, and of inputs that do not have the base's."""
    stock, fused = layers(base, use_dora)
    coarsest = torch.bfloat16 if torch.bfloat16 in (base, dtype) else dtype
    for x in (inputs(rows=rows), inputs(base, rows)):
        assert check(stock, fused, x, coarsest, autocast=dtype).dtype is dtype


@variants
@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float32_and_float64(dtype, use_dora, rows):
    stock, fused = layers(dtype, use_dora)
    check(stock, fused, inputs(dtype, rows), dtype)


def test_float64_runs_on_the_reference():
    stock, fused = layers(torch.float64, False)
    decisions = explain(fused, inputs(torch.float64)).decisions
    assert [d.chosen for d in decisions] == ["reference"]
    assert set(fuse(fused_copy(model(torch.float64))).fused.values()) == {"reference"}
    # autocast leaves float64 as it is
    assert check(stock, fused, inputs(torch.float64), torch.float64, autocast=torch.bfloat16).dtype is torch.float64


@variants
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("autocast", [None, *SIXTEEN], ids=["no autocast", "bfloat16", "float16"])
def test_gradients_have_pefts_dtypes_and_err_as_its_do(dtype, use_dora, autocast):
    stock, fused = layers(dtype, use_dora)
    exact = copy.deepcopy(stock).double()
    dy = torch.randn(64, 40, generator=torch.Generator().manual_seed(5)).to(dtype if autocast is None else autocast)
    found = []
    for layer, context in ((fused, autocast), (stock, autocast), (exact, None)):
        x = inputs(dtype, 64).to(layer.base_layer.weight.dtype).requires_grad_()
        with torch.autocast("cpu", context, enabled=context is not None):
            y = layer(x)
        y.backward(dy.to(y.dtype))
        parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        assert len(parameters) == 2 + use_dora
        found.append({"x": x.grad} | {name: p.grad for name, p in parameters.items()})
    errs_as_stock(*found, times=1.5)
