"""PEFT models over the quantised layers of torchao and HQQ, and the same models over what their
weights are in float64."""

import peft
import pytest
import torch
from torch import nn

from tests.integrations.fuse_helpers import make_small, quietly, randomise, take_over

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TORCHAO = ("int8 rows", "int8 groups", "int8 matrix", "float8 rows", "float8 groups", "int4 groups", "int4 zeros")
KINDS = (*TORCHAO, "hqq")
SIZES = {"a": (64, 48), "b": (48, 32)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(*SIZES["a"]), nn.Linear(*SIZES["b"], bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def torchao_config(kind):
    q = pytest.importorskip("torchao.quantization")
    asymmetric = {"weight_dtype": torch.int4, "mapping_type": q.MappingType.ASYMMETRIC}
    return {
        "int8 rows": lambda: q.Int8WeightOnlyConfig(),
        "int8 groups": lambda: q.Int8WeightOnlyConfig(granularity=q.PerGroup(16)),
        "int8 matrix": lambda: q.Int8WeightOnlyConfig(granularity=q.PerTensor()),
        "float8 rows": lambda: q.Float8WeightOnlyConfig(),
        "float8 groups": lambda: q.Float8WeightOnlyConfig(granularity=q.PerGroup(16)),
        "int4 groups": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(16)),
        "int4 zeros": lambda: q.IntxWeightOnlyConfig(granularity=q.PerGroup(16), **asymmetric),
        "int8 inputs": lambda: q.Int8DynamicActivationInt8WeightConfig(),
    }[kind]()


def quantise(net, kind, dtype):
    """The net with its linear layers quantised, in place."""
    if kind == "hqq":
        library = pytest.importorskip("hqq.core.quantize")
        for name in SIZES:
            config = library.BaseQuantizeConfig(nbits=4, group_size=16, axis=1)
            with torch.no_grad():
                setattr(net, name, library.HQQLinear(getattr(net, name), config, compute_dtype=dtype, device="cpu"))
    else:
        pytest.importorskip("torchao.quantization").quantize_(net.to(dtype), torchao_config(kind))
    return net


def model(kind, dtype=F32, **lora):
    """A PEFT model over quantised layers, with a random adapter whose outputs are of the size of
    the base's."""
    torch.manual_seed(0)
    made = quietly(peft.get_peft_model, quantise(Net(), kind, dtype), _config(lora))
    if kind in TORCHAO:  # as a model that transformers has quantised
        for name in SIZES:
            layer(made, name).get_apply_tensor_subclass = lambda: torchao_config(kind)
    randomise(made)
    make_small(made)
    return made


def _config(lora):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["a", "b"]} | lora)


def layer(made, name="a"):
    return made.get_submodule(f"base_model.model.{name}")


def numbers(base):
    """W as the library dequantises it."""
    return base.dequantize() if hasattr(base, "W_q") else base.weight.dequantize()


def exact(quantised, **lora):
    """The model over plain layers, in float64, of the numbers that the library makes of its
    weights."""
    made = peft.get_peft_model(Net(), _config(lora)).double()
    take_over(made, quantised, numbers)
    return made


def inputs(dtype=F32, rows=9):
    return torch.randn(rows, SIZES["a"][0], generator=torch.Generator().manual_seed(2)).to(dtype)
