"""The sizes and memory layouts that every op is tried on."""

from collections.abc import Callable

import torch
from torch import Tensor

# around every tile edge, and on both sides of the change from few tokens to many
TOKENS = (0, 1, 2, 3, 5, 16, 33, 64, 65, 130, 600)
RANKS = (1, 3, 8, 17, 64, 200, 512)
# (tokens, in, out, rank)
SHAPES = (
    (0, 16, 16, 4),
    (1, 1, 1, 1),
    (1, 17, 31, 3),
    (2, 64, 48, 8),
    (3, 129, 65, 17),
    (5, 31, 7, 1),
    (16, 33, 100, 64),
    (33, 250, 129, 8),
    (64, 16, 255, 3),
    (65, 127, 63, 17),
    (130, 96, 80, 200),
    (600, 67, 45, 8),
    (4, 5, 3, 512),
    (7, 2050, 9, 2),
    (70, 2050, 9, 5),
)


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t


def _misaligned(t: Tensor) -> Tensor:
    # three elements in: no 16-byte alignment is left
    padded = t.new_full((t.numel() + 3,), torch.nan)
    padded[3:] = t.flatten()
    return padded[3:].view(t.shape)


def _sliced_rows(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), torch.nan)
    wide[..., 2:-3] = t
    return wide[..., 2:-3]


def _every_other(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
    wide[..., ::2] = t
    return wide[..., ::2]


def _gapped_rows(t: Tensor) -> Tensor:
    if t.dim() < 2:
        return t
    tall = t.new_full((*t.shape[:-2], 3 * t.shape[-2], t.shape[-1]), torch.nan)
    tall[..., ::3, :] = t
    return tall[..., ::3, :]


def _expanded(t: Tensor) -> Tensor:
    return t[..., :1, :].expand(t.shape) if t.dim() > 1 else t[:1].expand(t.shape)


# every layout but "expanded" keeps the values; what lies between the elements is NaN
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "offset": _misaligned,
    "sliced_rows": _sliced_rows,
    "every_other": _every_other,
    "gapped_rows": _gapped_rows,
    "expanded": _expanded,
}


def as_layout(t: Tensor, layout: str) -> Tensor:
    """The values of t in another memory layout; "expanded" repeats the first row with stride 0."""
    return LAYOUTS[layout](t)
