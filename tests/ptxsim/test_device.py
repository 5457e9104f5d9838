"""Counters over many launches, and the model of the second-level cache."""

import numpy as np
import pytest
import torch

from lora_kernels import _ptxsim, ptxsim
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
    # the second launch finds x in the cache, and y is written once
    assert sim.dram() == (4096, 4096)
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


def dependent(*lines, target="sm_90"):
    """Copies x to y, 64 threads, with some lines before."""
    begin = [
        "mov.u32 %t, %tid.x;", "setp.eq.u32 %p, %t, 0;", "setp.lt.u32 %q, %t, 32;", "ld.param.u64 %x, [x];",
        "ld.param.u64 %y, [y];", "mad.wide.u32 %x, %t, 4, %x;", "mad.wide.u32 %y, %t, 4, %y;", *lines,
        "ld.global.f32 %f, [%x];",
    ]  # fmt: skip
    registers = [".reg .b32 %t; .reg .b64 %x, %y; .reg .f32 %f; .reg .pred %p, %q;"]
    return ptxsim.Kernel(kernel_text([*begin, "st.global.f32 [%y], %f;"], registers, [("x", "u64"), ("y", "u64")], target))


WAIT, PASS = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
PLAIN, WAITS = dependent(), dependent(WAIT)


def chain(*kernels, early=True, arch=90):
    """x to y to z and so on, each launch after the first an early one; what is found."""
    tensors, errors = [torch.randn(64) for _ in range(len(kernels) + 1)], []
    with ptxsim.device(arch, tolerant=True) as sim:
        for i, kernel in enumerate(kernels):
            x, y = tensors[i : i + 2]
            errors += kernel.launch((1,), (64,), [x, y], [y], [y], early=early and i > 0).errors
    assert sim.launches == len(kernels)
    return errors


def test_an_early_launch_waits_for_what_it_reads():
    assert chain(PLAIN, WAITS) == chain(PLAIN, PLAIN, early=False) == []
    (error,) = chain(PLAIN, PLAIN)
    assert "of the launch before, without griddepcontrol.wait (and 63 more like it)" in error and "ld reads y+" in error
    assert chain(PLAIN, WAITS, WAITS, PLAIN)


def test_before_sm_90_launches_follow_each_other():
    assert chain(PLAIN, dependent(target="sm_80")) == []


@pytest.mark.parametrize(("lines", "warps"), [
    ([f"@%p {WAIT}"], "01"), ([f"@%q {WAIT}"], "1"), ([f"@!%q {WAIT}"], "0"),
    ([f"@%p {WAIT}", "bar.warp.sync 0xffffffff;"], "1"),
    ([f"@%p {WAIT}", "bar.sync 0;"], ""), (["bar.sync 0;", f"@%p {WAIT}"], "01"),
])  # fmt: skip
def test_each_thread_waits_or_meets_one_that_has(lines, warps):
    errors = "\n".join(chain(PLAIN, dependent(*lines)))
    assert bool(errors) == bool(warps)
    if warps == "1":
        assert "warp 1" in errors and "(and 31 more" in errors
    if warps == "0":
        assert "warp 0" in errors and "(and 31 more" in errors
    if lines == [f"@%p {WAIT}"]:
        assert "(and 62 more" in errors


def test_memory_that_the_launch_before_reads_is_not_written():
    x, y, z = torch.randn(64), torch.randn(64), torch.randn(64)
    for kernel, found in ((PLAIN, True), (WAITS, False)):
        with ptxsim.device(90, tolerant=True):
            PLAIN.launch((1,), (64,), [x, y], [y])
            errors = kernel.launch((1,), (64,), [z, x], [x], early=True).errors
        assert bool(errors) == found
        assert not found or "st writes x+" in errors[0]


def test_a_launch_that_lets_the_next_one_begin_before_it_has_waited():
    """The third may then meet the first, too: what that wrote is not there yet."""
    x, y, z, a, b = (torch.randn(64) for _ in range(5))
    for first, found in (([PASS, WAIT], True), ([WAIT, PASS], False), ([WAIT], False)):
        with ptxsim.device(90, tolerant=True):
            PLAIN.launch((1,), (64,), [x, y], [y])
            dependent(*first).launch((1,), (64,), [z, a], [a], early=True)
            errors = PLAIN.launch((1,), (64,), [y, b], [b], early=True).errors
        assert bool(errors) == found, first
        assert not found or "ld reads y+" in errors[0]
