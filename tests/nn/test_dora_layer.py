"""What DoRALinear has beyond LoRALinear: its magnitude, its norm, which is never stale, and its
options."""

import pytest
import torch
from layer_helpers import TOLERANCES, adapter, bits, fresh, gradients, linear, oracle, ours
from torch import nn

from lora_kernels.nn import DoRALinear
from lora_kernels.ops import dora_gain, weight_norm
from lora_kernels.ops.dropout import mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa", "olora", "orthogonal"])
def test_at_first_the_gain_is_exactly_one(init, dtype):
    layer = DoRALinear.from_linear(linear(96, 64, dtype=dtype), r=4, lora_alpha=6, init_lora_weights=init)
    magnitude = layer.lora_magnitude_vector
    assert magnitude.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            norm = layer._norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
            assert torch.equal(dora_gain(magnitude, norm).detach(), torch.ones_like(norm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_first_it_is_the_base_layer(dtype):
    base = linear(dtype=dtype)
    x = torch.randn(7, 12).to(dtype)
    layer = DoRALinear.from_linear(base, r=4)
    tolerance = TOLERANCES.get(dtype, {"rtol": 1e-2, "atol": 1e-2})
    with torch.no_grad():
        torch.testing.assert_close(layer(x), base(x), **tolerance)


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_rows_stay_finite(dtype, detach_norm):
    base = linear(dtype=dtype)
    with torch.no_grad():
        base.weight[[0, 7]] = 0
    layer = DoRALinear.from_linear(base, r=4, detach_norm=detach_norm)
    x = torch.randn(7, 12).to(dtype)
    y, grads = gradients(layer, adapter(layer), x, torch.ones(7, 10, dtype=dtype))
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert torch.equal(y[:, [0, 7]], base.bias.detach()[[0, 7]].expand(7, 2))
    assert not grads[-1][[0, 7]].any()
    assert grads[-1][1:7].all()

    optimizer = torch.optim.AdamW(adapter(layer), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in layer.parameters())
    layer.eval()
    layer.merge(safe=True)


def test_the_gradient_through_the_norm_is_exact_if_asked_for():
    layer = ours("dora", torch.float64, detach_norm=False)
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, 10, dtype=torch.float64)
    a, b, m = adapter(layer)
    adapted = layer.weight + layer.scaling * (b @ a)
    plain = x @ (m / adapted.norm(dim=1))[:, None].mul(adapted).T + layer.bias
    expected = torch.autograd.grad(plain, [x, a, b, m], dy)
    y, grads = gradients(layer, [a, b, m], x.detach(), dy)
    torch.testing.assert_close(y, plain.detach(), **TOLERANCES[torch.float64])
    for mine, its in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, its, **TOLERANCES[torch.float64])
    layer.detach_norm = True
    assert not torch.allclose(gradients(layer, [a, b, m], x.detach(), dy)[1][1], expected[1])


def test_lora_only_dropout_leaves_the_base_input_alone():
    layer = ours("dora", torch.float64, lora_dropout=0.4, dropout_semantics="lora_only")
    x = torch.randn(7, 12, dtype=torch.float64)
    torch.manual_seed(9)
    y = layer(x).detach()
    torch.manual_seed(9)
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    dropped = x * mask(seed, 0.4, 7, 12, torch.float64, x.device)
    a, b, m = (p.detach() for p in adapter(layer))
    gain = m / (layer.weight + layer.scaling * (b @ a)).norm(dim=1)
    expected = gain * (x @ layer.weight.T + layer.scaling * (dropped @ a.T @ b.T)) + layer.bias
    torch.testing.assert_close(y, expected.detach(), **TOLERANCES[torch.float64])
    assert "lora_only" in repr(layer)


def test_its_options_are_checked():
    for make in (DoRALinear.from_linear, lambda base, **options: DoRALinear(4, 4, **options)):
        base = linear()
        with pytest.raises(ValueError, match="DoRALinear: dropout_semantics must be .*lora_only, found 'none'"):
            make(base, dropout_semantics="none")
        with pytest.raises(TypeError, match="DoRALinear: detach_norm must be True or False, found 1"):
            make(base, detach_norm=1)
        assert base.weight.requires_grad


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to("cpu", torch.bfloat16)])
def test_the_magnitude_stays_float32_bit_for_bit(cast):
    layer = ours("dora")
    layer(torch.ones(2, 12)).sum().backward()
    magnitude = layer.lora_magnitude_vector
    before, grad = bits(magnitude), bits(magnitude.grad)
    cast(layer)
    assert layer.weight.dtype.itemsize == layer.lora_A.dtype.itemsize == layer.lora_B.dtype.itemsize == 2
    assert layer.lora_magnitude_vector is magnitude
    assert magnitude.dtype is magnitude.grad.dtype is torch.float32
    assert (bits(magnitude), bits(magnitude.grad)) == (before, grad)
    x = torch.randn(7, 12).to(layer.weight)
    torch.testing.assert_close(layer(x).detach().double(), oracle(layer, x), rtol=2e-2, atol=5e-2)
    layer.float()
    assert bits(magnitude) == before


def test_the_magnitude_follows_the_base_to_float64_and_to_other_devices():
    layer = ours("dora")
    layer.double()
    assert layer.lora_magnitude_vector.dtype is torch.float64
    layer.half()
    assert layer.lora_magnitude_vector.dtype is torch.float32
    layer.to("meta", torch.bfloat16)
    assert all(p.is_meta for p in layer.parameters())
    assert layer.lora_magnitude_vector.dtype is torch.float32
    layer.to_empty(device="cpu")
    assert layer.lora_magnitude_vector.dtype is torch.float32
    assert not any(p.is_meta for p in layer.parameters())


@pytest.mark.parametrize("way", ["overwrite", "swap"])
def test_the_magnitude_stays_float32_in_the_other_ways_of_conversion(way):
    setting = f"{way}_module_params_on_conversion"
    layer = ours("dora")
    before = bits(layer.lora_magnitude_vector)
    getattr(torch.__future__, f"set_{setting}")(True)
    try:
        layer.bfloat16()
    finally:
        getattr(torch.__future__, f"set_{setting}")(False)
    assert layer.weight.dtype is layer.lora_A.dtype is torch.bfloat16
    assert layer.lora_magnitude_vector.dtype is torch.float32
    assert bits(layer.lora_magnitude_vector) == before


@pytest.mark.parametrize("assign", [False, True])
def test_a_16_bit_magnitude_in_a_file_is_widened(assign):
    layer = ours("dora")
    state = {name: t.bfloat16() if "magnitude" in name else t for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=assign)
    assert layer.lora_magnitude_vector.dtype is torch.float32
    assert torch.equal(layer.lora_magnitude_vector, state["lora_magnitude_vector"].float())


def fused_step(layer):
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(adapter(layer), lr=0.1, fused=True)
        layer(torch.ones(3, 12)).square().sum().backward()
        optimizer.step()


def edit_weight(layer):
    layer.weight.mul_(1.5)


def other_state(layer):
    layer.load_state_dict({name: t + 0.25 for name, t in layer.state_dict().items()})


def merge_and_back(layer):
    layer.merge()
    layer(torch.ones(3, 12))
    layer.unmerge()
    layer.lora_B.data[2] += 1


def replace_a(layer):
    layer.lora_A = nn.Parameter(layer.lora_A * 2)


def to_and_fro(layer):
    layer.bfloat16().float()


CHANGES = {
    "fused AdamW": fused_step,
    "A.data": lambda layer: layer.lora_A.data.mul_(1.01),
    "one element of A.data": lambda layer: layer.lora_A.data[1, 5].add_(0.5),
    "one element of B.data": lambda layer: layer.lora_B.data[9, 2].add_(0.5),
    "another A.data": lambda layer: setattr(layer.lora_A, "data", layer.lora_A.data * 2),
    "another B": lambda layer: setattr(layer, "lora_B", nn.Parameter(layer.lora_B * 2)),
    "set_scale": lambda layer: layer.set_scale(2.0),
    "load_state_dict": other_state,
    "merge and unmerge": merge_and_back,
    "weight in place": edit_weight,
    "weight.data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 3),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 3, requires_grad=False)),
    "cast": to_and_fro,
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(
        torch.arange(66.0) / 50, [layer.lora_A, layer.lora_B]
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_norm_is_never_stale(change, training):
    layer = ours("dora").train(training)
    x = torch.randn(5, 12)
    with torch.no_grad():
        before = layer(x), layer(x)
        assert torch.equal(*before)
        CHANGES[change](layer)
        after = layer(x)
        assert torch.equal(after, fresh(layer)(x))
        assert not torch.equal(after, before[0])
        torch.testing.assert_close(after.double(), oracle(layer, x), rtol=1e-5, atol=1e-4)
        norm = layer._norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
        assert torch.equal(norm, weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling))
    torch.testing.assert_close(layer(x).detach(), after, rtol=1e-6, atol=1e-6)


def test_on_the_meta_device():
    layer = DoRALinear(6, 5, device="meta")
    assert layer(torch.randn(3, 6, device="meta")).shape == (3, 5)
    with torch.no_grad():
        assert layer(torch.randn(3, 6, device="meta")).device.type == "meta"
