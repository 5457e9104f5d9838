"""Uninitialised memory that shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block every `torch.empty`, `new_empty` and `empty_like` on any device comes filled
    with NaN.

    A kernel that leaves an output element unwritten, or reads one before it wrote it, then gives
    NaN instead of a plausible number. Takes effect process-wide: it switches PyTorch's
    deterministic mode on.
    """
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic  # a module whose class has the property
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)
