"""Experts over codes where only numbers are taken: refused, with the parameter named."""

import pytest
import transformers
from torch import nn

from lora_kernels import nn as layers
from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter
from lora_kernels.serving import AdapterPool
from tests.serving.experts import base, trained

EXPERTS = "model.layers.0.mlp.experts"
NAMES = ["gate_up_proj", "down_proj"]


def over_codes(codes, layers=2):
    library = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = base("mixtral", layers=layers)
    for name in codes:
        library.replace_parameter_4bit(model.get_submodule(EXPERTS), name)
    return model


def fp8_experts():
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = transformers.Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=12, num_experts=4)
    model = nn.Module()
    model.experts = library.FP8Experts(config, block_size=(8, 8))
    return model


@pytest.mark.parametrize("codes", [NAMES, NAMES[:1], NAMES[1:]], ids=str)
def test_bitsandbytes(codes):
    other = next((name for name in NAMES if name not in codes), codes[0])
    for adapted in (None, [other]):
        with pytest.raises(TypeError, match=codes[0]):
            layers.LoRAExperts(over_codes(codes).get_submodule(EXPERTS), adapted)
    with pytest.raises(AdapterError, match=codes[0]):
        inject_adapter(over_codes(codes), LoraConfig(target_modules=[], target_parameters=[f"experts.{other}"]))
    # a call reads the other matrix, too
    for name in (EXPERTS, f"{EXPERTS}.{other}", f"{EXPERTS}.{codes[0]}"):
        with pytest.raises(TypeError, match=codes[0]):
            AdapterPool(over_codes(codes), modules=[name], capacity_bytes=1 << 20)


@pytest.mark.parametrize("codes", [NAMES, NAMES[1:]], ids=str)
def test_files(codes, tmp_path):
    model = base("mixtral", layers=1)
    trained(model, "experts").save_pretrained(tmp_path)
    model = over_codes(codes, layers=1)
    with pytest.raises(AdapterError, match=codes[0]):
        load_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match=codes[0]):
        AdapterPool(model, capacity_bytes=1 << 20).load("a", tmp_path)


def test_a_parameter_that_becomes_codes_later():
    library = pytest.importorskip("bitsandbytes.nn.parametrize")
    layer = layers.LoRAExperts(base("mixtral").get_submodule(EXPERTS))
    library.replace_parameter_4bit(layer, "down_proj")
    with pytest.raises(RuntimeError, match="parametrization"):
        layer(None, None, None)


def test_fp8():
    model = fp8_experts()
    with pytest.raises(TypeError, match="gate_up_proj"):
        layers.LoRAExperts(model.experts)
    with pytest.raises(TypeError, match="gate_up_proj"):
        AdapterPool(model, modules=["experts"], capacity_bytes=1 << 20)
