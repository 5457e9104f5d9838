"""What a backward is asked for, tensor by tensor: `needs`, a list of the numbers below; False and True will do, too.

    a.grad_dtype = torch.float32      # torch's own setting, for a leaf in 16 bits: its gradients come and add up in float32
"""

from collections.abc import Iterable

import torch
from torch import Tensor

NONE, OWN, WIDE = 0, 1, 2  # no gradient; one in the tensor's dtype; one in that of the sums, unrounded
_HALVES = (torch.bfloat16, torch.float16)


def kind(t: Tensor | None) -> int:
    """How the gradient of a tensor is wanted, if it is. A compiled graph rounds: torch does not trace grad_dtype."""
    if t is None or t.dtype not in _HALVES or torch.compiler.is_compiling() or not t.is_leaf:
        return OWN
    return WIDE if getattr(t, "grad_dtype", t.dtype) is torch.float32 else OWN


def asked(kinds: Iterable[int], wants: Iterable[bool]) -> list[int]:
    """`needs`: the kind of each gradient that is wanted."""
    return [of_t if want else NONE for of_t, want in zip(kinds, wants, strict=True)]


def dtype_of(t: Tensor, need: int) -> torch.dtype:
    """The dtype of the gradient of t."""
    return torch.promote_types(t.dtype, torch.float32) if need == WIDE else t.dtype


def empty_like(t: Tensor, need: int) -> Tensor:
    """Memory for the gradient of t, in rows."""
    return torch.empty_like(t, dtype=dtype_of(t, need), memory_format=torch.contiguous_format)
