"""Modules of experts whose matrices are codes, and the same over the numbers that the codes stand
for."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_kernels.nn import LoRAExperts
from lora_kernels.nn.forms import form_of
from lora_kernels.nn.quantised_experts import experts_weight, quantised_experts
from lora_kernels.ops.quantised import QuantisedWeight
from tests.integrations.experts_helpers import EXPERTS, HIDDEN, INNER
from tests.nn.test_lora_experts import experts

BNB = {
    "nf4": ("MixtralExperts", {"quant_type": "nf4"}),
    "nested": ("GptOssExperts", {"quant_type": "nf4", "compress_statistics": True}),
    "fp4": ("NemotronHExperts", {"quant_type": "fp4", "blocksize": 32}),
    "sorted": ("Llama4TextExperts", {"quant_type": "nf4"}),
}
"""By bitsandbytes: the class of the experts, and how their matrices are quantised."""
CODES = [*BNB, "fp8"]


def class_of(codes):
    """The name of the class that computes the same with numbers."""
    return BNB[codes][0] if codes in BNB else "MixtralExperts"


def module_of(codes, dtype=torch.float32, seed=0, only=None):
    """A module of codes, made of numbers in a dtype; with `only` bitsandbytes' of some matrices."""
    name, options = BNB.get(codes, ("MixtralExperts", {}))
    made = experts(name, dtype if dtype is not torch.float64 else torch.float32)  # of which no library makes codes
    with torch.no_grad():
        for p in made.parameters():
            p += seed * 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p)
    if codes == "fp8":
        return fp8_of({p: getattr(made, p) for p in ("gate_up_proj", "down_proj")})
    library = pytest.importorskip("bitsandbytes.nn.parametrize")
    for parameter in only or form_of(made).weights:
        library.replace_parameter_4bit(made, parameter, **options)
    return made


def fp8_of(weights, block=(8, 8), config=None):
    """transformers' FP8Experts of these numbers, in tiles."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if config is None:
        config = SimpleNamespace(
            num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=INNER, hidden_act="silu",
            dtype=weights["down_proj"].dtype,
        )  # fmt: skip
    module = fp8.FP8Experts(config, block_size=block)
    rows, columns = block
    for name, w in weights.items():
        _, n_out, n_in = w.shape
        room = nn.functional.pad(w.detach().float(), (0, -n_in % columns, 0, -n_out % rows))
        tiles = room.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
        scales = tiles.abs().amax((2, 4)) / 448
        codes = (tiles / scales[:, :, None, :, None]).view(room.shape)[:, :n_out, :n_in]
        getattr(module, name).data, getattr(module, f"{name}_scale_inv").data = codes.to(torch.float8_e4m3fn), scales
    return module


def mxfp4_of(config):
    """transformers' FP8Experts of random codes of four bits, with powers of two for 32 numbers."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    module, draw = fp8.FP8Experts(config, expert_dtype="fp4", scale_fmt="ue8m0"), torch.Generator().manual_seed(0)
    for name in ("gate_up_proj", "down_proj"):
        codes, scales = getattr(module, name), getattr(module, f"{name}_scale_inv")
        codes.data = torch.randint(256, codes.shape, generator=draw).to(torch.uint8).view(torch.int8)
        scales.data = torch.randint(120, 124, scales.shape, generator=draw).to(torch.uint8).view(scales.dtype)
    return module


def dense(module, name, dtype=torch.float32):
    """The matrix of that name, or its codes', as numbers in a dtype."""
    w = quantised_experts(module, name, dtype)
    return experts_weight(module, name).detach().to(dtype) if w is None else w.dequantise()


def dense_of(codes, module, dtype=torch.float32):
    """A module of numbers that computes what `module` does."""
    made = experts(class_of(codes), dtype)
    for name in form_of(made).weights:
        getattr(made, name).data = dense(module, name, dtype)
    for name, p in module._parameters.items():
        if name.endswith("_bias") and p is not None:
            getattr(made, name).data = p.detach().to(dtype)
    return made


def trained(layer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("lora_"):
                p += 0.3 * torch.randn(p.shape, generator=generator).to(p)
    return layer


def with_factors_of(layer, other):
    """`layer` with the adapter of another."""
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name.startswith("lora_"):
                layer.get_parameter(name).copy_(p)
    return layer


def no_numbers(monkeypatch):
    """From now on nobody may make the numbers of all experts."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for owner, name in ((functional, "dequantize_4bit"), (QuantisedWeight, "dequantise")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("all numbers are made"))


def layer_over(module, seed=1, **options):
    return trained(LoRAExperts.from_experts(module, **{"r": 3, "lora_alpha": 5} | options), seed)


def both(codes, dtype=torch.float32, module=None, **options):
    """A layer over codes, that over their numbers, and the module of these."""
    layer = layer_over(module_of(codes, dtype) if module is None else module, **options)
    numbers = dense_of(codes, layer._quantised.module, dtype)
    return (
        layer,
        with_factors_of(LoRAExperts.from_experts(copy.deepcopy(numbers), r=3, lora_alpha=5, **options), layer),
        numbers,
    )


def close(one, other, bound=1e-5):
    error = (one.double() - other.double()).norm() / other.double().norm()
    assert error <= bound, error


def same_bits(one, other):
    """Few of torch's functions take 8-bit floats."""
    return one.dtype is other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
