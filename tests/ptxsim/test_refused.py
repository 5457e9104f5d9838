"""Forms, launches and options that no GPU would take are refused before anything runs."""

import pytest
import torch

from lora_kernels.ptxsim import Kernel, Unsupported
from tests.ptxsim.lanes import kernel_text

HEAD = [".reg .pred %p<4>; .reg .b32 %r<64>; .reg .b64 %rd<8>; .reg .f32 %f<8>;"]
MAP = "tensormap.replace.tile."
SUMS = "{%r0, %r1, %r2, %r3}"


def decode(line):
    return Kernel(kernel_text([line], HEAD, [("x", "u64")], "sm_90a"))


def product(n=8, sums=SUMS, a="%rd0", rest="%p0, 1, 1, 0, 0"):
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {sums}, {a}, %rd1, {rest};"


def many(count):
    return "{" + ", ".join(f"%r{i % 64}" for i in range(count)) + "}"


def test_forms_that_are_right():
    for line in (
        product(), product(24, many(12)), product(256, many(128)), product(a="{%r8, %r9, %r10, %r11}", rest="%p0, 1, -1, 1"),
        f"{MAP}box_dim.global.b1024.b32 [%rd0], 4, %r0;", f"{MAP}global_stride.global.b1024.b64 [%rd0], 3, %rd1;",
        f"{MAP}global_address.shared::cta.b1024.b64 [%rd0], %rd1;", f"{MAP}elemtype.global.b1024.b32 [%rd0], 7;",
    ):  # fmt: skip
        decode(line)


@pytest.mark.parametrize("line", [
    f"{MAP}box_dim.global.b1024.b32 [%rd0], 5, %r0;", f"{MAP}global_stride.global.b1024.b64 [%rd0], 4, %rd1;",
    f"{MAP}global_dim.global.b1024.b32 [%rd0], -1, %r0;", f"{MAP}element_stride.global.b1024.b32 [%rd0], 1000, %r0;",
    f"{MAP}global_address.global.b1024.b64 [%rd0];", f"{MAP}box_dim.global.b1024.b32 [%rd0], %r0;",
    f"{MAP}rank.global.b1024.b32 [%rd0], 0, %r0;",
    product(a="{%r8, %r9}", rest="%p0, 1, 1, 0"), product(a="{%r8, %r9, %r10, %r11, %r12}", rest="%p0, 1, 1, 0"),
    product(0, "{}"), product(12, many(6)), product(264, many(132)), product(rest="%p0, 2, 1, 0, 0"),
    product(rest="%p0, 1, 0, 0, 0"), product(rest="%p0, 1, 1, 2, 0"), product(rest="%p0, 1, 1, 0"),
])  # fmt: skip
def test_forms_of_hopper(line):
    with pytest.raises(Unsupported, match=r"ptxsim: line \d+"):
        decode(line)


def plain(lines=(), count=1, head=()):
    return Kernel(kernel_text([*lines], [*HEAD, *head], [(f"x{i}", "u64") for i in range(count)]))


@pytest.mark.parametrize(("option", "value", "wanted"), [
    ("resident", 0, "an integer from 1"), ("resident", -1, "an integer from 1"), ("resident", 2**31, "an integer from 1"),
    ("seed", -1, "an integer from 0"), ("seed", 1.5, "an integer from 0"), ("seed", 2**64, "an integer from 0"),
    ("late", "no", "True or False"), ("check", None, "True or False"),
])  # fmt: skip
def test_options(option, value, wanted):
    with pytest.raises(ValueError, match=f"k: {option} must be {wanted}.*, found {value!r}"):
        plain().launch((1,), (32,), [torch.zeros(1)], **{option: value})


@pytest.mark.parametrize(("grid", "block", "wanted"), [
    ((1, 65536), (32,), "the grid must be"), ((1, 1, 65536), (32,), "the grid must be"), ((2**31,), (32,), "the grid must be"),
    ((0,), (32,), "the grid must be"), ((1,), (1, 1, 65), "the block must be"), ((1,), (2048,), "1 to 1024 threads"),
    ((1,), (-1, -1), "the block must be"),
])  # fmt: skip
def test_limits_of_a_launch(grid, block, wanted):
    with pytest.raises(ValueError, match=rf"k: .*{wanted}.*, found \["):
        plain().launch(grid, block, [torch.zeros(1)])


def test_shared_memory_of_a_block():
    kernel = plain(["mov.u32 %r0, held;"], head=[".shared .align 16 .b8 held[1024];"])
    kernel.launch((1,), (32,), [torch.zeros(1)], shared=162 * 1024)
    for shared in (162 * 1024 + 1, -1):
        with pytest.raises(ValueError, match=rf"k: shared memory must be 0 to 166912 bytes .*, found {shared} and 1024 static"):
            plain(["mov.u32 %r0, held;"], head=[".shared .align 16 .b8 held[1024];"]).launch(
                (1,), (32,), [torch.zeros(1)], shared=shared
            )


def test_two_arguments_from_one_address():
    """The longer one counts, whichever comes first, and what may be written of either may be
    written."""
    read = ["ld.param.u64 %rd0, [x0];", "ld.param.u64 %rd1, [x1];", "ld.global.f32 %f0, [%rd0+28];",
            "st.global.f32 [%rd1], %f0;"]  # fmt: skip
    w = torch.arange(8.0)
    for args in ([w[:3], w], [w, w[:3]]):
        w[0] = 0
        plain(read, 2).launch((1,), (1,), args, [w[:1]])
        assert w[0] == 7
