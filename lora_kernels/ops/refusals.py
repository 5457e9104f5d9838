"""What no kernel reads, in words; every backend but the reference asks here."""

from typing import Any

import torch

READ = (torch.float32, torch.bfloat16, torch.float16)


def refuse_negated(**tensors: Any) -> str | None:
    """Names the first tensor whose memory holds the negative of its values, as conj().imag has: the kernels read memory."""
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
