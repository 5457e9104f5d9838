"""Experts over codes that cannot be read: refused, with the parameter named."""

import pytest
from torch import nn

from lora_kernels import nn as layers
from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter
from lora_kernels.serving import AdapterPool
from tests.nn.coded_experts import module_of
from tests.serving.experts import base, trained

EXPERTS = "model.layers.0.mlp.experts"
NAMES = ["gate_up_proj", "down_proj"]


def over_codes(codes, layers=2):
    """A model whose experts bitsandbytes has quantised, and packed for its own inference."""
    library = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = base("mixtral", layers=layers)
    experts = model.get_submodule(EXPERTS)
    for name in codes:
        library.replace_parameter_4bit(experts, name)
        experts.parametrizations[name][0].quant_state.packing_format_for_cpu = True
    return model


@pytest.mark.parametrize("codes", [NAMES, NAMES[:1], NAMES[1:]], ids=str)
def test_bitsandbytes(codes):
    other = next((name for name in NAMES if name not in codes), codes[0])
    for adapted in (None, [other]):
        with pytest.raises(TypeError, match=f"bitsandbytes has packed {codes[0]}"):
            layers.LoRAExperts(over_codes(codes).get_submodule(EXPERTS), adapted)
    with pytest.raises(AdapterError, match=f"bitsandbytes has packed {codes[0]}"):
        inject_adapter(over_codes(codes), LoraConfig(target_modules=[], target_parameters=[f"experts.{other}"]))
    # a call reads the other matrix, too
    for name in (EXPERTS, f"{EXPERTS}.{other}", f"{EXPERTS}.{codes[0]}"):
        with pytest.raises(TypeError, match=f"bitsandbytes has packed {codes[0]}"):
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
    model = nn.Module()
    model.experts = module_of("fp8")
    model.experts.activation_scheme = "static"
    for call in (layers.LoRAExperts, lambda _: AdapterPool(model, modules=["experts"], capacity_bytes=1 << 20)):
        with pytest.raises(TypeError, match="gate_up_proj of FP8Experts.*: the float8 experts have fixed scales"):
            call(model.experts)
