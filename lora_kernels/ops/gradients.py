"""What a backward is asked for, tensor by tensor: `needs`, a list of the numbers below; False and
True will do, too.

    a.grad_dtype = torch.float32      # torch's own setting, for a leaf in 16 bits: its gradients
                                      come and add up in float32
"""

from collections.abc import Iterable
from operator import mul

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
    """`needs`: the kind of each gradient that is wanted; NO_GRADIENT is 0."""
    return list(map(mul, kinds, wants))


def requested_gradients(grads: Iterable[Tensor | None], needs: Iterable[int]) -> tuple[Tensor | None, ...]:
    """None for what `needs` does not ask for: an op gives an empty tensor there while it is
    traced."""
    return tuple([g if need else None for g, need in zip(grads, needs, strict=True)])


def gradient_dtype(t: Tensor, need: int) -> torch.dtype:
    """The dtype of the gradient of t."""
    return torch.promote_types(t.dtype, torch.float32) if need == SUM_DTYPE else t.dtype


def empty_gradient(t: Tensor, need: int) -> Tensor:
    """Memory for the gradient of t, in rows."""
    return torch.empty_like(t, dtype=gradient_dtype(t, need), memory_format=torch.contiguous_format)


def laid_out_as(grad: Tensor, t: Tensor) -> Tensor:
    """A gradient in the strides that `torch.empty_like(t)` has, by ops that are differentiated in
    turn."""
    strides = torch.empty_like(t, device="meta").stride()
    order = sorted(range(t.dim()), key=lambda i: (-strides[i], i))
    return grad.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])
