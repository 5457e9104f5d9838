"""Variables of a module with their initial values, and functions that are called: PTX ISA 5.4,
7.1."""

import re

import numpy as np
import pytest
import torch

from lora_kernels.ptxsim import Kernel, SimulationError, Unsupported
from tests.ptxsim.lanes import kernel_text

VARIABLES = """.const .align 4 .f32 factors[4] = {0f3F800000, 0f40000000, 0fC0400000};
.global .align 4 .u32 counter = 5;
.visible .global .align 8 .b8 table[12] = {1, 0, 0, 0, 0x02, 0, 0, 0, 3};
.global .align 8 .u64 pointers[2] = {generic(table)+4, counter};
.global .s16 signed[2][2] = {{-1, 2}, {-3, 4U}};
.global .f64 wide = 0d4000000000000000;
.global .texref picture;
.global .align 1 .b8 pointing[8] = {0xFF(generic(table)), 0, 0, 0, 0, 0, 0, 0};
"""


def kernel(lines, variables=VARIABLES, head=()):
    """`lines` see %t the thread, %y the tensor's address and %at that of this thread's element."""
    registers = [".reg .b32 %t, %r<8>; .reg .b64 %y, %at, %d<8>; .reg .f32 %f<4>; .reg .b16 %h<4>; .reg .pred %p<2>;", *head]
    start = ["mov.u32 %t, %tid.x;", "ld.param.u64 %y, [y];", "mad.wide.u32 %at, %t, 4, %y;"]
    return Kernel(kernel_text([*start, *lines], registers, [("y", "u64")]).replace(".visible", variables + ".visible", 1))


def run(lines, threads=4, y=None, **options):
    y = torch.zeros(threads, dtype=torch.int32) if y is None else y
    made = kernel(lines).launch((1,), (threads,), [y], [y], **options)
    return y, made


def test_constants():
    lines = ["mov.u64 %d0, factors;", "mad.wide.u32 %d1, %t, 4, %d0;", "ld.const.f32 %f0, [%d1];",
             "ld.const.f32 %f1, [factors+4];", "add.f32 %f0, %f0, %f1;", "st.global.f32 [%at], %f0;"]  # fmt: skip
    y, made = run(lines, y=torch.zeros(4))
    assert y.tolist() == [3, 4, -1, 2]  # what has no initial value is zero
    assert made.counters["load_sectors"] == 0  # they come through a cache of their own
    lines[1:3] = ["cvta.const.u64 %d0, %d0;", "mad.wide.u32 %d1, %t, 4, %d0;", "ld.f32 %f0, [%d1];"]
    assert run(lines, y=torch.zeros(4))[0].tolist() == [3, 4, -1, 2]


def test_each_launch_begins_anew():
    made = kernel(["atom.global.add.u32 %r0, [counter], 1;", "st.global.u32 [%at], %r0;"])
    for _ in range(2):
        y = torch.zeros(4, dtype=torch.int32)
        made.launch((1,), (4,), [y], [y])
        assert y.tolist() == [5, 6, 7, 8]


def test_addresses_types_and_what_is_not_there():
    lines = ["mov.u64 %d0, pointers;", "ld.global.u64 %d1, [%d0];", "ld.u32 %r0, [%d1];", "ld.global.u64 %d1, [pointers+8];",
             "ld.u32 %r1, [%d1];", "ld.global.s16 %r2, [signed+4];", "ld.global.f64 %d2, [wide];", "cvt.rzi.s32.f64 %r3, %d2;",
             "ld.global.u32 %r4, [table+8];", "mad.lo.s32 %r0, %r0, 10, %r1;", "mad.lo.s32 %r0, %r0, 10, %r2;",
             "mad.lo.s32 %r0, %r0, 10, %r3;", "mad.lo.s32 %r0, %r0, 10, %r4;", "st.global.u32 [%at], %r0;"]  # fmt: skip
    assert run(lines)[0].tolist() == [(((2 * 10 + 5) * 10 - 3) * 10 + 2) * 10 + 3] * 4
    with pytest.raises(Unsupported, match=r"line \d+: the operand picture"):
        run(["mov.u64 %d0, picture;"])
    with pytest.raises(Unsupported, match=r"line 11: the initial value 0xFF\(generic\(table\)\) of pointing"):
        run(["mov.u64 %d0, pointing;"])


@pytest.mark.parametrize(("line", "message"), [
    ("ld.global.u32 %r0, [table+12];", r"ld: out of bounds, table\+12 of 12 bytes"),
    ("ld.global.u32 %r0, [counter+-4];", r"ld: out of bounds, counter-4 of 4 bytes"),
    ("ld.const.f32 %f0, [factors+16];", r"ld: out of bounds, factors\+16 of 16 bytes"),
    ("ld.const.f32 %f0, [factors+2];", r"ld: misaligned address, factors\+2"),
    ("st.global.u32 [factors], %t;", r"st: writes factors, which is read only"),
    ("st.global.u32 [table], %t;", r"st: race on table\+0 with a write"),
])  # fmt: skip
def test_what_is_found(line, message):
    with pytest.raises(SimulationError, match=message):
        run([line])


FUNCTIONS = """.func (.param .b32 got) half_of(.param .b32 n);
.visible .func (.param .b32 got) half_of(.param .b32 n)
{
  .reg .b32 %r<3>; .reg .pred %p;
  ld.param.u32 %r0, [n];
  and.b32 %r1, %r0, 1;
  setp.eq.u32 %p, %r1, 0;
  @%p bra $EVEN;
  mov.u32 %r2, 99;
  st.param.b32 [got+0], %r2;
  ret;
$EVEN:
  shr.u32 %r1, %r0, 1;
  st.param.b32 [got+0], %r1;
  ret;
}
.func put(.param .b64 at, .param .align 8 .b8 pair[16])
{
  .reg .b64 %d<2>; .reg .b32 %r<3>;
  ld.param.u64 %d0, [at];
  ld.param.v2.u32 {%r0, %r1}, [pair+8];
  {
    .param .b32 a; .param .b32 b;
    st.param.u32 [a], %r0;
    call.uni (b), half_of, (a);
    ld.param.u32 %r2, [b];
  }
  add.u32 %r0, %r2, %r1;
  st.u32 [%d0], %r0;
  ret;
}
.func again(.param .b32 n) { .param .b32 a; call again, (a); ret; }
.extern .func elsewhere(.param .b32 n);
.extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e);
.global .align 1 .b8 said[6] = {120, 32, 62, 32, 48};
.global .align 1 .b8 file[5] = {97, 46, 99, 117};
"""
CALL = [
    "{ .param .b32 q; .param .b32 r;", "st.param.b32 [q+0], %t;", "call (r), half_of, (q);", "ld.param.b32 %r0, [r+0];", "}",
]  # fmt: skip


def test_functions():
    y = torch.zeros(8, dtype=torch.int32)
    # called twice by lanes that part ways in it, and from another function
    lines = [*CALL, "mov.u32 %r1, %r0;", *[line.replace("%t", "%r1") for line in CALL], "setp.lt.u32 %p0, %t, 6;",
             "{ .param .b64 q; .param .align 8 .b8 r[16];", "st.param.b64 [q], %at;", "st.param.v2.b32 [r+8], {%r0, %t};",
             "@%p0 call put, (q, r);", "}"]  # fmt: skip
    kernel(lines, FUNCTIONS).launch((1,), (8,), [y], [y])

    def half(n):
        return 99 if n % 2 else n // 2

    assert y.tolist() == [half(half(half(t))) + t if t < 6 else 0 for t in range(8)]


@pytest.mark.parametrize(("lines", "message"), [
    (["{ .param .b32 q;", "call again, (q);", "}"], "the call of again"),
    (["{ .param .b32 q;", "call elsewhere, (q);", "}"], "call elsewhere"),
    (["{ .param .b32 q;", "call half_of, (q);", "}"], "the call of half_of"),
    (["call %d0, (%r0), prototype;"], "call %d0"),
])  # fmt: skip
def test_calls_that_are_not_known(lines, message):
    with pytest.raises(Unsupported, match=rf"line \d+: {message}"):
        kernel(lines, FUNCTIONS)


def test_an_assertion_names_what_it_says():
    lines = ["setp.ne.u32 %p0, %t, 3;", "@%p0 bra $FINE;", "{", ".param .b64 p0; .param .b64 p1; .param .b32 p2;",
             ".param .b64 p3; .param .b64 p4;", "mov.u64 %d0, said;", "cvta.global.u64 %d1, %d0;", "st.param.b64 [p0], %d1;",
             "mov.u64 %d0, file;", "cvta.global.u64 %d1, %d0;", "st.param.b64 [p1], %d1;", "st.param.b32 [p2], 12;",
             "call.uni __assertfail, (p0, p1, p2, p3, p4);", "}", "$FINE:", "st.global.u32 [%at], %t;"]  # fmt: skip
    y = torch.zeros(4, dtype=torch.int32)
    made = kernel(lines, FUNCTIONS).launch((1,), (4,), [y], [y], tolerant=True)
    assert len(made.errors) == 1 and y.tolist() == [0, 1, 2, 0]
    assert re.search(r"PTX line \d+, .* lane 3: assertion failed: x > 0, a\.cu:12$", made.errors[0])
    np.testing.assert_array_equal(y.numpy()[:3], np.arange(3))
