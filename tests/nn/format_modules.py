"""Layers that other libraries than bitsandbytes have quantised, for tests; asking one of a library
that is not there skips."""

import pytest
import torch
from torch import nn

PACKED = {"num_bits": 4, "strategy": "group", "group_size": 32}
KINDS = ["int8 rows", "int8 groups", "float8 rows", "int4 zeros", "fp8", "fp8 powers", "packed", "packed zeros", "naive"]
"""Those that become a layer with an adapter."""


def linear(n_in=256, n_out=96, dtype=torch.float32, bias=False):
    return nn.Linear(n_in, n_out, bias=bias, dtype=dtype)


def torchao_configs(q):
    asymmetric = {"weight_dtype": torch.int4, "mapping_type": q.MappingType.ASYMMETRIC}
    return {
        "int8 rows": q.Int8WeightOnlyConfig(),
        "int8 groups": q.Int8WeightOnlyConfig(granularity=q.PerGroup(32)),
        "int8 matrix": q.Int8WeightOnlyConfig(granularity=q.PerTensor()),
        "float8 rows": q.Float8WeightOnlyConfig(),
        "e5m2 rows": q.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
        "int4 groups": q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
        "int4 zeros": q.IntxWeightOnlyConfig(granularity=q.PerGroup(32), **asymmetric),
        "int8 zeros": q.IntxWeightOnlyConfig(weight_dtype=torch.int8, mapping_type=q.MappingType.ASYMMETRIC),
    }


def fp8_linear(library, n_in, n_out, block, powers=False, bias=False):
    layer = library.FP8Linear(n_in, n_out, block, scale_fmt="ue8m0" if powers else "float", has_bias=bias)
    layer.weight.data = (torch.randn(n_out, n_in) * 100).to(torch.float8_e4m3fn)
    scales = layer.weight_scale_inv
    scales.data = (torch.rand(scales.shape) / 1000).to(scales.dtype)
    if bias:
        layer.bias.data = torch.randn(n_out)
    return layer


def compressed(weights, n_in=256, n_out=96, dtype=torch.bfloat16, bias=False):
    """A layer that compressed-tensors has quantised and compressed, and the weight it was rounded
    to."""
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors.base")
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    scheme = library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(**weights))
    module = linear(n_in, n_out, dtype, bias)
    library.initialize_module_for_quantization(module, scheme)
    rows, columns = {"group": (1, weights.get("group_size")), "channel": (1, n_in), "tensor": (n_out, n_in)}.get(
        weights["strategy"], weights.get("block_structure")
    )
    tiles = module.weight.data.unfold(0, rows, rows).unfold(1, columns, columns)
    scales, zeros = calculate_qparams(tiles.amin((2, 3)), tiles.amax((2, 3)), scheme.weights)
    module.weight_scale.data = scales.reshape(module.weight_scale.shape).to(dtype)
    if getattr(module, "weight_zero_point", None) is not None:
        module.weight_zero_point.data = zeros.reshape(module.weight_zero_point.shape).to(module.weight_zero_point.dtype)
    compressors.compress_module(module)
    made = compressors.BaseCompressor.get_value_from_registry(compressors.infer_module_format(type(module), scheme).value)
    return module, made.decompress(compressors.get_direct_state_dict(module), scheme)["weight"]


def module(kind, n_in=64, n_out=48, bias=True, seed=0):
    """A quantised layer of float32, and W as its library dequantises it."""
    torch.manual_seed(seed)
    if kind.startswith("fp8"):
        library = pytest.importorskip("transformers.integrations.finegrained_fp8")
        tiles = (32, 32)
        made = fp8_linear(library, n_in, n_out, tiles, kind == "fp8 powers", bias)
        return made, library._dequantize_fp8_weight(made.weight.data, made.weight_scale_inv.float(), tiles, torch.float32)
    if kind.startswith(("packed", "naive")):
        naive = {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
        return compressed(
            naive if kind == "naive" else PACKED | {"symmetric": kind == "packed"}, n_in, n_out, torch.float32, bias
        )
    q = pytest.importorskip("torchao.quantization")
    made = nn.Sequential(linear(n_in, n_out, bias=bias))
    q.quantize_(made, torchao_configs(q)[kind])
    return made[0], made[0].weight.dequantize()
