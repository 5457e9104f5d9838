"""Several active adapters on the kernels: PEFT's outputs and gradients, in PEFT's order, whatever
each of them is."""

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

DORA = {"use_dora": True}
MIXES = {
    "two": [{}, {}],
    "one scale": [{}, {"r": 2, "lora_alpha": 3}],
    "ranks and scales": [{}, {"r": 9}, {"r": 3, "use_rslora": True}],
    "biases": [{"lora_bias": True}, {}, {"lora_bias": True, "lora_alpha": 2}],
    "DoRA last": [{}, {"lora_alpha": 3}, DORA],
    "DoRA first": [DORA, {}, {"r": 3}],
    "DoRA twice": [DORA, {"r": 3, **DORA}],
    "DoRA in between": [{}, DORA, {"r": 3}, {"r": 2, **DORA}],
}
mixes = pytest.mark.parametrize("mix", MIXES)


def several(mix, dtype=torch.float32, adapter_dtype=True, net=None, **common):
    """A model whose adapters of these configurations are all active."""
    common = {"target_modules": ["a", "b"]} | common
    where = {} if net is None else {"net": net}
    made = model(dtype, adapter_dtype=adapter_dtype, **where, **(common | mix[0]))
    for i, values in enumerate(mix[1:]):
        config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | common | values))
        made.add_adapter(f"other{i}", config, autocast_adapter_dtype=adapter_dtype)
    randomise(made)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
            if "lora_B" in name and name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=generator))
    made.base_model.set_adapter(["default", *(f"other{i}" for i in range(len(mix) - 1))])
    return made


@mixes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 33])
def test_outputs_and_all_gradients_are_pefts(mix, dtype, rows):
    stock = several(MIXES[mix], dtype)
    fused = fused_copy(stock)
    x = inputs(dtype, rows)
    errs_as_stock(gradients(fused, x), gradients(stock, x), gradients(copy.deepcopy(stock).double(), x.double()))
    with torch.no_grad():
        outputs = [{"y": one(x)} for one in (fused, stock)]
        errs_as_stock(*outputs, {"y": copy.deepcopy(stock).double()(x.double())})
    report = fuse(fused, strict=True)
    assert len(report.fused) == 2 and report.fallbacks() == {}


@pytest.mark.parametrize("mix", ["ranks and scales", "DoRA twice"])
def test_16_bit_adapters(mix):
    stock = several(MIXES[mix], torch.bfloat16, adapter_dtype=False)
    fused = fused_copy(stock)
    x = inputs(torch.bfloat16)
    errs_as_stock(gradients(fused, x), gradients(stock, x), gradients(copy.deepcopy(stock).double(), x.double()))
    assert fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("follower", [{"lora_dropout": 0.5}, {"lora_dropout": 0.5, **DORA}], ids=["lora", "dora"])
def test_dropout_of_one_that_follows_is_torchs(follower):
    """The first one draws nothing, so one seed gives PEFT's mask."""
    stock = several([{}, follower]).train()
    fused = fused_copy(stock)
    found = []
    for one in (fused, stock):
        torch.manual_seed(0)
        found.append(gradients(one.base_model.model.a, inputs()))
    for name, grad in found[1].items():
        torch.testing.assert_close(found[0][name], grad, rtol=1e-4, atol=1e-4, msg=name)
    assert fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("first", [{}, DORA], ids=["lora", "dora"])
def test_each_adapter_draws_a_mask_of_its_own(first):
    """With one feature in x, W x + b is left with neither, one or both adapters' terms."""
    drop = {"lora_dropout": 0.5}
    fused = fused_copy(several([first | drop, drop])).train()
    layer = fused.base_model.model.a
    x = torch.zeros(400, 24)
    x[:, 5] = 1.0
    y = layer(x)
    base = layer.base_layer(x[:1])
    terms = []
    for name in ("default", "other0"):
        layer.eval()
        layer.set_adapter(name)
        terms.append((layer(x[:1]) - base) * 2)
    found = {}
    for one in (False, True):
        for two in (False, True):
            expected = base + one * terms[0] + two * terms[1]
            found[one, two] = int(((y - expected).abs() < 1e-4).all(1).sum())
    assert sum(found.values()) == 400 and min(found.values()) > 60, found


def test_dora_after_one_with_dropout_rescales_what_it_left():
    stock = several([{"lora_dropout": 0.5}, DORA])
    fused = fused_copy(stock).train()
    x = torch.zeros(200, 24)
    x[:, 5] = 1.0
    y, layer, counts = fused.base_model.model.a(x), stock.eval().base_model.model.a, []
    scale = layer.scaling["default"]
    for kept in (0.0, 2.0):
        layer.scaling["default"] = kept * scale
        counts.append(int(((y - layer(x)).abs() < 1e-4).all(1).sum()))
    assert sum(counts) == 200 and min(counts) > 60, counts


def test_gradients_belong_to_the_masks_that_were_drawn():
    """y is linear in each B, so its share of y · dy is B · dB, whatever was dropped."""
    fused = fused_copy(several([{"lora_dropout": 0.3}, {"lora_dropout": 0.6}, {}])).train()
    layer = fused.base_model.model.a
    x = inputs()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * dy).sum().backward()
    share = sum((b.weight * b.weight.grad).sum() for b in layer.lora_B.values())
    torch.testing.assert_close(share, ((y - layer.base_layer(x)) * dy).sum(), rtol=1e-4, atol=1e-3)
    share = sum((a.weight * a.weight.grad).sum() for a in layer.lora_A.values())
    torch.testing.assert_close(share, ((y - layer.base_layer(x)) * dy).sum(), rtol=1e-4, atol=1e-3)


@mixes
def test_weights_of_adapters_as_diffusers_sets_them(mix):
    stock = several(MIXES[mix]).eval()
    fused = fused_copy(stock)
    with torch.no_grad():
        for weights in ((0.7, 0.4, 1.3, 0.2), (1.0, 0.0, -0.5, 2.0), (1.0, 1.0, 1.0, 1.0)):
            for one in (stock, fused):
                for layer in (one.base_model.model.a, one.base_model.model.b):
                    for name, weight in zip(layer.active_adapters, weights, strict=False):
                        layer.set_scale(name, weight)
            same(stock, fused, inputs())
        for one in (stock, fused):
            one.base_model.model.a.scale_layer(0.5)
        same(stock, fused, inputs())
    assert fuse(fused).fallbacks() == {}


def test_edits_of_any_of_them_are_seen():
    stock = several(MIXES["DoRA twice"])
    fused = fused_copy(stock)
    with torch.no_grad():
        for number in range(3):
            for name in ("default", "other0"):
                for one in (stock, fused):
                    layer = one.base_model.model.a
                    layer.lora_B[name].weight.data.mul_(1.5)
                    layer.lora_magnitude_vector[name].weight.data.add_(0.1 * number)
                same(stock, fused, inputs())
                same(stock, fused, inputs())


@pytest.mark.parametrize("mix", ["DoRA in between", pytest.param("ranks and scales", marks=pytest.mark.slow)])
def test_autocast_checkpoints_and_a_compiled_graph(mix):
    stock = several(MIXES[mix])
    fused = fused_copy(stock)
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fused(x).dtype is stock(x).dtype is torch.bfloat16
        torch.testing.assert_close(fused(x), stock(x), rtol=5e-2, atol=5e-2)
    expected = gradients(stock, x)
    torch._dynamo.reset()
    for call in (
        lambda x: torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False),
        torch.compile(fused, fullgraph=True, backend="aot_eager"),
    ):
        fused.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
        found = {"y": y.detach(), "x": leaf.grad} | {n: p.grad for n, p in fused.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4, msg=name)
    torch._dynamo.reset()
    assert fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("net, targets", [(llama, LLAMA_LAYERS), (gpt2, ["c_attn", "c_fc", "c_proj"])], ids=["llama", "gpt2"])
def test_a_model_of_which_each_adapter_has_other_layers(net, targets):
    fan = {"fan_in_fan_out": net is gpt2, "task_type": "CAUSAL_LM"}
    mix = [{"target_modules": targets}, {"target_modules": targets[:2], "r": 3}]
    stock = several(mix, net=net, **fan)
    fused = fused_copy(stock)
    errs_as_stock(step(fused, tokens()), step(stock, tokens()), step(copy.deepcopy(stock).double(), tokens()))
    assert not fuse(fused, strict=True).fallbacks()


REASONS = {
    "adapters of torch.float32 and other dtypes are active together": ([{}, {}], lambda a: a.lora_A["other0"].bfloat16()),
    "lora_bias and DoRA are active together": ([{"lora_bias": True}, DORA], lambda a: None),
    "a hook waits for the call of base_layer, lora_A, lora_B or lora_dropout": (
        [{}, {}],
        lambda a: a.lora_A["other0"].register_forward_hook(lambda *_: None),
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_left_to_peft_is_named_and_counted(reason):
    mix, act = REASONS[reason]
    fused = fused_copy(several(mix))
    layer = fused.base_model.model.a
    act(layer)
    if "dtypes" in reason:
        layer.lora_B["other0"].bfloat16()
    stock = copy.deepcopy(layer)
    stock.__class__ = peft.tuners.lora.Linear
    torch.testing.assert_close(layer(inputs()), stock(inputs()), rtol=0, atol=0)
    report = fuse(fused)
    assert report.left["base_model.model.a"] == reason
    assert report.fallbacks() == {"base_model.model.a": {reason: 1}}
