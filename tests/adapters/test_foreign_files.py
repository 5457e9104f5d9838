"""Adapters in other forms than PEFT's: read where PEFT reads them, else named, with what to do."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter, save_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def saved(folder, **values):
    model = net()
    inject_adapter(model, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False, **values))
    save_adapter(model, folder)
    return model


def rename(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


READ = {
    "an adapter's name": lambda k: k.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    "a compiled model": lambda k: k.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled layers": lambda k: k.replace("model.0.", "model.0._orig_mod."),
    "a compiled PEFT model": lambda k: f"_orig_mod.{k}",
    "a magnitude's weight": lambda k: k + ".weight" if k.endswith("vector") else k,
    "a named magnitude": lambda k: k + ".default.weight" if k.endswith("vector") else k,
}


@pytest.mark.parametrize("form", READ)
def test_what_peft_means_is_read(form, tmp_path):
    model = saved(tmp_path, use_dora=True)
    rename(tmp_path, READ[form])
    other = net()
    load_adapter(other, tmp_path)
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        if "compiled" not in form and "named" not in form:
            assert torch.allclose(peft.PeftModel.from_pretrained(net(), str(tmp_path))(x), model(x), atol=1e-6)


def test_two_names_of_one_tensor_are_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = f"{PREFIX}0.lora_A.weight"
    save_file({**tensors, key.replace("lora_A.", "lora_A.default."): tensors[key] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"lora_A\.(default\.)?weight' and .* are the same tensor of an adapter"):
        load_adapter(net(), tmp_path)


def kohya(key):
    name = key.removeprefix(PREFIX).replace(".lora_A", "+lora_down").replace(".lora_B", "+lora_up")
    return "lora_unet_" + name.replace(".", "_").replace("+", ".").replace("_weight", ".weight")


NAMED = {
    "kohya": (kohya, "are kohya's .* diffusers"),
    "diffusers": (lambda k: k.replace(PREFIX, "unet."), "are diffusers'"),
    "old diffusers": (lambda k: k.replace("0.lora_A", "attn.processor.to_q_lora.down"), "are diffusers'"),
    "ddp": (lambda k: f"module.{k}", "is the prefix of DistributedDataParallel"),
    "no prefix": (lambda k: k.removeprefix(PREFIX), f"the prefix '{PREFIX}' is missing"),
    "another adapter's name": (lambda k: k.replace("lora_A.", "lora_A.sft."), "name the adapter 'sft'"),
    "a state dict": (lambda k: k.replace("0.lora_A.weight", "0.base_layer.weight"), "whole model's state dict"),
    "dora_scale": (lambda k: k.replace("0.lora_A.weight", "0.dora_scale"), "dora_scale is kohya's magnitude"),
    "alpha": (lambda k: k.replace("0.lora_A.weight", "0.alpha"), "alpha is kohya's"),
}


@pytest.mark.parametrize("form", NAMED)
def test_a_foreign_form_is_named_with_what_to_do(form, tmp_path):
    saved(tmp_path)
    change, says = NAMED[form]
    rename(tmp_path, change)
    with pytest.raises(AdapterError, match=says) as caught:
        load_adapter(net(), tmp_path)
    assert str(tmp_path / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "my_lora.safetensors"])
def test_a_foreign_file_without_a_configuration_is_named(name, tmp_path):
    save_file({"lora_unet_0.lora_down.weight": torch.ones(2, 6)}, tmp_path / name)
    with pytest.raises(AdapterError, match=f"{CONFIG}: cannot be read: .*{name} alone is diffusers' or kohya's form"):
        load_adapter(net(), tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt"])
def test_a_pickle_in_the_place_of_the_weights_is_named(name, tmp_path):
    saved(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / name)
    with pytest.raises(AdapterError, match=f"{name}: is a pickle, which can run code"):
        load_adapter(net(), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 2
