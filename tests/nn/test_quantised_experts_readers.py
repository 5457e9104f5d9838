"""Quantised weights of experts: bit for bit the numbers that their library makes of them."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_kernels.nn.forms import ROUTED, Form, form_of
from lora_kernels.nn.quantised_experts import mxfp4_weight, quantised_experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_bytes(*shape):
    return torch.randint(256, shape).to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpt_oss(dtype):
    """Its files' blocks and scales, as transformers makes a parameter of them."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random_bytes(3, 10, 4, 16), random_bytes(3, 10, 4) % 20 + 115
    w = mxfp4_weight(blocks, scales, dtype)
    assert w.shape == (3, 10, 128) and w.dtype is dtype
    assert w.codes.data_ptr() == blocks.data_ptr() and w.scales.data_ptr() == scales.data_ptr()
    assert w.dequantise().mT.equal(mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype))


@pytest.mark.parametrize(
    "blocks, scales, error, words",
    [
        (torch.zeros(2, 3, 4, 16), random_bytes(2, 3, 4), TypeError, "must be uint8, found torch.float32 and torch.uint8"),
        (random_bytes(2, 3, 64), random_bytes(2, 3, 4), ValueError, "found [2, 3, 64] and [2, 3, 4]"),
        (random_bytes(2, 3, 4, 16), random_bytes(2, 4, 3), ValueError, "found [2, 3, 4, 16] and [2, 4, 3]"),
        (random_bytes(2, 3, 4, 8), random_bytes(2, 3, 4), ValueError, "found [2, 3, 4, 8] and [2, 3, 4]"),
    ],
    ids=["dtype", "two dimensions", "order", "block"],
)
def test_what_is_no_mxfp4(blocks, scales, error, words):
    with pytest.raises(error, match=re.escape(words)):
        mxfp4_weight(blocks, scales)


def parametrised(shape, dtype=torch.bfloat16, **options):
    bnb = pytest.importorskip("bitsandbytes.nn.parametrize")
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(shape, dtype=dtype))
    bnb.replace_parameter_4bit(module, "w", **options)
    return module


# the library's CPU code is wrong where a block is longer than a row of a multiple of 32
@pytest.mark.parametrize("shape", [(4, 16, 128), (3, 7, 30), (2, 33, 65)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitsandbytes(shape, dtype):
    for options in ({"quant_type": "fp4"}, {"compress_statistics": True}, {"blocksize": 128}):
        module = parametrised(shape, dtype, **options)
        w = quantised_experts(module, "w")
        assert not isinstance(w, str) and w.shape == shape and w.dtype is dtype
        assert w.codes.data_ptr() == module.parametrizations.w.original.data_ptr()
        assert w.dequantise().equal(module.w), options
        assert quantised_experts(module, "w", torch.float32).dtype is torch.float32


def test_bitsandbytes_that_cannot_be_read():
    module = parametrised((4, 16, 64))
    module.parametrizations.w[0].quant_state = None
    assert quantised_experts(module, "w") == "the codes of w have no quant_state"
    module = parametrised((4, 16, 64))
    nn.utils.parametrize.register_parametrization(module, "w", nn.Identity())
    assert quantised_experts(module, "w") == "another parametrization is on the module"
    assert form_of(module) == "another parametrization is on the module"
    assert quantised_experts(nn.Linear(2, 2), "weight") is None


def fp8_experts(expert_dtype="fp8", block=(128, 128), inner=192, **options):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(num_experts=3, hidden_size=320, moe_intermediate_size=inner, hidden_act="silu")
    module = fp8.FP8Experts(config, block_size=block, expert_dtype=expert_dtype, **options)
    for name in ("gate_up_proj", "down_proj"):
        weight, scales = getattr(module, name), getattr(module, f"{name}_scale_inv")
        random = random_bytes(*weight.shape)
        if weight.is_floating_point():
            random[random & 127 == 127] = 0
        weight.data = random.view(weight.dtype)
        powers = scales.dtype is torch.float8_e8m0fnu
        scales.data = (random_bytes(*scales.shape) % 9 + 110).view(scales.dtype) if powers else torch.rand(scales.shape) + 0.5
    return fp8, module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": None, "inner": 160},
        {"expert_dtype": "fp4"},
        {"expert_dtype": "fp4", "scale_fmt": "ue8m0"},
        {"block": (64, 32)},
    ],
    ids=str,
)
def test_fp8_experts(options, dtype):
    fp8, module = fp8_experts(**options)
    for name in ("gate_up_proj", "down_proj"):
        w = quantised_experts(module, name, dtype)
        # room for two scales, of which one is used
        if options.get("block", ()) is None and name == "gate_up_proj":
            assert w == "the scales of gate_up_proj are [3, 2, 1], not those of tiles of [320, 320]"
            continue
        assert not isinstance(w, str), w
        codes, scales = getattr(module, name), getattr(module, f"{name}_scale_inv")
        if w.block_rows and (codes.shape[1] % w.block_rows or codes.shape[2] % w.block):  # which one formula cuts off
            wanted = fp8._dequantize_fp8_weight(codes, scales, list(module.block_size), torch.float32)
        else:
            wanted = fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
        assert w.dequantise(torch.float32).equal(wanted) and w.dequantise().equal(wanted.to(dtype))
    assert form_of(module) == Form(("gate_up_proj", "down_proj"), False, ROUTED)


def test_fp8_experts_that_cannot_be_read():
    _, module = fp8_experts(activation_scheme="static")
    assert quantised_experts(module, "down_proj") == "the float8 experts have fixed scales for their inputs, too"
    assert quantised_experts(module, "act_fn") is None
