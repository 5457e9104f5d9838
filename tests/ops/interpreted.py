"""The ops' Triton kernels in the mended interpreter: numpy, no compiler, so that many sizes can be
tried."""

import math
from contextlib import contextmanager

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.ptxsim import device, triton_ptx
from lora_kernels.testing.triton_interpreter import interpret


@contextmanager
def interpreted(arch=80, seed=None, last=None, poison=True):
    """Inside it the kernels of the ops run in the interpreter, and what they make is NaN before.
    `seed`: programs in another order. `last`: only so many programs at the end of each launch.
    Yields the names of the kernels that ran."""
    names = []

    def run(kernel, grid, args, writes, *, poisoned=(), warps, stages, early):
        names.append(kernel.fn.__name__)
        for t in poisoned if poison else ():
            t.fill_(math.nan) if t.is_floating_point() else t.fill_(-77)
        interpret(kernel, grid, args, writes, seed=seed, programs=ends(grid, last) if last else None)

    before = triton_ptx.simulate_triton
    triton_ptx.simulate_triton = run
    try:
        with use_backend("triton", simulate=True), device(arch):
            yield names
    finally:
        triton_ptx.simulate_triton = before


def ends(grid, count):
    """The last programs of a grid, in their order."""
    x, y, z = (*grid, 1, 1)[:3]
    total = x * y * z
    return [(i % x, i // x % y, i // (x * y)) for i in range(max(0, total - count), total)]


@contextmanager
def deterministic(on):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def sweep(few, many):
    """The same examples on every run: a few, and many for `make test-slow`."""

    def decorated(check):
        def settings(count):
            return hypothesis.settings(
                max_examples=count, derandomize=True, database=None, deadline=None,
                # a failure is minutes of shrinking away from its report
                phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
            )  # fmt: skip

        def quick(data):
            check(data.draw)

        def wide(data):
            check(data.draw)

        return (
            settings(few)(hypothesis.given(data=st.data())(quick)),
            pytest.mark.slow(settings(many)(hypothesis.given(data=st.data())(wide))),
        )

    return decorated
