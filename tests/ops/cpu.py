"""What the tests of the CPU kernels share."""

import math
from contextlib import contextmanager

import torch


@contextmanager
def at_level(name):
    """Another instruction set inside the block."""
    from lora_kernels import _cpu

    before = _cpu.level()
    _cpu.set_level(name)
    try:
        yield
    finally:
        _cpu.set_level(before)


def operands(tokens, n_in, n_out, dtype, gap=3):
    """x [tokens, in] and w [out, in] inside larger matrices of NaN."""
    generator = torch.Generator().manual_seed(tokens)
    made = []
    for rows in (tokens, n_out):
        held = torch.full((rows, n_in + gap), math.nan, dtype=dtype)
        held[:, :n_in] = torch.randn(rows, n_in, generator=generator).to(dtype)
        made.append(held[:, :n_in])
    return made
