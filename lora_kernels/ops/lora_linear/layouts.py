"""Inputs that no kernel reads: nested, sparse and mkldnn tensors. Their rows are taken out, and the
result has the kind that nn.Linear gives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AsInput = Callable[[Tensor], Tensor]


def is_strided(x: Tensor) -> bool:
    """Whether x is an ordinary tensor."""
    return x.layout is torch.strided and not x.is_nested


def strided_input(x: Any) -> tuple[Tensor, AsInput]:
    """x as an ordinary tensor [..., in], and what makes of [..., out] the result for x: nested as x
    is, mkldnn as x is, and of a sparse x an ordinary tensor."""
    if not x.is_nested:
        return x.to_dense(), torch.Tensor.to_mkldnn if x.is_mkldnn else lambda y: y
    if x.layout is torch.jagged and x.dim() == 3 and x.lengths() is None and x._ragged_idx == 1:
        return x.values(), lambda y: torch.nested.nested_tensor_from_jagged(y, x.offsets())
    parts = x.unbind()
    sizes = [part.shape[:-1] for part in parts]

    def nested(y: Tensor) -> Tensor:
        split = y.split([size.numel() for size in sizes])
        made = [rows.view(*size, y.shape[-1]) for rows, size in zip(split, sizes, strict=True)]
        return torch.nested.as_nested_tensor(made, layout=x.layout)

    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]), nested
