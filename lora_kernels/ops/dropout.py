"""The dropout mask: a function of (seed, row, column), so that it is never stored and every backend
draws the same bits.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key =
seed and counter = (column // 4, row, row >> 32, 0); element (row, column) takes word `column % 4`
of the result. It is kept where that word, as an unsigned 32-bit number, is at least p·2³².
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def draw_seed() -> Tensor:
    """A fresh seed, int64 [], from torch's default CPU generator: `torch.manual_seed` and
    checkpointing govern it."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def threshold(p: float) -> int:
    """The smallest 32-bit word that is kept."""
    return min(int(p * 2**32), _LOW)


def inverse_keep_rate(p: float, seed: Tensor | None) -> float:
    """1/(1-p), by which what is kept is multiplied; 1 where nothing is dropped."""
    return 1.0 / (1.0 - p) if seed is not None and p > 0 else 1.0


def mask(seed: Tensor, p: float, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The multiplier of each element, [rows, columns]: 0 where dropped, 1/(1-p) where kept."""
    groups = (columns + 3) // 4
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None].expand(rows, groups)
    group = torch.arange(groups, device=device, dtype=torch.int64)[None, :].expand(rows, groups)
    words = _philox_words(seed.to(device), (group, row & _LOW, row >> 32, torch.zeros_like(row)))
    word = torch.stack(words, dim=-1).reshape(rows, groups * 4)[:, :columns]
    return torch.where(word >= threshold(p), 1.0 / (1.0 - p), 0.0).to(dtype)


def _philox_words(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    product = constant * word  # wraps in int64, which keeps all 64 bits of the unsigned product
    return (product >> 32) & _LOW, product & _LOW
