"""Loads, stores, atomics and addresses against what PTX ISA 9.7.9 and 9.7.13 say, and what they are
counted as."""

from operator import add, and_, or_, xor

import numpy as np
import pytest
import torch

from lora_kernels.ptxsim import Kernel
from tests.ptxsim.lanes import kernel_text, run_lanes

U32 = np.arange(32, dtype=np.uint32)


def run(lines, x, y, registers=(), threads=32, grid=1, **options):
    """`lines` see %t the thread, %x and %y the tensors' addresses, %r, %s, %f, %d registers of 32,
    16, 32 and 64 bits."""
    head = [".reg .b32 %t, %r<16>; .reg .b16 %s<8>; .reg .f32 %f<8>; .reg .b64 %x, %y, %d<8>; .reg .pred %p<4>;", *registers]
    body = ["mov.u32 %t, %tid.x;", "ld.param.u64 %x, [x];", "ld.param.u64 %y, [y];", *lines]
    kernel = Kernel(kernel_text(body, head, [("x", "u64"), ("y", "u64")]))
    return kernel.launch((grid,), (threads,), [x, y], [y], **options)


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32", "u64"])
def test_loads_extend_to_the_register(kind):
    dtype = np.dtype({"u": "u", "s": "i"}[kind[0]] + str(int(kind[1:]) // 8))
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 32 * 8, dtype=np.uint8))
    wide = "d0" if kind == "u64" else "r0"
    y = torch.zeros(32, dtype=torch.int64)
    size = dtype.itemsize
    run(
        [f"mad.wide.u32 %d2, %t, {size}, %x;", "mad.wide.u32 %d3, %t, 8, %y;", f"ld.global.{kind} %{wide}, [%d2];",
         f"cvt.s64.{kind if size == 8 else kind[0] + '32'} %d1, %{wide};", "st.global.u64 [%d3], %d1;"],
        x, y,
    )  # fmt: skip
    np.testing.assert_array_equal(y.numpy(), x.numpy()[: 32 * size].view(dtype).astype(np.int64))


def test_vectors_and_narrow_stores():
    x, y = torch.arange(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    done = run(
        ["mad.wide.u32 %d0, %t, 16, %x;", "mad.wide.u32 %d1, %t, 16, %y;",
         "ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r0, _, %r2, %r3}, [%d0];", "st.global.v2.b32 [%d1], {%r3, %r2};",
         "cvt.u16.u32 %s0, %r0;", "st.global.b16 [%d1+10], %s0;", "st.global.u8 [%d1+15], 7;"],
        x, y,
    )  # fmt: skip
    rows = x[:128].view(32, 4)
    wanted = torch.stack([rows[:, 3], rows[:, 2], rows[:, 0] << 16, torch.full((32,), 7 << 24)], 1)
    assert torch.equal(y[:128].view(32, 4), wanted.int())
    assert done.counters["load_bytes"] == 512 and done.counters["load_sectors"] == 16 and done.counters["load_requests"] == 1
    assert done.counters["store_bytes"] == 32 * (8 + 2 + 1) and done.counters["store_sectors"] == 3 * 16


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1), (128, 32)])
def test_sectors(stride, sectors):
    x, y = torch.zeros(2048), torch.zeros(1)
    lines = [f"mad.wide.u32 %d0, %t, {stride}, %x;", "ld.global.f32 %f0, [%d0];"]
    assert run(lines, x, y).counters["load_sectors"] == sectors
    trace = np.frombuffer(run(lines, x, y, trace=True).trace, np.uint64)
    assert len(trace) == sectors and not (trace & 1).any()


ATOMICS = {
    "add.u32": (np.uint32, add), "add.u64": (np.uint64, add), "add.f32": (np.float32, add), "add.f64": (np.float64, add),
    "min.s32": (np.int32, min), "max.s32": (np.int32, max), "min.u32": (np.uint32, min), "max.u32": (np.uint32, max),
    "and.b32": (np.uint32, and_), "or.b32": (np.uint32, or_), "xor.b32": (np.uint32, xor),
    "exch.b32": (np.uint32, lambda x, y: y), "exch.b64": (np.uint64, lambda x, y: y), "and.b64": (np.uint64, and_),
    "or.b64": (np.uint64, or_), "xor.b64": (np.uint64, xor), "add.s32": (np.int32, add), "add.s64": (np.int64, add),
    "min.s64": (np.int64, min), "max.s64": (np.int64, max), "min.u64": (np.uint64, min), "max.u64": (np.uint64, max),
    "inc.u32": (np.uint32, lambda x, y: 0 if x >= y else x + 1),
    "dec.u32": (np.uint32, lambda x, y: y if x == 0 or x > y else x - 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ATOMICS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(name, space):
    dtype, function = ATOMICS[name]
    values = np.random.default_rng(1).integers(0, 9, 32).astype(dtype)
    bits = values.itemsize * 8
    place = "[%x]" if space == "global" else "[cell]"
    lines = [f".reg .b{bits} %v, %old; .reg .b64 %x;"]
    if space == "global":
        lines += ["ld.param.u64 %x, [p1];"]
    else:
        lines += [".shared .align 8 .b8 cell[8];", "setp.ne.u32 %q, %t, 0;"]
        lines += [f"@!%q st.shared.b{bits} [cell], 0;", "bar.sync 0;"]
    lines += [f"atom.{space}.{name} %out, {place}, %a;"]
    # lanes in order: each gets what those before it left
    total, before = dtype(0), []
    for v in values:
        before.append(total)
        with np.errstate(all="ignore"):
            total = dtype(function(total, v))
    if space == "shared":
        found = run_lanes([".reg .pred %q;", *lines], [values], dtype)
        np.testing.assert_array_equal(found, np.array(before, dtype))
        return
    x, y = torch.from_numpy(values.view(np.uint8).copy()), torch.zeros(8 + 32 * 8, dtype=torch.uint8)
    step = bits // 8
    done = run(
        [f".reg .b{bits} %v, %old;", f"mad.wide.u32 %d0, %t, {step}, %x;", f"ld.global.b{bits} %v, [%d0];",
         f"atom.global.gpu.relaxed.{name} %old, [%y], %v;", f"mad.wide.u32 %d1, %t, {step}, %y;",
         f"st.global.b{bits} [%d1+8], %old;"],
        x, y,
    )  # fmt: skip
    assert done.counters["atomics"] == 32
    np.testing.assert_array_equal(y.numpy()[:step].view(dtype)[0], total)
    np.testing.assert_array_equal(y.numpy()[8 : 8 + 32 * step].view(dtype), np.array(before, dtype))
    if "exch" in name:  # red has none
        return
    y = torch.zeros(8, dtype=torch.uint8)
    run([f".reg .b{bits} %v;", f"mad.wide.u32 %d0, %t, {step}, %x;", f"ld.global.b{bits} %v, [%d0];",
         f"red.global.{name} [%y], %v;"], x, y)  # fmt: skip
    np.testing.assert_array_equal(y.numpy()[:step].view(dtype)[0], total)


def test_compare_and_swap_and_halves():
    y = torch.zeros(8, dtype=torch.int32)
    run(["add.u32 %r0, %t, 1;", "atom.global.cas.b32 %r1, [%y], %t, %r0;"], torch.zeros(1), y)
    assert y[0] == 32
    y = torch.zeros(4, dtype=torch.bfloat16)
    one = torch.tensor([1.0, 2.0]).bfloat16().view(torch.int32).item()
    run([f"mov.u32 %r0, {one};", "red.global.add.noftz.bf16x2 [%y], %r0;"], torch.zeros(1), y)
    assert y.tolist() == [32, 64, 0, 0]
    y = torch.zeros(4, dtype=torch.float16)
    one = torch.tensor([1.0, 2.0]).half().view(torch.int32).item()
    run([f"mov.u32 %r0, {one};", "red.global.add.noftz.f16x2 [%y], %r0;"], torch.zeros(1), y)
    assert y.tolist() == [32, 64, 0, 0]


def test_compare_and_swap_of_other_widths():
    y = torch.zeros(8, dtype=torch.int64)
    run(["cvt.u64.u32 %d0, %t;", "add.u64 %d1, %d0, 1;", "atom.global.cas.b64 %d2, [%y], %d0, %d1;"], torch.zeros(1), y)
    assert y[0] == 32
    y = torch.zeros(8, dtype=torch.int16)
    run(["cvt.u16.u32 %s0, %t;", "add.u16 %s1, %s0, 1;", "atom.global.cas.b16 %s2, [%y], %s0, %s1;"], torch.zeros(1), y)
    assert y[0] == 32


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_atomic_sums_of_halves(kind, dtype):
    one = torch.ones(1, dtype=dtype).view(torch.int16).item()
    for opcode in ("atom", "red"):
        y = torch.zeros(4, dtype=dtype)
        result = "%s1, " if opcode == "atom" else ""
        run([f"mov.b16 %s0, {one};", f"{opcode}.global.add.noftz.{kind} {result}[%y+2], %s0;"], torch.zeros(1), y)
        assert y.tolist() == [0, 32, 0, 0]
        y, pair = torch.zeros(4, dtype=dtype), one | one << 16
        result = "%r1, " if opcode == "atom" else ""
        run([f"mov.b32 %r0, {pair};", f"{opcode}.global.add.noftz.{kind}x2 {result}[%y+4], %r0;"], torch.zeros(1), y)
        assert y.tolist() == [0, 0, 32, 32]


def test_what_only_matters_to_other_launches_is_passed_over():
    y = torch.zeros(32)
    run(["griddepcontrol.wait;", "nanosleep.u32 20;", "membar.cta;", "fence.proxy.async;", "prefetch.global.L2 [%x];",
         "mad.wide.u32 %d0, %t, 4, %y;", "mov.f32 %f0, 0f3F800000;", "griddepcontrol.launch_dependents;",
         "st.global.f32 [%d0], %f0;"], torch.zeros(1), y)  # fmt: skip
    assert (y == 1).all()


def test_local_memory_and_generic_addresses():
    y = torch.zeros(64, dtype=torch.int32)
    run(
        ["mov.u64 %d0, depot;", "cvta.local.u64 %d1, %d0;", "st.local.u32 [%d0+4], %t;", "ld.u32 %r0, [%d1+4];",
         "mov.u32 %r1, box;", "cvt.u64.u32 %d2, %r1;", "cvta.shared.u64 %d3, %d2;", "mad.wide.u32 %d4, %t, 4, %d3;",
         "st.u32 [%d4], %r0;", "cvta.to.shared.u64 %d5, %d4;", "cvt.u32.u64 %r2, %d5;", "ld.shared.u32 %r3, [%r2];",
         "mad.wide.u32 %d6, %t, 4, %y;", "cvta.to.global.u64 %d6, %d6;", "st.u32 [%d6], %r3;"],
        torch.zeros(1), y, [".local .align 4 .b8 depot[8];", ".shared .align 4 .b8 box[256];"], threads=64,
    )  # fmt: skip
    assert y.tolist() == list(range(64))


def test_structs_as_parameters():
    text = """.version 8.8
.target sm_80
.address_size 64
.visible .entry k(
  .param .align 8 .b8 both[24],
  .param .u32 n
)
{
  .reg .b64 %d<3>; .reg .b32 %r<4>;
  ld.param.u64 %d0, [both+8];
  ld.param.v2.u32 {%r0, %r1}, [both+16];
  ld.param.u32 %r2, [n];
  add.u32 %r0, %r0, %r1; add.u32 %r0, %r0, %r2;
  st.global.u32 [%d0], %r0;
}
"""
    y = torch.zeros(1, dtype=torch.int32)
    words = np.array([1, y.data_ptr(), 30 | 10 << 32], np.uint64).tobytes()
    Kernel(text).launch((1,), (1,), [words, 2], [y])
    assert y.item() == 42


def test_divergence_and_loops():
    # the length of Collatz's sequence: every lane its own number of rounds
    lines = [
        ".reg .pred %q, %even; .reg .b32 %n, %h;", "add.u32 %n, %a, 1;", "mov.u32 %out, 0;", "$LOOP:", "setp.eq.u32 %q, %n, 1;",
        "@%q bra $DONE;", "add.u32 %out, %out, 1;", "and.b32 %h, %n, 1;", "setp.eq.u32 %even, %h, 0;", "@%even bra $EVEN;",
        "mad.lo.u32 %n, %n, 3, 1;", "bra.uni $LOOP;", "$EVEN:", "shr.u32 %n, %n, 1;", "bra $LOOP;", "$DONE:",
    ]  # fmt: skip

    def length(n):
        return 0 if n == 1 else 1 + length(n // 2 if n % 2 == 0 else 3 * n + 1)

    np.testing.assert_array_equal(run_lanes(lines, [U32], np.uint32), [length(n + 1) for n in range(32)])


def test_scopes_have_registers_of_their_own():
    lines = ["{", ".reg .b32 %z;", "add.u32 %z, %a, 1;", "{ .reg .b32 %z; mov.u32 %z, 7; add.u32 %out, %z, %a; }",
             "add.u32 %out, %out, %z;", "}"]  # fmt: skip
    np.testing.assert_array_equal(run_lanes(lines, [U32], np.uint32), 2 * U32 + 8)


def test_special_registers():
    y = torch.zeros(2 * 3 * 4, 40, 8, dtype=torch.int32)
    names = ["%tid.x", "%tid.y", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%laneid", "%warpid"]
    body = [
        "ld.param.u64 %d, [y];", "mov.u32 %r, %ctaid.z;", "mov.u32 %s, %nctaid.y;", "mov.u32 %u, %ctaid.y;",
        "mad.lo.u32 %r, %r, %s, %u;", "mov.u32 %s, %nctaid.x;", "mov.u32 %u, %ctaid.x;", "mad.lo.u32 %r, %r, %s, %u;",
        "mad.wide.u32 %d, %r, 1280, %d;", "mov.u32 %s, %tid.y;", "mov.u32 %u, %tid.x;", "mad.lo.u32 %s, %s, 20, %u;",
        "mad.wide.u32 %d, %s, 32, %d;",
    ]  # fmt: skip
    for i, name in enumerate(names):
        body += [f"mov.u32 %r, {name};", f"st.global.u32 [%d+{4 * i}], %r;"]
    text = kernel_text(body, [".reg .b32 %r, %s, %u; .reg .b64 %d;"], [("y", "u64")])
    Kernel(text).launch((2, 3, 4), (20, 2), [y], [y])
    block, thread = torch.arange(24).view(-1, 1), torch.arange(40).view(1, -1)
    wanted = [thread % 20, thread // 20, 20, block % 2, block // 2 % 3, block // 6, thread % 32, thread // 32]
    for i, each in enumerate(wanted):
        assert (y[..., i] == each).all(), names[i]


SHUFFLES = {
    "up": lambda i, b: (i - b, i - b >= 0), "down": lambda i, b: (i + b, i + b <= 31), "bfly": lambda i, b: (i ^ b, True),
    "idx": lambda i, b: (b, True),
}  # fmt: skip


@pytest.mark.parametrize("mode", SHUFFLES)
@pytest.mark.parametrize("by", [0, 1, 5, 16])
def test_shuffles(mode, by):
    clamp = 0 if mode == "up" else 31
    x = np.random.default_rng(2).integers(0, 2**32, 32).astype(np.uint32)
    source = [SHUFFLES[mode](i, by) for i in range(32)]
    wanted = [x[j] if inside else x[i] for i, (j, inside) in enumerate(source)]
    found = run_lanes([f"shfl.sync.{mode}.b32 %out, %a, {by}, {clamp}, 0xffffffff;"], [x], np.uint32)
    np.testing.assert_array_equal(found, np.array(wanted, np.uint32))
    lines = [".reg .pred %q;", f"shfl.sync.{mode}.b32 %out|%q, %a, {by}, {clamp}, -1;", "selp.u32 %out, 1, 0, %q;"]
    np.testing.assert_array_equal(run_lanes(lines, [x], np.uint32), [inside for _, inside in source])


def test_shuffles_in_segments():
    found = run_lanes(["shfl.sync.bfly.b32 %out, %a, 3, 0x181f, -1;"], [U32], np.uint32)
    np.testing.assert_array_equal(found, U32 ^ 3)
    found = run_lanes(["shfl.sync.idx.b32 %out, %a, 2, 0x181f, -1;"], [U32], np.uint32)
    np.testing.assert_array_equal(found, U32 // 8 * 8 + 2)


def test_votes_and_sums():
    lines = [".reg .pred %q, %v;", "setp.gt.u32 %q, %a, 20;"]
    ballot = np.full(32, sum(1 << i for i in range(21, 32)), np.uint32)
    np.testing.assert_array_equal(run_lanes([*lines, "vote.sync.ballot.b32 %out, %q, -1;"], [U32], np.uint32), ballot)
    for name, value in (("all", 0), ("any", 1), ("uni", 0)):
        text = [*lines, f"vote.sync.{name}.pred %v, %q, -1;", "selp.u32 %out, 1, 0, %v;"]
        np.testing.assert_array_equal(run_lanes(text, [U32], np.uint32), np.full(32, value))
    sums = {"add.u32": U32.sum(), "add.s32": U32.sum(), "max.u32": 31, "max.s32": 31, "min.s32": 0, "min.u32": 0}
    for name, value in {**sums, "xor.b32": 0, "or.b32": 31, "and.b32": 0}.items():
        found = run_lanes([f"redux.sync.{name} %out, %a, -1;"], [U32], np.uint32)
        np.testing.assert_array_equal(found, np.full(32, value))
    active = ["setp.lt.u32 %q, %a, 4;", "mov.u32 %out, 0;", "@!%q bra $S;", "activemask.b32 %out;", "$S:"]
    np.testing.assert_array_equal(run_lanes([".reg .pred %q;", *active], [U32], np.uint32), np.where(U32 < 4, 15, 0))
    elect = [".reg .pred %q; .reg .b32 %z;", "elect.sync %z|%q, -1;", "selp.u32 %out, 1, 0, %q;"]
    np.testing.assert_array_equal(run_lanes(elect, [U32], np.uint32), U32 == 0)


def test_dynamic_shared_memory_comes_after_the_static():
    text = kernel_text(
        ["mov.u32 %r, dyn;", "mov.u32 %s, fixed;", "st.shared.u32 [%r+252], %r;", "ld.shared.u32 %u, [%r+252];",
         "ld.param.u64 %d, [y];", "sub.u32 %u, %u, %s;", "st.global.u32 [%d], %u;"],
        [".reg .b32 %r, %s, %u; .reg .b64 %d;", ".shared .align 4 .b8 fixed[8];"], [("y", "u64")],
    ).replace(".visible", ".extern .shared .align 16 .b8 dyn[];\n.visible")  # fmt: skip
    y = torch.zeros(1, dtype=torch.int32)
    Kernel(text).launch((1,), (1,), [y], [y], shared=256)
    assert y.item() == 128
