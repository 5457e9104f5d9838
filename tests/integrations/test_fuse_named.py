"""adapter_names on the kernels: each sequence with its own adapter, PEFT's outputs and gradients,
and DoRA, which PEFT refuses."""

import copy

import peft
import pytest
import torch
from fuse_helpers import (
    LLAMA_LAYERS,
    errs_as_stock,
    fused_copy,
    gpt2,
    gradients,
    inputs,
    llama,
    model,
    randomise,
    same,
    step,
    tokens,
)

from lora_kernels import fuse
from lora_kernels.integrations.peft.rows import layout_of

DORA = {"use_dora": True}
MIXES = {
    "ranks and scales": [{}, {"r": 9}, {"r": 8, "use_rslora": True}],
    "layers": [{}, {"target_modules": ["a"]}, {"target_modules": ["b"], "r": 3}],
    "biases": [{"lora_bias": True}, {}, {"lora_bias": True, "lora_alpha": 2}],
}
NAMES = ["default", "other1", "__base__", "other0", "other0", "default", "other1"]
COMPILED = {"backend": "aot_eager"}


def named(mix, dtype=torch.float32, net=None, learns=True, **common):
    """A model of several adapters in eval mode, as adapter_names wants it; all of them learn."""
    common = {"target_modules": ["a", "b"]} | common
    where = {} if net is None else {"net": net}
    made = model(dtype, **where, **(common | mix[0]))
    for i, values in enumerate(mix[1:]):
        made.add_adapter(f"other{i}", peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | common | values)))
    randomise(made)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
            if "lora_B" in name and name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=generator))
            if "lora_" in name:
                p.requires_grad_(learns)
    return made.eval()


def sequences(count=7, length=None, dtype=torch.float32):
    shape = (count, 24) if length is None else (count, length, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize("names", [NAMES, ["default"] * 7, ["__base__"] * 7, NAMES[:3]], ids=["mixed", "one", "base", "few"])
def test_outputs_and_all_gradients_are_pefts(mix, dtype, length, names):
    stock = named(MIXES[mix], dtype)
    fused = fused_copy(stock)
    x, exact = sequences(len(names), length, dtype), copy.deepcopy(stock).double()
    found = [
        gradients(one, x.to(d), adapter_names=names) for one, d in ((fused, dtype), (stock, dtype), (exact, torch.float64))
    ]
    errs_as_stock(*found)
    with torch.no_grad():
        outputs = [{"y": one(x, adapter_names=names)} for one in (fused, stock)]
        errs_as_stock(*outputs, {"y": found[2]["y"]})
    assert fuse(fused).fallbacks() == {}


def test_gradients_of_gradients():
    stock = named(MIXES["biases"]).double()
    fused = fused_copy(stock)
    for one in (stock, fused):
        one.float()

    def twice(one):
        x = sequences().requires_grad_()
        (dx,) = torch.autograd.grad(one(x, adapter_names=NAMES).square().sum(), x, create_graph=True)
        one.zero_grad(set_to_none=True)
        dx.square().sum().backward()
        return {"x": x.grad} | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}

    expected, found = twice(stock), twice(fused)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_dora_which_peft_refuses(length, grad):
    stock = named([DORA, {"r": 3, **DORA}, {"r": 2}])
    fused = fused_copy(stock)
    layer, plain = fused.base_model.model.a, stock.base_model.model.a
    x = sequences(7, length)
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        plain(x, adapter_names=NAMES)
    if not grad:
        with torch.no_grad():
            y = layer(x, adapter_names=NAMES)
    else:
        found = gradients(layer, x, adapter_names=NAMES)
        y, dy = found["y"], torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(5))
    plain.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    for i, name in enumerate(NAMES):
        plain.set_adapter("default" if name == "__base__" else name)
        one = slice(i, i + 1)
        expected = (plain.base_layer if name == "__base__" else plain)(leaf[one])
        torch.testing.assert_close(y[one], expected, rtol=1e-4, atol=1e-5, msg=name)
        if grad:
            for p in plain.parameters():
                p.requires_grad_(p is not plain.base_layer.weight and p is not plain.base_layer.bias)
            (expected * dy[one]).sum().backward()
    if grad:
        torch.testing.assert_close(found["x"], leaf.grad, rtol=1e-4, atol=1e-5)
        expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        assert expected.keys() | {"x", "y"} == found.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4, msg=name)
    assert fuse(fused).fallbacks() == {}


def test_a_batch_is_laid_out_once_for_all_layers_and_by_its_names():
    stock = named(MIXES["ranks and scales"]).double()
    fused = fused_copy(stock)
    names, x = list(NAMES), sequences(length=3, dtype=torch.float64)
    layout_of.cache_clear()
    with torch.inference_mode():
        same(stock, fused, x, adapter_names=names)
    assert layout_of.cache_info().misses == 1 and layout_of.cache_info().hits == 1
    gradients(fused, x, adapter_names=names)  # nothing that was kept is of inference mode
    names[0], names[1] = names[1], names[0]
    with torch.no_grad():
        same(stock, fused, x, adapter_names=names)
    assert layout_of.cache_info().misses == 2


def test_edits_and_scales_are_seen():
    stock = named(MIXES["ranks and scales"])
    fused = fused_copy(stock)
    x = sequences(length=3)
    with torch.no_grad():
        for number in range(3):
            for one in (stock, fused):
                layer = one.base_model.model.a
                layer.lora_B["other0"].weight.data.mul_(1.5)
                layer.set_scale("default", 1.0 + number)
            same(stock, fused, x, adapter_names=NAMES)


@pytest.mark.parametrize("net, targets", [(llama, LLAMA_LAYERS), (gpt2, ["c_attn", "c_fc", "c_proj"])], ids=["llama", "gpt2"])
def test_a_model_generates_pefts_tokens(net, targets):
    fan = {"fan_in_fan_out": net is gpt2, "task_type": "CAUSAL_LM", "target_modules": targets}
    stock = named([{}, {"target_modules": targets[:2], "r": 3}], net=net, **fan)
    fused = fused_copy(stock)
    batch = tokens() | {"adapter_names": ["other0", "default"]}
    errs_as_stock(step(fused, batch), step(stock, batch), step(copy.deepcopy(stock).double(), batch))
    for keywords in ({}, {"num_beams": 2}):
        made = [
            one.generate(
                input_ids=batch["input_ids"], adapter_names=["other0", "__base__"], max_new_tokens=4, do_sample=False,
                pad_token_id=0, **keywords,
            )
            for one in (stock, fused)
        ]  # fmt: skip
        assert torch.equal(*made)
    assert fuse(fused, strict=True).fallbacks() == {}


def test_peft_s_own_errors_stay():
    fused = fused_copy(named(MIXES["ranks and scales"]))
    x = sequences()
    with pytest.raises(ValueError, match="non-existing adapter"):
        fused(x, adapter_names=["absent"] * 7)
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        fused(x, adapter_names=NAMES[:3])
    with pytest.raises(ValueError, match="in training mode"):
        fused.train()(x, adapter_names=NAMES)
    fused.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        fused(x, adapter_names=NAMES)


def test_disabled_adapters_are_the_base():
    stock = named(MIXES["biases"])
    fused = fused_copy(stock)
    with stock.disable_adapter(), fused.disable_adapter():
        same(stock, fused, sequences(), adapter_names=NAMES)


def test_dropout_of_a_layer_that_trains_is_torchs():
    stock = named([{"lora_dropout": 0.5}, {"lora_dropout": 0.2}])
    fused = fused_copy(stock)
    found = []
    for one in (stock, fused):
        layer = one.base_model.model.a.train()
        torch.manual_seed(0)
        # one adapter of the two, since PEFT draws their masks in the order of a set
        found.append(gradients(layer, sequences(), adapter_names=["__base__", "default"] * 3 + ["__base__"]))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-4, msg=name)
    assert fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("learns", [False, True])
def test_autocast_and_a_compiled_graph(learns):
    stock = named(MIXES["ranks and scales"])
    fused = fused_copy(stock)
    x = sequences(length=3)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learns):
        found, expected = (one(x, adapter_names=NAMES) for one in (fused, stock))
        assert found.dtype is expected.dtype is torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
        if learns:
            pair = [gradients(one, x, adapter_names=NAMES) for one in (fused, stock)]
            errs_as_stock(*pair, gradients(copy.deepcopy(stock).double(), x.double(), adapter_names=NAMES))
    assert fuse(fused).fallbacks() == {}
    if not learns:
        torch._dynamo.reset()
        layer, plain = fused.base_model.model.a, stock.base_model.model.a
        call = torch.compile(lambda x: layer(x, adapter_names=NAMES), **COMPILED)
        with torch.no_grad():
            torch.testing.assert_close(call(x), plain(x, adapter_names=NAMES))
        torch._dynamo.reset()


REASONS = {
    "adapters differ by token and in dtype": lambda a: (a.lora_A["other0"].bfloat16(), a.lora_B["other0"].bfloat16()),
    "adapters differ by token and a scaling is Tensor": lambda a: a.scaling.update(other0=torch.tensor(2.0)),
    "a hook waits for the call of base_layer, lora_A, lora_B or lora_dropout": lambda a: a.lora_A[
        "other0"
    ].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_left_to_peft_is_counted(reason):
    fused = fused_copy(named(MIXES["ranks and scales"], learns=False))
    layer = fused.base_model.model.a
    REASONS[reason](layer)
    plain = copy.deepcopy(layer)
    plain.__class__ = peft.tuners.lora.Linear
    x = inputs()
    assert torch.equal(layer(x, adapter_names=NAMES), plain(x, adapter_names=NAMES))
    assert fuse(fused).fallbacks() == {"base_model.model.a": {reason: 1}}
