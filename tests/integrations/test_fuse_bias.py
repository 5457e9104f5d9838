"""lora_bias on the kernels: the bias of lora_B counts scale times, beside the base's, and both
learn."""

import copy

import peft
import pytest
import torch
from fuse_helpers import LLAMA_LAYERS, errs_as_stock, fused_copy, gradients, inputs, llama, model, same, step, tokens
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from lora_kernels import fuse

DTYPES = {"float32": (torch.float32, True), "bfloat16": (torch.bfloat16, True), "all bfloat16": (torch.bfloat16, False)}
dtypes = pytest.mark.parametrize("dtype, adapter_dtype", DTYPES.values(), ids=DTYPES)


def biased(dtype=torch.float32, **values):
    """A model whose lora_B have biases of the size of its outputs."""
    made = model(dtype, lora_bias=True, **values)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return made


@dtypes
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("rows", [3, 100])
def test_outputs_and_all_gradients_are_pefts(dtype, adapter_dtype, bias, rows):
    stock = biased(dtype, adapter_dtype=adapter_dtype, bias=bias, lora_alpha=5)
    fused = fused_copy(stock)
    x = inputs(dtype, rows)
    exact = gradients(copy.deepcopy(stock).double(), x.double())
    assert sum(name.endswith("bias") for name in exact) == (3 if bias == "all" else 2)
    errs_as_stock(gradients(fused, x), gradients(stock, x), exact)
    report = fuse(fused, strict=True)
    assert len(report.fused) == 2 and report.fallbacks() == {}


def test_the_output_alone_is_rounded():
    """A 16-bit sum of both biases would be rounded before the output is."""
    fused = fused_copy(biased(torch.bfloat16, adapter_dtype=False))
    layer = fused.base_model.model.a
    x = inputs(torch.bfloat16, 400)
    base, own = layer.base_layer, layer.lora_B["default"]
    with torch.no_grad():
        base.bias.fill_(1.0)
        own.bias.fill_(2.0**-9 / layer.scaling["default"])
        low = own(layer.lora_A["default"](x).double().to(x.dtype)) * 0 + own.bias
        exact = x.double() @ base.weight.double().T + base.bias.double()
        exact += layer.scaling["default"] * (
            x.double() @ layer.lora_A["default"].weight.double().T @ own.weight.double().T + low.double()
        )
        rounded = exact.bfloat16()
        found = layer(x)
    assert (found != rounded).float().mean() < 0.02


def test_autocast_checkpoints_and_a_compiled_graph():
    stock = biased()
    fused = fused_copy(stock)
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype is stock(x).dtype is torch.bfloat16
        torch.testing.assert_close(fused(x), stock(x), rtol=3e-2, atol=3e-2)
    expected, again = gradients(stock, x), {}
    fused.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(fused, leaf, use_reentrant=False)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    again = {"y": y.detach(), "x": leaf.grad} | {n: p.grad for n, p in fused.named_parameters() if p.grad is not None}
    for name, grad in expected.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-4, msg=name)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(fused, fullgraph=True, backend="aot_eager"), x)
    for name, grad in expected.items():
        torch.testing.assert_close(compiled.get(name, compiled.get(f"_orig_mod.{name}")), grad, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    assert fuse(fused).fallbacks() == {}


def test_scales_that_change_and_one_that_is_a_tensor():
    stock = biased()
    fused = fused_copy(stock)
    for one in (stock, fused):
        one.base_model.model.a.set_scale("default", 0.5)
    same(stock, fused, inputs())
    for one in (stock, fused):
        prepare_model_for_compiled_hotswap(one, target_rank=4)
    assert isinstance(fused.base_model.model.a.scaling["default"], torch.Tensor)
    same(stock, fused, inputs())
    assert fuse(fused).fallbacks() == {}


def test_a_model_without_biases_gets_them_from_its_adapter():
    def net():
        return llama(attention_bias=False, mlp_bias=False)

    stock = biased(net=net, target_modules=LLAMA_LAYERS, task_type="CAUSAL_LM", init_lora_weights=False)
    fused = fused_copy(stock)
    found, plain = step(fused, tokens()), step(stock, tokens())
    assert any(name.endswith("lora_B.default.bias") for name in found)
    errs_as_stock(found, plain, step(copy.deepcopy(stock).double(), tokens()))
    assert len(fuse(fused, strict=True).fused) == 2 * len(LLAMA_LAYERS)


def test_one_on_the_meta_device_waits_to_be_loaded(tmp_path):
    stock = biased()
    stock.save_pretrained(str(tmp_path))
    fused = fused_copy(stock)
    fused.add_adapter("empty", peft.LoraConfig(lora_bias=True, target_modules=["a", "b"]), low_cpu_mem_usage=True)
    fused.set_adapter("empty")
    assert all("meta device; once they are loaded" in reason for reason in fuse(fused).left.values())
    fused.load_adapter(str(tmp_path), "loaded", low_cpu_mem_usage=True)
    fused.set_adapter("loaded")
    same(stock, fused, inputs())
    assert fuse(fused, strict=True).fallbacks() == {}


def test_a_bias_of_lora_a_is_pefts():
    stock = biased()
    layer = stock.base_model.model.a
    layer.lora_A["default"].bias = torch.nn.Parameter(torch.randn(4))
    fused = copy.deepcopy(stock)
    assert fuse(fused).left == {"base_model.model.a": "lora_A has a bias"}
    same(stock, fused, inputs())


def test_dora_refuses_it_as_peft_does():
    with pytest.raises(ValueError, match="not supported for DoRA"):
        peft.LoraConfig(lora_bias=True, use_dora=True)
    stock = model(use_dora=True)
    stock.base_model.model.a.lora_B["default"].bias = torch.nn.Parameter(torch.randn(40))
    fused = copy.deepcopy(stock)
    assert "lora_bias beside DoRA" in fuse(fused).left["base_model.model.a"]
    same(stock, fused, inputs())


@pytest.mark.parametrize("names", [["default"], ["default", "other"]], ids=["one", "two"])
def test_adapters_on_meta_are_left_and_fuse_does_not_raise(names):
    config = peft.LoraConfig(r=4, target_modules=["0"], lora_bias=True)
    one = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, low_cpu_mem_usage=True)
    for name in names[1:]:
        one.add_adapter(name, config, low_cpu_mem_usage=True)
    one.base_model.set_adapter(names)
    assert "meta device" in fuse(one).left["base_model.model.0"]
