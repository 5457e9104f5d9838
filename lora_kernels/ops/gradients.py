"""What a backward is asked for, tensor by tensor: `needs`, a list of the numbers below; False and
True will do, too.

    a.grad_dtype = torch.float32      # torch's own setting, for a leaf in 16 bits: its gradients
                                      come and add up in float32
"""

from collections.abc import Iterable

import torch
from torch import Tensor

# no gradient; one in the tensor's dtype; one in that of the sums, unrounded
NO_GRADIENT, OWN_DTYPE, SUM_DTYPE = 0, 1, 2
_HALVES = (torch.bfloat16, torch.float16)


def gradient_kind(t: Tensor | None) -> int:
    """How the gradient of a tensor is wanted, if it is. A compiled graph rounds: torch does not
    trace grad_dtype."""
    if t is None or t.dtype not in _HALVES or torch.compiler.is_compiling() or not t.is_leaf:
        return OWN_DTYPE
    return SUM_DTYPE if getattr(t, "grad_dtype", t.dtype) is torch.float32 else OWN_DTYPE


def requested_kinds(kinds: Iterable[int], wants: Iterable[bool]) -> list[int]:
    """`needs`: the kind of each gradient that is wanted."""
    return [of_t if want else NO_GRADIENT for of_t, want in zip(kinds, wants, strict=True)]


def gradient_dtype(t: Tensor, need: int) -> torch.dtype:
    """The dtype of the gradient of t."""
    return torch.promote_types(t.dtype, torch.float32) if need == SUM_DTYPE else t.dtype


def empty_gradient(t: Tensor, need: int) -> Tensor:
    """Memory for the gradient of t, in rows."""
    return torch.empty_like(t, dtype=gradient_dtype(t, need), memory_format=torch.contiguous_format)
