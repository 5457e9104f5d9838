"""How long each comparison is, and how far two correct runs may differ."""

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from smollm2 import LAYERS, WIDEST_INPUT


@dataclass(frozen=True)
class TrainingPlan:
    """The size of one comparison. Each step takes one row of `tokens`; the learning rate is
    AdamW's."""

    tokens: int
    steps: int
    held_out_rows: int
    completion_tokens: int
    learning_rate: float = 1e-3
    note: str = ""

    def __str__(self) -> str:
        size = f"{self.steps} steps of {self.tokens} tokens, {self.held_out_rows} held-out rows of {self.tokens}"
        return f"{size} ({self.note})" if self.note else size

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


_QUICK_NOTE = "--quick: the whole model and real text, but few steps and short rows"
_SLOW_NOTE = "short, as torch has no fast bfloat16 matmul on this processor"
_FULL = TrainingPlan(tokens=128, steps=24, held_out_rows=12, completion_tokens=64)
_QUICK = TrainingPlan(tokens=32, steps=4, held_out_rows=4, completion_tokens=8, note=_QUICK_NOTE)
_SLOW_FULL = replace(_FULL, tokens=16, steps=12, held_out_rows=16, note=_SLOW_NOTE)
_SLOW_QUICK = replace(_QUICK, tokens=8, steps=3, note=f"{_SLOW_NOTE}; {_QUICK_NOTE}")


def choose_plan(quick: bool, slow: bool, steps: int | None = None) -> TrainingPlan:
    """The plan for a mode; `slow` if torch's own matmul is (see `is_slow`), `steps` overrides the
    plan's."""
    plan = (_SLOW_QUICK if slow else _QUICK) if quick else (_SLOW_FULL if slow else _FULL)
    return plan if steps is None else replace(plan, steps=steps)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype more than four times slower than float32
    ones, as measured.

    Without native bfloat16, torch's product in the backward pass is up to 100 times slower, and
    stock PEFT with it.
    """
    return dtype is not torch.float32 and _matmul_seconds(dtype) > 4 * _matmul_seconds(torch.float32)


def _matmul_seconds(dtype: torch.dtype) -> float:
    dy, w = torch.ones(64, WIDEST_INPUT, dtype=dtype), torch.ones(WIDEST_INPUT, 576, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        dy @ w
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rounding_bound(dtype: torch.dtype, loss: float) -> float:
    """How far the losses of two correct runs in `dtype` may lie apart:

        2 · loss · √(2·L) · (u + √K · 2⁻²⁴)

    u is the unit roundoff of `dtype`: 2⁻²⁴ for float32, 2⁻⁸ for bfloat16. Each of the L = 30 layers
    adds two results to the hidden state, rounded to it. A float32 sum over the longest input, K =
    1536, errs by √K · 2⁻²⁴ where its terms come in another order. The 2·L results add up as a
    random walk, and both runs err: the factor 2.
    """
    unit = torch.finfo(dtype).eps / 2
    return 2 * loss * math.sqrt(2 * LAYERS) * (unit + math.sqrt(WIDEST_INPUT) * 2**-24)


def largest_difference(one: list[float], other: list[float]) -> float:
    """The largest distance of two loss curves at one step; NaN if a loss is."""
    return torch.tensor(one, dtype=torch.float64).sub(torch.tensor(other, dtype=torch.float64)).abs().max().item()
