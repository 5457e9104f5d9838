"""Counters over many launches, and the model of the second-level cache."""

import numpy as np
import pytest
import torch

from lora_kernels import _ptxsim
from lora_kernels.testing import ptxsim
from tests.ptxsim.lanes import kernel_text

COPY = kernel_text(
    ["mov.u32 %t, %tid.x;", "mov.u32 %b, %ctaid.x;", "mad.lo.u32 %t, %b, 32, %t;", "ld.param.u64 %x, [x];",
     "ld.param.u64 %y, [y];", "mad.wide.u32 %x, %t, 4, %x;", "mad.wide.u32 %y, %t, 4, %y;", "ld.global.f32 %f, [%x];",
     "st.global.f32 [%y], %f;"],
    [".reg .b32 %t, %b; .reg .b64 %x, %y; .reg .f32 %f;"], [("x", "u64"), ("y", "u64")],
)  # fmt: skip


def test_launches_add_up():
    kernel, x, y = ptxsim.Kernel(COPY), torch.randn(1024), torch.zeros(1024)
    with ptxsim.device(trace=True) as sim:
        one = kernel.launch((32,), (32,), [x, y], [y])
        kernel.launch((32,), (32,), [x, y], [y])
    kernel.launch((32,), (32,), [x, y], [y])
    assert sim.launches == 2
    assert sim.counters == {name: 2 * value for name, value in one.counters.items()}
    assert sim.by_opcode["ld"] == 2 * one.by_opcode["ld"]
    assert sim.dram() == (4096, 4096)  # the second launch finds x in the cache, and y is written once
    assert sim.dram(cache=1024) == (8192, 8192)


def test_options_hold_inside():
    kernel, x = ptxsim.Kernel(COPY), torch.randn(8)
    with ptxsim.device(tolerant=True):
        assert kernel.launch((1,), (32,), [x, x], [x]).errors
        with pytest.raises(ptxsim.SimulationError):
            kernel.launch((1,), (32,), [x, x], [x], tolerant=False)
    with pytest.raises(TypeError, match="launch has no option sed"):
        kernel.launch((1,), (32,), [x, x], [x], sed=1)
    with ptxsim.device() as sim, pytest.raises(ValueError, match=r"needs device\(trace=True\)"):
        sim.dram()
    with ptxsim.device(trace=True) as sim, pytest.raises(ValueError, match="multiple of 32 bytes up to 1024, found 100"):
        sim.dram(line=100)


def traffic(accesses, capacity, line=128):
    """The cache in plain Python."""
    lines, read, written = {}, 0, 0  # in the order of their last use
    for access in accesses:
        sector, store = divmod(access, 2)
        number, part = divmod(sector, line // 32)
        held = lines.pop(number, None)
        if held is None:
            if len(lines) >= capacity // line:
                written += 32 * len(lines.pop(next(iter(lines)))[1])
            held = (set(), set())
        lines[number] = held
        if store:
            held[1].add(part)
        elif part not in held[0]:
            read += 32
        held[0].add(part)
    return read, written + 32 * sum(len(dirty) for _, dirty in lines.values())


@pytest.mark.parametrize("capacity", [256, 1024, 8192])
@pytest.mark.parametrize("line", [32, 128, 256])
def test_the_cache_against_plain_python(capacity, line):
    rng = np.random.default_rng(capacity + line)
    # runs of neighbours, so that lines are met again
    accesses = ((rng.integers(0, 400, 300)[:, None] + np.arange(5)) * 2 + rng.integers(0, 2, (300, 1))).ravel()
    found = _ptxsim.through_cache(accesses.astype(np.uint64).tobytes(), capacity, line)
    assert found == traffic([int(a) for a in accesses], capacity, line)
