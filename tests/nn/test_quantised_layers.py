"""Layers with an adapter over bitsandbytes' weights: against float64 of the numbers that the codes
stand for, and through all that a layer is put through."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels.nn import DoRALinear, GroupedLinear, LoRALinear
from lora_kernels.testing.tolerances import rms
from tests.nn.layer_helpers import trained
from tests.nn.quantised_modules import CODES, bnb, dense, module

KINDS = {"lora": (LoRALinear, {}), "dora": (DoRALinear, {}), "exact": (DoRALinear, {"detach_norm": False})}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)



def layer_over(base, kind="lora", **options):
    cls, own = KINDS[kind]
    return trained(cls.from_linear(base, r=4, lora_alpha=6, **own, **options))


def float64(layer, w, x, dy):
    """(y, gradients of x and all parameters) of the layer's formula for W = w."""
    x = x.detach().double().requires_grad_()
    names = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * isinstance(layer, DoRALinear)
    a, b, *m = leaves = [getattr(layer, name).detach().double().requires_grad_() for name in names]
    adapted = w.double() + layer.scaling * b @ a
    if m:
        norm = adapted.norm(dim=1)
        adapted = (m[0] / (norm.detach() if layer.detach_norm else norm))[:, None] * adapted
    y = x @ adapted.T + (0 if layer.bias is None else layer.bias.detach().double())
    return y.detach(), torch.autograd.grad(y, [x, *leaves], dy.double())


def ours(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    names = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * isinstance(layer, DoRALinear)
    return y.detach(), torch.autograd.grad(y, [x, *(getattr(layer, n) for n in names)], dy)


def close(found, wanted, bound):
    assert rms(found.double() - wanted) <= bound * rms(wanted), (rms(found.double() - wanted), rms(wanted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codes", CODES)
def test_values_and_gradients(codes, kind):
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
        for tokens, n_in, n_out in ((3, 64, 48), (70, 96, 33)):
            base = module(codes, n_in, n_out, bias=tokens == 3)
            layer, w = layer_over(base, kind), dense(base, dtype)
            generator = torch.Generator().manual_seed(tokens)
            x, dy = (torch.randn(2, tokens, n, generator=generator).to(dtype) for n in (n_in, n_out))
            y, found = ours(layer, x, dy)
            assert y.dtype is dtype
            exact, wanted = float64(layer, w, x, dy)
            close(y, exact, bound)
            for one, other in zip(found, wanted, strict=True):
                close(one, other, bound)
            with torch.no_grad():
                close(layer(x), exact, bound)


@pytest.mark.parametrize("codes", CODES)
def test_the_compute_dtype_of_the_module(codes):
    base = module(codes, compute=torch.bfloat16)
    layer, x = layer_over(base, "dora").eval(), torch.randn(5, 64)
    y = layer(x)
    assert y.dtype is torch.float32
    if codes != "int8":  # which has none
        assert torch.equal(y, layer(x.bfloat16()).float())
    else:
        assert not torch.equal(y, y.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.float32


@pytest.mark.parametrize("codes", CODES)
def test_the_first_gain_is_one(codes):
    base = module(codes, compute=torch.bfloat16)
    layer, x = DoRALinear.from_linear(base, r=4), torch.randn(5, 64)
    if codes == "int8":
        x = x.to(layer._quantised.dtype)
    plain = LoRALinear.from_linear(base, r=4)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("codes", CODES)
def test_without_the_adapter(codes):
    base = module(codes)
    layer, x = layer_over(base, "dora"), torch.randn(5, 64, requires_grad=True)
    with layer.adapter_disabled():
        y = layer(x)
    wanted = F.linear(x.detach().double(), dense(base).double(), base.bias.double())
    close(y, wanted, 1e-6)
    (dx,) = torch.autograd.grad(y.sum(), x)
    close(dx, dense(base).double().sum(0).expand(5, 64), 1e-6)
    assert not base.weight.requires_grad and base.weight is layer.weight


def test_a_base_that_cannot_be_read():
    base = bnb.nn.Linear4bit(64, 48)
    with pytest.raises(TypeError, match="LoRALinear: the weight of the Linear4bit cannot be read: .* no quant_state"):
        LoRALinear.from_linear(base)
    with pytest.raises(TypeError, match="keeps its weight in 16 bits"):
        LoRALinear.from_linear(bnb.nn.Linear8bitLt(64, 48))


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_inits_that_would_change_codes(init):
    base = module("nf4")
    before = base.weight.data.clone()
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' takes a product out of the base weight, which is q"):
        LoRALinear.from_linear(base, init_lora_weights=init)
    assert torch.equal(base.weight.data, before)


def test_inits_draw_what_they_draw_over_floats():
    for init in (True, False, "gaussian", "orthogonal"):
        torch.manual_seed(0)
        one = LoRALinear.from_linear(module("nf4"), r=4, init_lora_weights=init)
        torch.manual_seed(0)
        two = LoRALinear.from_linear(nn.Linear(64, 48), r=4, init_lora_weights=init)
        torch.manual_seed(0)
        nn.Linear(64, 48), module("nf4")
        assert one.lora_A.dtype is torch.float32 and one.lora_A.shape == two.lora_A.shape
    torch.manual_seed(0)
    one.reset_parameters()
    first = one.lora_A.detach().clone()
    torch.manual_seed(0)
    one.reset_parameters()
    assert torch.equal(first, one.lora_A)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("codes", CODES)
def test_merged_to_floats(codes, kind):
    base = module(codes, dtype=torch.bfloat16)
    layer, x = layer_over(base, kind).eval(), torch.randn(5, 64)
    wanted, plain = layer(x), base.weight
    for dtype in (None, torch.float32, torch.float16):
        assert layer.merge(dtype=dtype) is None
        assert layer.weight.dtype is (dtype or layer._quantised.dtype) and layer.weight.shape == (48, 64)
        close(layer(x), wanted.double(), 5e-3)
        assert list(layer.state_dict()) == ["weight", "bias"]
        with layer.adapter_disabled():
            close(layer(x), F.linear(x, dense(base), base.bias).double(), 1e-6)
        layer.to(torch.float32)
        layer.unmerge()
        assert layer.weight is plain
    assert torch.equal(layer(x), wanted)
    assert codes == "int8" or layer._quantised.dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("codes", CODES)
def test_merged_and_quantised_again(codes, kind):
    """Against the library's own quantiser of the merged numbers."""
    base = module(codes)
    layer, x = layer_over(base, kind).eval(), torch.randn(5, 64)
    wanted = layer(x)
    layer.merge(dtype=torch.float32)
    exact = layer.weight.detach()
    layer.unmerge()
    error = layer.merge(requantise=True)
    again = layer._requantised.module
    assert type(again) is type(base) and torch.equal(dense(again), dense(module(codes, weight=exact)))
    assert error == pytest.approx(float((dense(again) - exact).norm() / exact.norm()))
    assert (0.003 if codes == "int8" else 0.05) < error < (0.015 if codes == "int8" else 0.16)
    close(layer(x), F.linear(x, dense(again), base.bias).double(), 1e-6)
    assert rms((layer(x) - wanted).double()) < 2 * error * rms(wanted.double())
    assert {*layer.state_dict()} == {*base.state_dict()}
    layer = copy.deepcopy(layer)
    layer.unmerge()
    assert torch.equal(layer(x), wanted)


def test_what_merge_refuses():
    layer = layer_over(module("nf4"))
    with pytest.raises(ValueError, match="dtype is of a floating weight; requantise=True makes none"):
        layer.merge(dtype=torch.float32, requantise=True)
    with pytest.raises(TypeError, match="merge: dtype must be float32, bfloat16, float16 or float64, found torch.int8"):
        layer.merge(dtype=torch.int8)
    plain = LoRALinear(8, 8)
    with pytest.raises(ValueError, match="merge: requantise is for a quantised base; this one is torch.float32"):
        plain.merge(requantise=True)
    with torch.no_grad():
        layer.lora_A[0, 0] = torch.inf
    for options in ({}, {"requantise": True}):
        with pytest.raises(ValueError, match="the merged weight must be finite"):
            layer.merge(safe=True, **options)
        assert not layer.merged


@pytest.mark.parametrize("codes", CODES)
def test_state_dicts(codes):
    """The base's names and parts, and another layer's codes with all that they mean."""
    base = module(codes)
    layer = layer_over(base, "dora")
    found = layer.state_dict()
    assert {*found} == {*base.state_dict(), "lora_A", "lora_B", "lora_magnitude_vector"}
    other, x = layer_over(module(codes, seed=5), "dora"), torch.randn(3, 64)
    with torch.no_grad():
        other.lora_A.mul_(2)
    assert not torch.equal(other(x), layer(x))
    assert other.load_state_dict({name: t.clone() for name, t in found.items()}).missing_keys == []
    assert torch.equal(other(x), layer(x))
    assert torch.equal(dense(other._quantised.module), dense(base))
    assigned = layer_over(module(codes, seed=6), "dora")
    assigned.load_state_dict({name: t.clone() for name, t in found.items()}, assign=True)
    assert torch.equal(assigned(x), layer(x))
    bare = {name: t for name, t in found.items() if not name.startswith(("weight.", "SCB"))}
    bare.pop("weight_format", None)
    with pytest.raises(RuntimeError, match="weight has codes, and the state_dict nothing that says what they mean"):
        layer_over(module(codes), "dora").load_state_dict(bare)


@pytest.mark.parametrize("codes", CODES)
def test_copies(codes):
    layer, x = layer_over(module(codes), "dora"), torch.randn(3, 64)
    wanted = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(again(x), wanted)
        assert again._quantised.module.weight is again.weight
        assert again.weight.data_ptr() != layer.weight.data_ptr()
        assert again.merge(requantise=True) > 0
        again.unmerge()
        assert torch.equal(again(x), wanted)
        assert type(again.plain_layer(False)) is type(layer._quantised.module)


@pytest.mark.parametrize("codes", CODES)
def test_casts_and_moves(codes):
    layer, x = layer_over(module(codes), "dora"), torch.randn(3, 64)
    wanted = layer(x)
    for change in (lambda: layer.to("cpu"), layer.double, layer.float, lambda: layer.to(torch.bfloat16)):
        change()
    assert layer.weight.dtype in (torch.uint8, torch.int8) and layer.bias.dtype is torch.bfloat16
    layer.float()
    assert rms((layer(x) - wanted).double()) < 1e-2 * rms(wanted.double())


def test_codes_in_memory_of_floats_are_not_cast():
    base = bnb.nn.Linear4bit(64, 48, quant_type="nf4", quant_storage=torch.bfloat16)
    base = base.to("cpu")
    assert base.weight.dtype is torch.bfloat16
    layer, x = layer_over(base), torch.randn(3, 64)
    wanted = layer(x)
    layer.float()
    assert layer.weight.dtype is torch.bfloat16
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("codes", CODES)
def test_other_codes_are_seen(codes):
    """Written in place, and in the place of the others."""
    layer, other, x = layer_over(module(codes)), layer_over(module(codes, seed=3)), torch.randn(3, 64)
    other.lora_A, other.lora_B = layer.lora_A, layer.lora_B
    assert not torch.equal(layer(x), other(x))
    base, source = layer._quantised.module, other._quantised.module
    with torch.no_grad():
        other.bias.copy_(layer.bias)
        base.weight.data.copy_(source.weight.data)
        if codes == "int8":
            base.weight.SCB.copy_(source.weight.SCB)
        else:
            base.weight.quant_state.absmax.copy_(source.weight.quant_state.absmax)
            if codes == "nested":
                base.weight.quant_state.state2.absmax.copy_(source.weight.quant_state.state2.absmax)
                base.weight.quant_state.offset.copy_(source.weight.quant_state.offset)
    assert torch.equal(layer(x), other(x))
    layer.weight.data = module(codes, seed=4).weight.data
    assert not torch.equal(layer(x), other(x))


@pytest.mark.parametrize("codes", ["nested", "int8"])
def test_plain_layers(codes):
    base = module(codes, n_out=64)
    base.eval()
    seen = []
    base.register_forward_hook(lambda *_: seen.append(1))
    layer, x = layer_over(base, "dora"), torch.randn(3, 64)
    layer._forward_hooks = base._forward_hooks
    wanted = layer(x)
    plain = layer.plain_layer(True)
    assert type(plain) is nn.Linear and plain.weight.dtype is layer._quantised.dtype and not plain.training
    assert plain.in_features == 64 and repr(plain).startswith("Linear(in_features=64, out_features=64")
    if plain.weight.dtype is torch.float32:
        close(plain(x), wanted.double(), 1e-5)
    back = layer.plain_layer(False)
    assert type(back) is type(base) and back is not base and back.weight is base.weight
    assert torch.equal(dense(back), dense(base))
    layer.merge(requantise=True)
    again = layer.plain_layer(True)
    assert type(again) is type(base) and {*again.state_dict()} == {*base.state_dict()}
    close(F.linear(x, dense(again), base.bias), wanted.double(), 0.2)
    seen.clear()
    again(x), back(x)
    assert len(seen) == 2


def test_checkpointing_and_compiling():
    layer, x = layer_over(module("nested"), "dora"), torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    wanted = torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B])
    for reentrant in (True, False):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        layer.zero_grad()
        x.grad = None
        y.square().sum().backward()
        for one, other in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), wanted, strict=True):
            assert torch.equal(one, other)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x.bfloat16()), layer(x.bfloat16()))


def test_groups_call_them_alone():
    layers = [layer_over(module(codes, seed=i)) for i, codes in enumerate(CODES)]
    x = torch.randn(3, 64)
    for y, layer in zip(GroupedLinear(layers)(x), layers, strict=True):
        assert torch.equal(y, layer(x))


def test_merged_while_others_call():
    """Each call is of one state: the merged weight's, or the codes' and the adapter's."""
    layer, x = layer_over(module("nf4")).eval(), torch.randn(3, 64)
    with torch.no_grad():
        allowed = [layer(x)]
        layer.merge(requantise=True)
        allowed.append(layer(x))
        layer.unmerge()
    wrong, done = [], threading.Event()

    def call():
        with torch.no_grad():
            while not done.is_set():
                y = layer(x)
                if not any(torch.equal(y, each) for each in allowed):
                    wrong.append(y)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        layer.merge(requantise=True)
        layer.unmerge()
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
