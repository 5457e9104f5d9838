"""A quantised weight as a tensor: formula (1) of `QuantisedWeight`."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.quantised.weight import DTYPES, QuantisedWeight
from lora_kernels.ops.registry import declare


class Codes(NamedTuple):
    """`QuantisedWeight.fields()`."""

    codes: Tensor
    parts: list[Tensor]
    layout: list[int]


def dequantise(weight: QuantisedWeight) -> Tensor:
    """W [out, in] in the weight's dtype, each number rounded once. It equals, bit for bit, what the
    library that wrote the codes makes of them.

    Raises:
        NotImplementedError: the forced backend refuses; the message says why.
    """
    with torch.no_grad():
        return _dequantise(Codes(*weight.fields()))


def _fake(call):
    _, n_out, n_in, dtype, *_ = call.layout
    return call.codes.new_empty(n_out, n_in, dtype=DTYPES[dtype])


_dequantise = declare("dequantise", Codes, "Tensor", _fake)
