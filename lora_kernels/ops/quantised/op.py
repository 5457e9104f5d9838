"""A quantised weight as a tensor: formula (1) of `QuantisedWeight`."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_kernels.ops.quantised.weight import DTYPES, QuantisedWeight
from lora_kernels.ops.registry import PREFERENCE, declare, refusals


class Codes(NamedTuple):
    """`QuantisedWeight.fields()`."""

    codes: Tensor
    parts: list[Tensor]
    layout: list[int]


def dequantise(weight: QuantisedWeight) -> Tensor:
    """W in the weight's shape and dtype, each number rounded once. It equals, bit for bit, what the
    library that wrote the codes makes of them.

    Raises:
        NotImplementedError: the forced backend refuses; the message says why.
    """
    with torch.no_grad():
        return _dequantise(Codes(*weight.fields())).view(weight.shape)


def _fake(call):
    _, n_out, n_in, dtype, *_ = call.layout
    return call.codes.new_empty(n_out, n_in, dtype=DTYPES[dtype])


_dequantise = declare("dequantise", Codes, "Tensor", _fake)

_reasons: WeakKeyDictionary[QuantisedWeight, str | None] = WeakKeyDictionary()


def codes_refusal(weight: QuantisedWeight) -> str | None:
    """Why no kernel of its device makes numbers of a weight, each backend with its reason; None if
    one does. Asked once for a weight."""
    try:
        return _reasons[weight]
    except KeyError:
        found = refusals("dequantise", weight.fields())
        asked = {name: found[name] for name in PREFERENCE.get(weight.device.type, ()) if name != "reference"}
        words = "; ".join(f"{name}: {reason}" for name, reason in asked.items())
        reason = None if None in asked.values() else words or f"there are no kernels for {weight.device.type}"
        _reasons[weight] = reason
        return reason
