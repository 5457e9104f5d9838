"""What no kernel reads, in words; every backend but the reference asks here."""

from typing import Any

import torch

READ = (torch.float32, torch.bfloat16, torch.float16)


def refuse_negated(**tensors: Any) -> str | None:
    """Names the first tensor whose memory holds the negative of its values, as conj().imag has: the
    kernels read memory."""
    for name, t in tensors.items():
        if t is not None and t.is_neg():
            return f"{name} is a negated view; resolve_neg() makes it a plain tensor"
    return None


def refuse_dtypes(**tensors: Any) -> str | None:
    """Names the first tensor whose dtype the kernels do not read."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in READ:
            return f"{name} is {t.dtype}; the kernels read float32, bfloat16 and float16"
    return None


def refuse_quantised(call: Any) -> str | None:
    """Of a backend that has no kernel for a QuantisedWeight."""
    return "w is a QuantisedWeight, for which there is no kernel here" if call.layout else None


def refuse_rows(**tensors: Any) -> str | None:
    """Names the first matrix whose rows cannot be read 16 bytes at a time."""
    for name, t in tensors.items():
        rows, columns = t.shape
        if not rows or not columns:
            continue
        row, step = t.stride()
        if step != 1:
            return f"{name} has strides {[row, step]}; the kernel needs rows without gaps"
        if t.data_ptr() % 16 or (rows > 1 and row * t.element_size() % 16):
            return f"the rows of {name} do not begin at multiples of 16 bytes"
    return None


def refuse_factors(w: Any, a: Any, b: Any, most: int) -> str | None:
    """What the CUDA C++ kernels of W + s·BA do not read: they take 16 bits, up to `most` ranks,
    rows in pieces of 16 bytes."""
    if w.dtype not in READ[1:] or a.dtype is not w.dtype:
        return f"w is {w.dtype} and a {a.dtype}; the kernel reads bfloat16 or float16, the same for both"
    if a.shape[0] > most:
        return f"a has {a.shape[0]} rows; the kernel has room for {most}"
    if w.shape[1] % 8:
        return f"w has {w.shape[1]} columns; the kernel needs a multiple of 8"
    if b.numel() and b.stride(1) != 1:
        return f"b has strides {list(b.stride())}; the kernel needs rows without gaps"
    return refuse_rows(w=w, a=a)
