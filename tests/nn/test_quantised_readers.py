"""Quantised layers of other libraries: their weights, bit for bit as the library dequantises
them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from lora_kernels import QuantisedWeight, lora_linear
from lora_kernels.nn.quantised import holds_codes, is_quantised, quantised_weight
from tests.nn.format_modules import compressed, fp8_linear, linear, torchao_configs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_reads(module, wanted, dtype):
    """W is `wanted` and takes no more memory than its codes and float32 scales."""
    assert holds_codes(module)
    # HQQ's is no nn.Linear, and compressed-tensors has another forward on it
    assert is_quantised(module) == (isinstance(module, nn.Linear) and "forward" not in vars(module))
    w = quantised_weight(module, dtype)
    assert isinstance(w, QuantisedWeight), w
    assert w.dtype is dtype
    assert torch.equal(w.dequantise(), wanted.to(dtype))
    x, a, b = torch.randn(2, w.shape[1], dtype=dtype), torch.randn(2, w.shape[1]), torch.randn(w.shape[0], 2)
    y = x.double() @ wanted.double().T + (x.double() @ a.double().T) @ b.double().T
    torch.testing.assert_close(lora_linear(x, w, a, b).double(), y, rtol=2e-2, atol=2e-1)
    return w


def test_a_plain_layer_is_not_quantised():
    assert not holds_codes(linear())
    assert quantised_weight(linear(), torch.float32) == "Linear is no quantised layer that is known here"


@pytest.fixture
def ao():
    return pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchao(ao, dtype):
    for name, config in torchao_configs(ao).items():
        module = nn.Sequential(linear(dtype=dtype))
        ao.quantize_(module, config)
        w = assert_reads(module[0], module[0].weight.dequantize(), dtype)
        assert (w.zeros is not None) == name.endswith("zeros"), name
        assert w.codes.data_ptr() == module[0].weight.qdata.data_ptr()


@pytest.mark.parametrize("shape", [(256, 384), (96, 256)])
def test_torchao_float8_tiles(ao, shape):
    tensor = ao.Float8Tensor
    for granularity in (ao.PerTensor(), ao.granularity.PerBlock([32, 128])):
        module = linear(shape[1], shape[0])
        kept = tensor.from_hp(module.weight.data.bfloat16(), torch.float8_e4m3fn, granularity)
        module.weight = nn.Parameter(kept, requires_grad=False)
        assert_reads(module, module.weight.dequantize(), torch.bfloat16)


def test_torchao_layers_that_are_left(ao):
    module = nn.Sequential(linear())
    ao.quantize_(module, ao.Int8DynamicActivationInt8WeightConfig())
    assert holds_codes(module[0])
    assert quantised_weight(module[0], torch.float32).startswith("torchao changes the input of this layer, too")
    kernels = nn.Sequential(linear(dtype=torch.bfloat16))
    packed = ao.Int4Tensor(
        torch.zeros(96, 128, dtype=torch.int8), torch.ones(4, 96).bfloat16(), torch.zeros(4, 96).bfloat16(), [1, 64], (96, 256)
    )
    kernels[0].weight = nn.Parameter(packed, requires_grad=False)
    assert quantised_weight(kernels[0], torch.bfloat16) == "torchao's Int4Tensor lies as one of its kernels wants it"


@pytest.fixture
def fp8():
    return pytest.importorskip("transformers.integrations.finegrained_fp8")


@pytest.mark.parametrize("block", [None, (128, 128), (32, 64)])
def test_fp8_linear(fp8, block):
    layer = fp8_linear(fp8, 384, 256, block)
    for dtype in DTYPES:
        wanted = fp8.Fp8Dequantize(None)._dequantize_one(layer.weight, layer.weight_scale_inv, dtype)
        assert assert_reads(layer, wanted, dtype).codes.data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("powers", [False, True])
def test_fp8_linear_whose_tiles_are_cut_off(fp8, powers):
    layer = fp8_linear(fp8, 200, 150, (128, 128), powers)
    scales = layer.weight_scale_inv.float()
    wanted = fp8._dequantize_fp8_weight(layer.weight.data, scales, (128, 128), torch.float32)
    w = assert_reads(layer, wanted, torch.float32)
    assert w.nbytes == 200 * 150 + 4 * (1 if powers else 4)


def test_mxfp4_in_an_fp8_linear(fp8):
    layer = fp8_linear(fp8, 256, 96, (128, 128), True)
    codes, scales = torch.randint(-128, 128, (96, 128), dtype=torch.int8), torch.randint(115, 130, (96, 8)).to(torch.uint8)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    for given in (scales.view(torch.float8_e8m0fnu), scales):
        layer.weight_scale_inv = nn.Parameter(given, requires_grad=False)
        for dtype in DTYPES:
            wanted = fp8.Fp8Dequantize(None)._dequantize_one(codes, given, dtype)
            assert_reads(layer, wanted, dtype)


def test_mxfp4_of_gpt_oss():
    """One expert's blocks and scales, as the checkpoint has them."""
    from lora_kernels.ops.quantised.weight import E2M1, LOW_FIRST

    library = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = torch.randint(256, (1, 96, 8, 16)).to(torch.uint8), torch.randint(90, 140, (1, 96, 8)).to(torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        w = QuantisedWeight(
            blocks, (96, 256), scales.view(torch.float8_e8m0fnu), 32, dtype, torch.tensor(E2M1), order=LOW_FIRST
        )  # fmt: skip
        # [experts, in, out]
        wanted = library.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert torch.equal(w.dequantise(), wanted[0].T)
        assert w.nbytes == 96 * 256 // 2 + 96 * 8 + 64


def test_fp8_layers_that_are_left(fp8):
    layer = fp8.FP8Linear(256, 96, (128, 128), activation_scheme="static")
    assert quantised_weight(layer, torch.bfloat16) == "the float8 layer has a fixed scale for its inputs, too"
    grouped = fp8.FP8GroupedLinear(128, 256, 2, (128, 128))
    assert quantised_weight(grouped, torch.bfloat16) == "the float8 layer has a weight for each group of its inputs"
    wide = fp8.FP8Linear(256, 96, (128, 128))
    wide.weight = nn.Parameter(torch.randn(96, 256).bfloat16())
    assert not holds_codes(wide)
    ragged = fp8_linear(fp8, 256, 96, (128, 128))
    ragged.weight_scale_inv.data = torch.ones(3, 3)
    assert "scales must be 2 numbers" in quantised_weight(ragged, torch.bfloat16)


class HQQLinear(nn.Module):
    """The part of HQQ's layer that is read, and its `dequantize` of 4 bits, word for word."""

    def __init__(self, weight, group, dtype):
        super().__init__()
        groups = weight.float().reshape(-1, group)
        least, most = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = 15 / (most - least)
        codes = (groups * scale - least * scale).round().clamp(0, 15).to(torch.uint8)
        half = len(codes) // 2
        self.W_q = nn.Parameter(codes[:half] << 4 | codes[half:], requires_grad=False)
        self.meta = {
            "nbits": 4, "packing": "4bit_u8", "axis": 1, "shape": weight.shape, "group_size": group,
            "scale": (1 / scale).to(dtype), "zero": (-least * scale).to(dtype), "compute_dtype": dtype,
        }  # fmt: skip

    def dequantize(self):
        w = torch.cat(((self.W_q & 0b11110000) >> 4, self.W_q & 0b00001111)).to(self.meta["compute_dtype"])
        return ((w - self.meta["zero"]) * self.meta["scale"]).reshape(self.meta["shape"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hqq(monkeypatch, dtype):
    library = ModuleType("hqq.core.quantize")
    library.HQQLinear = HQQLinear
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", library)
    for shape, group in (((96, 256), 64), ((7, 64), 32), ((6, 100), 20)):
        layer = HQQLinear(torch.randn(shape), group, dtype)
        w = assert_reads(layer, layer.dequantize(), dtype)
        assert w.codes.data_ptr() == layer.W_q.data_ptr()
    for change, reason in (
        ({"axis": 0}, "HQQ's groups go down the columns (axis 0)"),
        ({"packing": "3bit_32", "nbits": 3}, "HQQ's weight of 3 bits is packed as 3bit_32, not as 4bit_u8"),
        ({"zero": layer.meta["zero"].double()}, "HQQ's scales and zeros are "),
    ):
        monkeypatch.setattr(layer, "meta", layer.meta | change)
        assert quantised_weight(layer, dtype).startswith(reason)
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "hqq.core.quantize", library)
    del layer.meta["zero"]
    assert quantised_weight(layer, dtype) == "HQQ's scales or zeros are quantised themselves"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hqq_itself(dtype):
    library = pytest.importorskip("hqq.core.quantize")
    for group in (32, 64, None):
        config = library.BaseQuantizeConfig(nbits=4, group_size=group, axis=1)
        layer = library.HQQLinear(linear(), config, compute_dtype=dtype, device="cpu")
        assert_reads(layer, layer.dequantize(), dtype)


@pytest.mark.parametrize("weights", [
    {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
    {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
    {"num_bits": 4, "strategy": "channel", "symmetric": False},
    {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
    {"num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"},
    {"num_bits": 8, "strategy": "block", "block_structure": [32, 128], "symmetric": True, "type": "float"},
    {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True, "type": "float"},
    {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": True, "type": "float", "scale_dtype": torch.uint8},
], ids=lambda w: f"{w['num_bits']}-{w['strategy']}-{w['symmetric']}-{w.get('type', 'int')}")  # fmt: skip
def test_compressed_tensors(weights):
    module, wanted = compressed(weights)
    w = assert_reads(module, wanted, torch.bfloat16)
    held = getattr(module, "weight_packed", None)
    assert w.codes.data_ptr() == (module.weight if held is None else held).data_ptr()
    assert (w.zeros is None) == weights["symmetric"]


def test_compressed_layers_that_are_left():
    """What stands beside the weight, by a stand-in: nothing is read then."""
    module = linear()
    scheme = SimpleNamespace(input_activations=None, output_activations=None, weights=SimpleNamespace())
    module.quantization_scheme, module.quantization_status = scheme, SimpleNamespace(name="FROZEN")
    assert holds_codes(module)
    assert "it rounds its weight at each call" in quantised_weight(module, torch.float32)
    module.quantization_status = SimpleNamespace(name="COMPRESSED")
    scheme.input_activations = "dynamic"
    assert "changes the input or the output" in quantised_weight(module, torch.float32)
    scheme.input_activations = None
    module.weight_g_idx = nn.Parameter(torch.arange(256), requires_grad=False)
    assert "in the order of their activations" in quantised_weight(module, torch.float32)
