"""The quantised weights of other libraries' layers, as they lie, codes not copied.

    bitsandbytes        Linear4bit (QLoRA, arXiv:2305.14314), Linear8bitLt (arXiv:2208.07339)
    torchao             Int8Tensor, Float8Tensor, IntxUnpackedToInt8Tensor of an nn.Linear
    transformers        FP8Linear: float8 with a scale for a tile or the matrix, MXFP4
    HQQ                 HQQLinear of 4 bits in groups along the input
    compressed-tensors  4-bit integers, MXFP4, int8 and float8 of a compressed nn.Linear

Versions tried: bitsandbytes 0.50, torchao 0.18, transformers 5.23, HQQ 0.2.8, compressed-tensors
0.20. A layer that changes its inputs, too, computes something else than x Wᵀ and is not read; the
one exception is FP8Linear, whose own product rounds x to float8 for its kernels' sake.

No library is imported here: a module can be one of its classes only if somebody did.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.quantised.weight import E2M1, HALVES, LOW_FIRST, POWERS

INT8_STEP = 1.0 / 127.0
"""Of a row's largest number, which bitsandbytes keeps as SCB."""

Reader = Callable[[Any, torch.dtype], QuantisedWeight | str]


def is_quantised(module: nn.Module) -> bool:
    """Whether the module is a linear layer of bitsandbytes, whatever its state, or one of the other
    libraries with a forward of its class and a parameter `weight` that can be read: where that
    cannot, the library may still multiply with it.
    """
    read = _reader(module)
    if read in (None, _of_4bit, _of_8bit):
        return read is not None
    own = isinstance(module, nn.Linear) and "forward" not in vars(module) and module._parameters.get("weight") is not None
    return own and isinstance(quantised_weight(module, torch.float32), QuantisedWeight)


def holds_codes(module: nn.Module) -> bool:
    """Whether the module is a linear layer of any library named above, whatever its state."""
    return _reader(module) is not None


def rounds_in_forward(module: nn.Module) -> str | None:
    """Of a module with a forward on the instance: None if it is that of compressed-tensors and does
    nothing but call its class's, as once the weight is decompressed; else the reason, or "" for any
    other forward."""
    held = vars(module)
    function: Any = getattr(held["forward"], "__func__", None)
    if getattr(function, "__globals__", {}).get("__name__") != "compressed_tensors.quantization.lifecycle.forward":
        return ""
    scheme, status = held.get("quantization_scheme"), _status(module)
    if status == "COMPRESSED":
        return "compressed-tensors has yet to decompress the weight, which the first call of its model does"
    if status != "DECOMPRESSED":
        return "compressed-tensors rounds the weight at each call"
    if scheme is None or scheme.input_activations is not None or scheme.output_activations is not None:
        return "compressed-tensors rounds the input or the output"
    return None if function.__wrapped__ is type(module).forward else ""


def _status(module: nn.Module) -> str | None:
    """How far compressed-tensors is with it."""
    return getattr(vars(module).get("quantization_status"), "name", None)


def quantised_weight(module: nn.Module, dtype: torch.dtype) -> QuantisedWeight | str:
    """The weight of such a layer for inputs of a dtype, or in words why it cannot be read."""
    read = _reader(module)
    if read is None:
        return f"{type(module).__name__} is no quantised layer that is known here"
    try:
        return read(module, dtype)
    except (TypeError, ValueError) as error:
        return str(error)


def _reader(module: nn.Module) -> Reader | None:
    library: Any = sys.modules.get("bitsandbytes")
    if library is not None and isinstance(module, library.nn.Linear4bit | library.nn.Linear8bitLt):
        return _of_4bit if isinstance(module, library.nn.Linear4bit) else _of_8bit
    library = sys.modules.get("hqq.core.quantize")
    if library is not None and isinstance(module, library.HQQLinear):
        return _of_hqq
    if not isinstance(module, nn.Linear):
        return None
    weight = module._parameters.get("weight")
    if type(weight).__module__.startswith("torchao."):
        return _of_torchao
    if "quantization_scheme" in module.__dict__:
        return None if _status(module) == "DECOMPRESSED" else _of_compressed
    if weight is not None and weight.element_size() == 1 and "weight_scale_inv" in module._parameters:
        return _of_fp8
    return None


def _of_4bit(module: Any, dtype: torch.dtype) -> QuantisedWeight | str:
    weight = module._parameters.get("weight")
    if weight is None:
        return "the 4-bit layer has no weight of its own"
    state = getattr(weight, "quant_state", None)
    if state is None:  # which the parameter loses where a wrapper makes it anew
        state = module.__dict__.get("quant_state")
    if state is None:
        return "the 4-bit weight has no quant_state: it is not quantised yet, or was made anew without it"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has packed the 4-bit weight for its own inference on this CPU"
    if state.shape is None or tuple(state.shape) != (module.out_features, module.in_features):
        return f"the 4-bit weight is of shape {state.shape}, not [out, in]"
    return of_4bit_state(weight, state, dtype)


def of_4bit_state(weight: Tensor, state: Any, dtype: torch.dtype) -> QuantisedWeight:
    """A weight of bitsandbytes and its QuantState, in the state's shape."""
    codes = plain(weight)
    named: dict[str, Any] = {}
    scales = state.absmax
    if state.nested:
        outer = state.state2
        named = {
            "outer": floats(outer.absmax), "outer_table": floats(outer.code), "outer_block": outer.blocksize,
            "offset": floats(state.offset),
        }  # fmt: skip
    else:
        scales = floats(scales)
    return QuantisedWeight(
        codes if codes.dtype is torch.uint8 else codes.view(torch.uint8),
        state.shape, scales, state.blocksize, dtype, table=floats(state.code), **named,
    )  # fmt: skip


def _of_8bit(module: Any, dtype: torch.dtype) -> QuantisedWeight | str:
    weight, state = module._parameters.get("weight"), module.state
    if weight is None:
        return "the 8-bit layer has no weight of its own"
    if state.has_fp16_weights:
        return "the 8-bit layer keeps its weight in 16 bits"
    codes = state.CB if state.CB is not None else plain(weight)
    largest = state.SCB if state.SCB is not None else getattr(weight, "SCB", None)
    if codes.dtype is not torch.int8:
        return "the 8-bit weight is not quantised yet"
    if largest is None:
        return "the 8-bit weight has no scales (SCB): it is not quantised yet, or was made anew without them"
    scales = floats(largest).reshape(-1) * INT8_STEP
    return QuantisedWeight(codes, codes.shape, scales, codes.shape[1], dtype)


def plain(weight: Tensor) -> Tensor:
    """The tensor without the library's class, which asks for its functions again at each call."""
    if torch.compiler.is_compiling():
        with torch._C.DisableTorchFunctionSubclass():
            return weight.detach()
    if weight.is_inference():  # as HQQ makes all, and no backward may keep
        weight = torch.from_dlpack(weight)
    return weight.detach().as_subclass(Tensor)  # not .data, whose version stays as it is


def floats(tensor: Tensor) -> Tensor:
    tensor = plain(tensor)
    return tensor if tensor.dtype in (torch.float32, POWERS) else tensor.float()


def _of_torchao(module: Any, dtype: torch.dtype) -> QuantisedWeight | str:
    weight = module._parameters["weight"]
    name = type(weight).__name__
    if name not in ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"):
        return f"torchao's {name} lies as one of its kernels wants it"
    for rest in ("act_quant_kwargs", "act_pre_scale", "activation_quantization"):
        if getattr(weight, rest, None) is not None:
            return f"torchao changes the input of this layer, too ({rest})"
    return _of_blocks(weight.qdata, weight.scale, getattr(weight, "zero_point", None), weight.block_size, dtype)


def _of_fp8(module: Any, dtype: torch.dtype) -> QuantisedWeight | str:
    weight, scales = plain(module.weight), plain(module.weight_scale_inv)
    n_out, n_in = module.out_features, module.in_features
    if getattr(module, "activation_scale", None) is not None:
        return "the float8 layer has a fixed scale for its inputs, too"
    if hasattr(module, "n_groups"):
        return "the float8 layer has a weight for each group of its inputs"
    scales = scales.view(POWERS) if scales.dtype is torch.uint8 else scales
    if weight.dtype is torch.int8:  # two numbers of MXFP4
        weight, blocks = weight.view(torch.uint8), (1, n_in // scales.shape[-1])
        return _of_blocks(weight, scales, None, blocks, dtype, (n_out, n_in), table=table_of(E2M1, weight), order=LOW_FIRST)
    return _of_blocks(weight, scales, None, (n_out, n_in) if scales.numel() == 1 else module.block_size, dtype)


def _of_hqq(module: Any, dtype: torch.dtype) -> QuantisedWeight | str:
    codes, meta = module.W_q, module.meta
    if codes is None or meta is None:
        return "the HQQ layer is not quantised yet"
    if meta["packing"] != "4bit_u8":
        return f"HQQ's weight of {meta['nbits']} bits is packed as {meta['packing']}, not as 4bit_u8"
    if "zero" not in meta or "scale" not in meta:
        return "HQQ's scales or zeros are quantised themselves"
    scales, zeros, shape = meta["scale"], meta["zero"], meta["shape"]
    if meta["axis"] != 1 and scales.numel() > 1:
        return "HQQ's groups go down the columns (axis 0), so that neighbours in a row have no scale in common"
    rounds = meta.get("compute_dtype", torch.float16)
    if {scales.dtype, zeros.dtype} != {rounds}:
        return f"HQQ's scales and zeros are {scales.dtype} and {zeros.dtype}, not of its compute dtype {rounds}"
    numbers = shape[0] * shape[1]
    return QuantisedWeight(
        plain(codes).view(torch.uint8), shape, floats(scales), numbers // scales.numel(), dtype, table_of(range(16), codes),
        order=HALVES, zeros=floats(zeros), zero_rounded=rounds is not torch.float32,
    )  # fmt: skip


def _of_compressed(module: Any, dtype: torch.dtype) -> QuantisedWeight | str:
    scheme = module.quantization_scheme
    if _status(module) != "COMPRESSED":
        return "the layer of compressed-tensors is not compressed: it rounds its weight at each call"
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return "compressed-tensors changes the input or the output of this layer, too"
    held, how = module._parameters | module._buffers, scheme.weights
    if held.get("weight_g_idx") is not None:
        return "the columns of the weight are in the order of their activations (weight_g_idx)"
    shape = n_out, n_in = module.out_features, module.in_features
    scales, zeros = plain(held["weight_scale"]), held.get("weight_zero_point")
    strategy = str(getattr(how.strategy, "value", how.strategy))
    blocks = {"tensor": shape, "channel": (1, n_in), "group": (1, how.group_size), "block": how.block_structure}.get(strategy)
    if blocks is None or held.get("weight_global_scale") is not None:
        return f"compressed-tensors' strategy {strategy} has scales of scales, or is none of a weight"
    scales = scales.view(POWERS) if scales.dtype is torch.uint8 else scales
    packed = held.get("weight_packed")
    if packed is None:
        return _of_blocks(plain(held["weight"]), scales, zeros, blocks, dtype)
    if how.num_bits != 4 or n_in % 8:
        return f"compressed-tensors packs {how.num_bits} bits and rows of {n_in}; wanted are 4 and a multiple of 8"
    codes = plain(packed).view(torch.uint8)
    if packed.dtype is torch.uint8:
        return _of_blocks(codes, scales, zeros, blocks, dtype, shape, table=table_of(E2M1, codes), order=LOW_FIRST)
    if zeros is not None and zeros.dtype is torch.int32:  # eight rows in a number
        shifts = torch.arange(0, 32, 4, device=zeros.device)
        zeros = ((plain(zeros)[:, None] >> shifts[:, None]) & 15).reshape(-1, zeros.shape[-1])[:n_out] - 8
    return _of_blocks(codes, scales, zeros, blocks, dtype, shape, table=table_of(range(-8, 8), codes), order=LOW_FIRST)


def _of_blocks(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, block: Any, dtype: torch.dtype,
    shape: tuple[int, int] | None = None, **named: Any,
) -> QuantisedWeight | str:  # fmt: skip
    """A weight with a scale for each block of [rows, columns]."""
    for part in (codes, scales, zeros):
        if part is not None and (part.is_meta or type(part) not in (Tensor, nn.Parameter)):
            return f"a part of the weight is {'on the meta device' if part.is_meta else f'a {type(part).__name__}'}"
    rows, columns = block
    n_out, n_in = shape = shape or (codes.shape[0], codes.shape[1])
    # which a compiler cannot ask; to subtract zeros gives the same bits
    if zeros is not None and (torch.compiler.is_compiling() or bool((zeros != 0).any())):
        rounds = zeros.is_floating_point()  # integers and their differences are exact in 16 bits
        named |= {"zeros": floats(zeros.to(dtype) if rounds else zeros).contiguous(), "zero_rounded": rounds}
    if rows >= n_out and columns >= n_in:
        size, block_rows = n_out * n_in, 0
    else:
        size, block_rows = columns, 0 if rows == 1 and n_in % columns == 0 else rows
    return QuantisedWeight(
        plain(codes), torch.Size(shape), floats(scales).contiguous(), size, dtype, block_rows=block_rows, **named
    )


def table_of(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32, device=like.device)
