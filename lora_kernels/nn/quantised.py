"""The quantised weights of other libraries' layers, as they lie, nothing copied.

Of bitsandbytes 0.4x to 0.50 (4-bit: QLoRA, arXiv:2305.14314; int8: arXiv:2208.07339). The library
is not imported here: a module can be one of its classes only if somebody did.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.ops.quantised import QuantisedWeight

INT8_STEP = 1.0 / 127.0
"""Of a row's largest number, which bitsandbytes keeps as SCB."""


def is_quantised(module: nn.Module) -> bool:
    """Whether the module is a linear layer of a library that quantises, whatever its state."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear4bit | library.nn.Linear8bitLt)


def quantised_weight(module: nn.Module, dtype: torch.dtype) -> QuantisedWeight | str:
    """The weight of such a layer for inputs of a dtype, or in words why it cannot be read."""
    library: Any = sys.modules["bitsandbytes"]
    try:
        return (_of_4bit if isinstance(module, library.nn.Linear4bit) else _of_8bit)(module, dtype)
    except (TypeError, ValueError) as error:
        return str(error)


def _of_4bit(module: Any, dtype: torch.dtype) -> QuantisedWeight | str:
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is None:  # which the parameter loses where a wrapper makes it anew
        state = module.__dict__.get("quant_state")
    if state is None:
        return "the 4-bit weight has no quant_state: it is not quantised yet, or was made anew without it"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has packed the 4-bit weight for its own inference on this CPU"
    if state.shape is None or tuple(state.shape) != (module.out_features, module.in_features):
        return f"the 4-bit weight is of shape {state.shape}, not [out, in]"
    codes = _plain(weight)
    named: dict[str, Any] = {}
    scales = state.absmax
    if state.nested:
        outer = state.state2
        named = {
            "outer": _floats(outer.absmax), "outer_table": _floats(outer.code), "outer_block": outer.blocksize,
            "offset": _floats(state.offset),
        }  # fmt: skip
    else:
        scales = _floats(scales)
    return QuantisedWeight(
        codes if codes.dtype is torch.uint8 else codes.view(torch.uint8),
        state.shape, scales, state.blocksize, dtype, table=_floats(state.code), **named,
    )  # fmt: skip


def _of_8bit(module: Any, dtype: torch.dtype) -> QuantisedWeight | str:
    weight, state = module._parameters.get("weight"), module.state
    if state.has_fp16_weights:
        return "the 8-bit layer keeps its weight in 16 bits"
    codes = state.CB if state.CB is not None else _plain(weight)
    largest = state.SCB if state.SCB is not None else getattr(weight, "SCB", None)
    if largest is None or codes is None or codes.dtype is not torch.int8:
        return "the 8-bit weight is not quantised yet"
    scales = _floats(largest).reshape(-1) * INT8_STEP
    return QuantisedWeight(codes, codes.shape, scales, codes.shape[1], dtype)


def _plain(weight: Tensor) -> Tensor:
    """The tensor without the library's class, which asks for its functions again at each call."""
    return weight.detach().as_subclass(Tensor)  # not .data, whose version stays as it is


def _floats(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float32 else tensor.float()
