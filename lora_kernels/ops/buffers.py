"""What the C++ kernels are told of a tensor: its address, strides and dtype."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.dropout import threshold

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def matrix(t: Tensor) -> tuple[int, int, int, int]:
    """A matrix with any strides."""
    row, column = t.stride()
    return (t.data_ptr(), row, column, CODES[t.dtype])


def transposed(t: Tensor) -> tuple[int, int, int, int]:
    """The transpose of a matrix."""
    row, column = t.stride()
    return (t.data_ptr(), column, row, CODES[t.dtype])


def vector(t: Tensor | None) -> tuple[int, int, int, int] | None:
    """A vector with any stride, or nothing."""
    return None if t is None else (t.data_ptr(), 0, t.stride(0), CODES[t.dtype])


def mask(dropout: float, seed: Tensor | None) -> tuple[int, int, float] | None:
    """The dropout mask, or nothing: (seed, smallest kept word, multiplier)."""
    return None if seed is None or dropout <= 0 else (int(seed), threshold(dropout), 1.0 / (1.0 - dropout))


def row_major(t: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return t if t.stride(1) == 1 and (t.shape[0] < 2 or t.stride(0) >= t.shape[1]) else t.contiguous()


def refuse_dtypes(**tensors: Any) -> str | None:
    """Names the first tensor whose dtype the C++ kernels do not read."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in CODES:
            return f"{name} is {t.dtype}; the kernels read float32, bfloat16 and float16"
    return None
