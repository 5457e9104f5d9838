"""Tensors whose elements lie further apart than 2^31, of which few are touched."""

import mmap

import torch

STEP = 2**30 + 16  # the third row lies beyond 2^31 elements


def far(t):
    """The values of t [3, n], with rows STEP elements apart. Pages that nothing touches are never
    committed."""
    assert len(t) == 3
    memory = mmap.mmap(-1, t.element_size() * (2 * STEP + t.shape[1]))
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, (STEP, 1)).copy_(t)
