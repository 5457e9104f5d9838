"""Checks of the options of layers."""

import operator
from typing import Any

from torch import nn

from lora_kernels.ops.lora_linear.op import FLOATS


def check_flag(layer: str, name: str, value: Any, hint: str = "") -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{layer}: {name} must be True or False, found {value!r}{hint}")
    return value


def check_weight(layer: str, weight: Any, name: str = "weight") -> nn.Parameter:
    if type(weight) is not nn.Parameter:
        raise TypeError(f"{layer}: {name} must be a plain parameter, found {type(weight).__name__}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{layer}: {name} must be float32, bfloat16, float16 or float64, found {weight.dtype}")
    return weight


def check_rank(layer: str, r: Any) -> int:
    if isinstance(r, bool) or not hasattr(r, "__index__"):
        raise TypeError(f"{layer}: r must be an integer, found {r!r}")
    r = operator.index(r)
    if r < 1:
        raise ValueError(f"{layer}: r must be at least 1, found {r}")
    return r


def check_number(layer: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{layer}: {name} must be a number, found {value!r}")
    if not -1e300 < value < 1e300:
        found = value if isinstance(value, float) else f"an integer of {value.bit_length()} bits"
        raise ValueError(f"{layer}: {name} must be finite, found {found}")
    return value


def check_dropout(layer: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{layer}: lora_dropout must be a number, found {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{layer}: lora_dropout must be in [0, 1), found {value}")
    return float(value)
