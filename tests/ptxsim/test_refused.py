"""Forms, launches and options that no GPU would take are refused before anything runs."""

import pytest
import torch

from lora_kernels.testing.ptxsim import Kernel, TensorMap, Unsupported
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
