"""What fuse keeps and what it waits for: DoRA's gain after an edit nobody sees, adapters whose
weights come later."""

import copy

import peft
import pytest
import torch
from fuse_helpers import inputs, model, pair, same
from torch import nn

from lora_kernels import fuse, refresh
from lora_kernels.integrations.peft import FusedLinear
from lora_kernels.nn import DoRALinear

META = "the adapter's weights are on the meta device; once they are loaded it runs on the kernels"


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 256), nn.Linear(256, 16)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("how", ["data", "numpy"])
def test_a_row_that_was_edited_out_of_sight(how):
    stock, fused = pair(use_dora=True, net=Wide)
    with torch.no_grad():
        same(stock, fused, inputs())
        for one in (stock, fused):
            weight = one.base_model.model.a.base_layer.weight
            rows = weight.data if how == "data" else weight.detach().numpy()
            rows[1] *= 3
        assert not torch.allclose(stock(inputs()), fused(inputs()), atol=1e-4), "the sample saw it; edit another row"
        refresh(fused)
        same(stock, fused, inputs())


def test_one_element_that_no_sample_sees():
    layer = DoRALinear(512, 256, r=2, init_lora_weights=False)
    fresh = copy.deepcopy(layer)
    x = torch.randn(3, 512)
    with torch.no_grad():
        layer(x)
        for one in (layer, fresh):
            one.weight.data[1, 1:] += 2
        stale = layer(x)
        assert not torch.allclose(stale, fresh(x), atol=1e-3), "the sample saw it; edit another element"
        refresh(nn.Sequential(layer))
        assert torch.equal(layer(x), fresh(x))


def test_refresh_of_anything():
    refresh(nn.Linear(2, 2))
    stock, fused = pair()
    refresh(fused)
    same(stock, fused, inputs())
    with pytest.raises(TypeError, match="refresh: model must be a torch.nn.Module, found int"):
        refresh(3)


def on_meta(use_dora):
    base = model(use_dora=use_dora)
    state = peft.get_peft_model_state_dict(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["a", "b"], use_dora=use_dora)
    one = peft.get_peft_model(copy.deepcopy(base).unload(), config, low_cpu_mem_usage=True)
    return one, state, base


def test_adapters_whose_weights_come_later():
    one, state, stock = on_meta(False)
    report = fuse(one)
    assert not report.fused and report.left == dict.fromkeys(["base_model.model.a", "base_model.model.b"], META)
    assert type(one.base_model.model.a) is FusedLinear
    with pytest.raises(ValueError, match="meta device"):
        fuse(one, strict=True)
    peft.set_peft_model_state_dict(one, state, low_cpu_mem_usage=True)
    report = fuse(one)
    assert len(report.fused) == 2 and not report.left
    same(stock, one, inputs())
    assert report.fallbacks() == {}


def test_a_second_adapter_on_meta():
    one, other = model(), model(use_dora=True)
    one.add_adapter("later", other.peft_config["default"], low_cpu_mem_usage=True)
    assert not fuse(one).left
    one.set_adapter("later")
    assert set(fuse(one).left.values()) == {META}


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_model_from_pretrained(tmp_path, use_dora):
    stock = model(use_dora=use_dora).eval()
    stock.save_pretrained(str(tmp_path))
    base = copy.deepcopy(stock).unload()
    one = peft.PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=True)
    assert len(fuse(one).fused) == 2
    same(stock, one, inputs())
