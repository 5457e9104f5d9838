"""Every check of the simulator finds its planted bug, and passes the same kernel without it."""

import mmap
import re

import pytest
import torch

from lora_kernels.ptxsim import Kernel, SimulationError, Unsupported
from tests.ptxsim.lanes import kernel_text

HEAD = [
    ".reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %rd<16>; .reg .f32 %f<8>;",
    ".shared .align 16 .b8 buffer[4096];",
]
# %r0 thread, %r1 its 4 bytes in shared memory, %r2 block; %rd0 x, %rd1 y, %rd2 and %rd3 this
# thread's element of each
START = [
    "mov.u32 %r0, %tid.x;", "mov.u32 %r2, %ctaid.x;", "mov.u32 %r31, buffer;", "mad.lo.u32 %r1, %r0, 4, %r31;",
    "ld.param.u64 %rd0, [x];", "ld.param.u64 %rd1, [y];", "mad.wide.u32 %rd2, %r0, 4, %rd0;",
    "mad.wide.u32 %rd3, %r0, 4, %rd1;",
]  # fmt: skip


def launch(lines, x=None, y=None, threads=64, grid=1, body=START, head=(), **options):
    x = torch.arange(256, dtype=torch.float32) if x is None else x
    y = torch.zeros(256) if y is None else y
    text = kernel_text([*body, *lines], [*HEAD, *head], [("x", "u64"), ("y", "u64")])
    run = Kernel(text).launch((grid,), (threads,), [x, y], [y], **options)
    return y, run


def finds(message, lines, **more):
    more = {"shuffle": "seed" in more, **more}
    with pytest.raises(SimulationError, match=message) as caught:
        launch(lines, **more)
    assert re.search(r"PTX line \d+, block \(\d+, \d+, \d+\) warp \d+", str(caught.value))


LOAD, STORE = "ld.global.f32 %f0, [%rd2];", "st.global.f32 [%rd3], %f0;"


def test_a_clean_kernel_passes():
    y, run = launch([LOAD, STORE], threads=256)
    assert torch.equal(y, torch.arange(256.0)) and not run.errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ld.global.f32 %f0, [%rd2+784];", r"ld: out of bounds, x\+1024 of 1024 bytes"),
        ("ld.global.f32 %f0, [%rd2+-4];", r"ld: out of bounds, x-4 of 1024 bytes"),
        ("st.global.f32 [%rd3+784], %f0;", r"st: out of bounds, y\+1024 of 1024 bytes"),
        ("ld.global.f32 %f0, [%rd2+2];", r"ld: misaligned address, x\+2 of 1024 bytes for 4 bytes"),
        ("ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%rd2];", "ld: misaligned address, x.* for 16 bytes"),
        ("st.global.f32 [%rd2], %f0;", "st: writes x, which is read only"),
        ("atom.global.add.f32 %f0, [%rd2], %f0;", "atom: writes x, which is read only"),
        ("st.shared.f32 [%r1+3996], %f0;", r"st: shared memory out of bounds, 4096 \+ 4 of 4096 bytes"),
        ("st.shared.v2.f32 [%r1], {%f0, %f0};", "st: misaligned shared address 4"),
        ("ld.shared.f32 %f0, [%r1];", "ld at 0: reads shared memory that nobody wrote"),
    ],
)
def test_addresses(line, message):
    finds(message, ["mov.f32 %f0, 0f3F800000;", line])


def test_the_line_is_that_of_the_text():
    x, y = torch.zeros(4), torch.zeros(4)
    text = kernel_text([*START, LOAD], HEAD, [("x", "u64"), ("y", "u64")])
    line = next(i for i, each in enumerate(text.splitlines(), 1) if LOAD in each)
    with pytest.raises(SimulationError, match=rf"PTX line {line}, block \(0, 0, 0\) warp 0 lane 4: ld: out of bounds, x\+16"):
        Kernel(text).launch((1,), (5,), [x, y], [y])


TURNED = [LOAD, "st.shared.f32 [%r1], %f0;", "bar.sync 0;", "xor.b32 %r3, %r0, 63;", "mad.lo.u32 %r3, %r3, 4, %r31;",
          "ld.shared.f32 %f0, [%r3];", STORE]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_shared_race_between_warps(seed):
    y, _ = launch(TURNED, seed=seed)
    assert torch.equal(y[:64], torch.arange(64.0).flip(0))
    without = [line for line in TURNED if "bar.sync" not in line]
    finds("shared race with a (read|write) of warp|reads shared memory that nobody wrote", without, seed=seed)


def test_shared_write_after_read():
    # warp 0 reads what it wrote before the barrier, warp 1 writes there
    half = ["setp.lt.u32 %p0, %r0, 32;", "@%p0 st.shared.f32 [%r1], %f0;", "bar.sync 0;"]
    lines = [LOAD, *half, "@%p0 ld.shared.f32 %f1, [%r1];", "@!%p0 st.shared.f32 [%r1+-128], %f0;"]
    found = [launch(lines, seed=seed, tolerant=True)[1].errors[0] for seed in range(12)]
    assert any("ld at" in each and "race with a write of warp 1" in each for each in found)
    assert any("st at" in each and "race with a read of warp 0" in each for each in found)
    launch([*lines[:-1], "bar.sync 0;", lines[-1]])


def test_shared_race_within_a_warp():
    lines = [line.replace("63", "31").replace("bar.sync 0;", "bar.warp.sync 0xffffffff;") for line in TURNED]
    y, _ = launch(lines, threads=32)
    assert torch.equal(y[:32], torch.arange(32.0).flip(0))
    finds("shared race with a write of warp 0 lane", [line for line in lines if "bar" not in line], threads=32)


def test_two_writes_of_one_place():
    lines = ["cvt.rn.f32.u32 %f0, %r0;", "st.shared.f32 [buffer], %f0;"]
    finds("shared race with a write of warp", lines)
    launch(["mov.f32 %f0, 0f3F800000;", lines[1]])  # the same value: Triton does this


def named(first, second):
    """Warps 0 and 1 pass a value on at barrier `first`, warps 2 and 3 at `second`."""
    return [
        "shr.u32 %r4, %r0, 6;", "setp.eq.u32 %p0, %r4, 0;", LOAD, "st.shared.f32 [%r1], %f0;",
        "@%p0 bra $A;", f"bar.sync {second}, 64;", "bra $B;", "$A:", f"bar.sync {first}, 64;", "$B:",
        "xor.b32 %r3, %r0, 63;", "mad.lo.u32 %r3, %r3, 4, %r31;", "ld.shared.f32 %f0, [%r3];", STORE,
    ]  # fmt: skip


def test_named_barriers():
    y, _ = launch(named(1, 2), threads=128)
    assert torch.equal(y[:128], torch.arange(128.0).view(2, 64).flip(1).reshape(-1))
    crossed = [line.replace("63", "127") for line in named(1, 2)]  # reads what the other half wrote
    finds("shared race|nobody wrote", crossed, threads=128)


def test_arrive_and_sync():
    # warp 0 makes, warp 1 waits for it
    lines = [
        "setp.lt.u32 %p0, %r0, 32;", "@%p0 bra $MAKE;", "bar.sync 3, 64;", "ld.shared.f32 %f0, [%r1+-128];", STORE, "ret;",
        "$MAKE:", LOAD, "st.shared.f32 [%r1], %f0;", "bar.arrive 3, 64;",
    ]  # fmt: skip
    y, _ = launch(lines)
    assert torch.equal(y[32:64], torch.arange(32.0))
    late = [*lines[:-2], "bar.arrive 3, 64;", "st.shared.f32 [%r1], %f0;"]
    finds("shared race|nobody wrote", late)


def test_barrier_divergence():
    skipped = ["setp.lt.u32 %p0, %r0, 7;", "@%p0 bra $S;", "bar.sync 0;", "$S:"]
    finds("bar: not all lanes of the warp are here", [*skipped, "bar.sync 1;"])
    launch(skipped)  # those that have ended are not waited for
    finds("bar: not all lanes", ["setp.lt.u32 %p0, %r0, 7;", "@%p0 bar.sync 0;"])


def test_deadlock():
    finds("deadlock: waits at barrier 1", ["setp.lt.u32 %p0, %r0, 32;", "@%p0 bra $S;", "bar.sync 1, 64;", "$S:"])
    # those that have ended are not waited for at a barrier of all
    launch(["setp.lt.u32 %p0, %r0, 32;", "@%p0 bra $S;", "bar.sync 0;", "$S:"])


COPY = ["mad.lo.u32 %r5, %r0, 16, %r31;", "mad.wide.u32 %rd4, %r0, 16, %rd0;",
        "cp.async.cg.shared.global [%r5], [%rd4], 16;", "cp.async.commit_group;"]  # fmt: skip
READ = ["ld.shared.f32 %f0, [%r5+4];", STORE]


@pytest.mark.parametrize("late", [True, False])
def test_copies_that_are_not_waited_for(late):
    y, _ = launch([*COPY, "cp.async.wait_group 0;", *READ], late=late)
    assert torch.equal(y[:64], torch.arange(64.0) * 4 + 1)
    finds("a cp.async into it has not been waited for", [*COPY, *READ], late=late)
    finds("a cp.async into it has not been waited for", [*COPY, "cp.async.wait_group 1;", *READ], late=late)
    # of two groups the second is still under way
    second = [line.replace("[%r5]", "[%r5+1024]") for line in COPY[2:]]
    launch([*COPY, *second, "cp.async.wait_group 1;", *READ], late=late)
    too_early = [*COPY, *second, "cp.async.wait_group 1;", READ[0].replace("+4", "+1028"), STORE]
    finds("has not been waited for", too_early, late=late)


def test_a_copy_is_its_own_threads_until_a_barrier():
    other = ["xor.b32 %r6, %r0, 32;", "mad.lo.u32 %r5, %r6, 16, %r31;", *READ]
    finds("nobody wrote|shared race with a write|has not been waited for", [*COPY, "cp.async.wait_all;", *other])
    launch([*COPY, "cp.async.wait_all;", "bar.sync 0;", *other])


def test_copies_cut_short():
    cut = ["mov.u32 %r7, 6;", COPY[0], COPY[1], "cp.async.ca.shared.global [%r5], [%rd4], 16, %r7;", "cp.async.wait_all;"]
    x = torch.arange(1, 257, dtype=torch.float32)
    y, _ = launch([*cut, "ld.shared.f32 %f0, [%r5+8];", STORE], x=x)
    assert (y == 0).all()
    finds("cp.async: out of bounds", [*cut, STORE], x=x[:200])


def test_memory_that_nobody_wrote():
    y = torch.zeros(256)
    launch([LOAD, STORE, "ld.global.f32 %f1, [%rd3];"], y=y, poisoned=[y])
    finds(r"ld reads y\+256, which nobody wrote", [LOAD, STORE, "ld.global.f32 %f1, [%rd3+256];"], y=y, poisoned=[y])


HISTOGRAM = [
    "setp.lt.u32 %p0, %r0, 8;", "mov.u32 %r3, 0;", "@%p0 st.shared.u32 [%r1], %r3;", "bar.sync 0;", "and.b32 %r4, %r0, 7;",
    "mad.lo.u32 %r5, %r4, 4, %r31;", "mov.u32 %r6, 1;", "atom.shared.add.u32 %r7, [%r5], %r6;", "bar.sync 0;",
    "@%p0 ld.shared.u32 %r8, [%r1];", "@%p0 st.global.u32 [%rd3], %r8;",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_atomics_and_plain_accesses(seed):
    y = torch.zeros(256, dtype=torch.int32)
    launch(HISTOGRAM, y=y, seed=seed, threads=128)
    assert y[:8].tolist() == [16] * 8
    for gone in (3, 8):
        lines = [line for i, line in enumerate(HISTOGRAM) if i != gone]
        finds("shared race|nobody wrote", lines, y=y, seed=seed, threads=128)
    finds("nobody wrote", HISTOGRAM[3:], y=y, seed=seed, threads=128, body=[*START, "setp.lt.u32 %p0, %r0, 8;"])
    add = "red.global.add.f32 [%rd3], %f0;"
    scratch = torch.zeros(256)
    finds("atom reads y.* nobody wrote", [LOAD, add], y=scratch, poisoned=[scratch], seed=seed)
    other = ["xor.b32 %r3, %r0, 32;", "mad.wide.u32 %rd4, %r3, 4, %rd1;", "ld.global.f32 %f1, [%rd4];"]
    finds("race on y", [LOAD, add, *other], seed=seed)
    launch([LOAD, add, "bar.sync 0;", *other], seed=seed)


def test_own_reads_are_no_race():
    # every warp reads all of it, then each thread changes its own
    lines = [
        LOAD, "st.shared.f32 [%r1], %f0;", "bar.sync 0;", *TURNED[3:6], "bar.sync 0;", "ld.shared.f32 %f1, [%r1];",
        "add.f32 %f1, %f1, %f0;", "st.shared.f32 [%r1], %f1;",
    ]  # fmt: skip
    for seed in range(4):
        launch(lines, seed=seed)
    # bytes of one word
    launch(["add.u32 %r3, %r0, %r31;", "st.shared.u8 [%r3], %r0;"], threads=128)


def test_early_exits():
    lines = ["setp.ge.u32 %p0, %r0, 40;", "@%p0 ret;", LOAD, "bar.sync 0;", "vote.sync.ballot.b32 %r3, %p0, 0xffffffff;", STORE]
    y, _ = launch(lines)
    assert torch.equal(y[:40], torch.arange(40.0)) and (y[40:] == 0).all()


def test_groups_with_masks_of_their_own():
    lines = [
        "setp.lt.u32 %p0, %r0, 16;", "selp.b32 %r3, 0xffff, 0xffff0000, %p0;", "redux.sync.add.u32 %r4, %r0, %r3;",
        "cvt.rn.f32.u32 %f0, %r4;", STORE,
    ]  # fmt: skip
    y, _ = launch(lines, threads=32)
    assert y[:32].tolist() == [120.0] * 16 + [376.0] * 16


def test_local_memory():
    head = [".local .align 4 .b8 own[8];"]
    finds("st: local memory out of bounds", ["mov.u64 %rd4, own;", "st.local.u32 [%rd4+-4], %r0;"], head=head)
    finds("st: local memory out of bounds", ["mov.u64 %rd4, own;", "st.local.u32 [%rd4+16], %r0;"], head=head)
    finds("st: misaligned local address", ["mov.u64 %rd4, own;", "st.local.u32 [%rd4+2], %r0;"], head=head)


def test_races_on_global_memory():
    shifted = "ld.global.f32 %f1, [%rd3+128];"
    finds("race on y", [LOAD, STORE, shifted])
    launch([LOAD, STORE, "bar.sync 0;", shifted])
    one = ["setp.eq.u32 %p0, %r0, 5;", "@%p0 st.global.f32 [%rd1], %f0;"]
    launch(["mov.f32 %f0, 0f00000000;", *one])
    finds("race on y.0 with a write of block", ["mov.f32 %f0, 0f00000000;", *one], grid=2)
    launch(["mov.f32 %f0, 0f3F800000;", "red.global.add.f32 [%rd1], %f0;"], grid=3)


def ticket(fences):
    """Each block leaves a value; the last one, which the counter y[255] tells, adds them up into
    y[100]."""
    fence = ["membar.gl;"] if fences else []
    return [
        "setp.ne.u32 %p0, %r0, 0;", "@%p0 bra $END;", "mad.wide.u32 %rd5, %r2, 4, %rd1;", "mov.f32 %f0, 0f3F800000;",
        "st.global.f32 [%rd5], %f0;", *fence, "mov.u32 %r8, 1;", "atom.global.add.u32 %r9, [%rd1+1020], %r8;",
        "setp.ne.u32 %p1, %r9, 3;", "@%p1 bra $END;", *fence, "mov.f32 %f1, 0f00000000;", "mov.u32 %r10, 0;", "$LOOP:",
        "mad.wide.u32 %rd6, %r10, 4, %rd1;", "ld.global.f32 %f2, [%rd6];", "add.f32 %f1, %f1, %f2;",
        "add.u32 %r10, %r10, 1;", "setp.lt.u32 %p2, %r10, 4;", "@%p2 bra $LOOP;", "st.global.f32 [%rd1+400], %f1;", "$END:",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_blocks_that_pass_values_on(seed):
    y, _ = launch(ticket(True), grid=4, threads=32, seed=seed)
    assert y[100] == 4
    finds("race on y", ticket(False), grid=4, threads=32, seed=seed)


def test_blocks_run_side_by_side():
    # block 1 waits in a loop for what block 0 writes
    lines = [
        "setp.ne.u32 %p0, %r0, 0;", "@%p0 bra $END;", "setp.eq.u32 %p1, %r2, 0;", "@%p1 bra $GIVE;", "$WAIT:",
        "ld.acquire.gpu.global.u32 %r11, [%rd1+1020];", "setp.eq.u32 %p2, %r11, 0;", "@%p2 bra $WAIT;",
        "ld.global.f32 %f0, [%rd1];", "st.global.f32 [%rd1+4], %f0;", "bra $END;", "$GIVE:", "mov.f32 %f0, 0f40400000;",
        "st.global.f32 [%rd1], %f0;", "mov.u32 %r11, 1;", "st.release.gpu.global.u32 [%rd1+1020], %r11;", "$END:",
    ]  # fmt: skip
    for seed in range(4):
        y, _ = launch(lines, grid=2, threads=32, seed=seed)
        assert y[1] == 3
    finds("race on y", [line.replace("st.release", "st.relaxed") for line in lines], grid=2, threads=32)


def test_results_that_depend_on_the_order_of_blocks():
    # the last block to come wins: a race by the check, and without it another result from another
    # seed
    lines = ["cvt.rn.f32.u32 %f0, %r2;", "setp.eq.u32 %p0, %r0, 0;", "@%p0 st.global.f32 [%rd1], %f0;"]
    finds("race on y", lines, grid=8)
    assert len({launch(lines, grid=8, threads=32, seed=seed, check=False)[0][0].item() for seed in range(8)}) > 1
    assert len({launch(lines, grid=8, threads=32, seed=3, check=False)[0][0].item() for _ in range(3)}) == 1


def test_32_bit_offsets_into_a_large_tensor():
    # 16 GiB of address space of which a page is touched: an offset in 32 bits wraps
    size = 1 << 34
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # no reserve
    large = torch.frombuffer(memory, dtype=torch.float32)
    body = [
        "mov.u32 %r0, %tid.x;", "ld.param.u64 %rd0, [x];", "ld.param.u64 %rd1, [y];", "mov.f32 %f0, 0f3F800000;",
        "add.u32 %r3, %r0, 3;", "mov.u32 %r4, 1073741824;",
    ]  # fmt: skip
    right = ["mul.wide.u32 %rd3, %r3, %r4;", "add.u64 %rd4, %rd1, %rd3;", "st.global.f32 [%rd4], %f0;"]
    wrong = ["mul.lo.u32 %r5, %r3, %r4;", "cvt.s64.s32 %rd3, %r5;", "add.u64 %rd4, %rd1, %rd3;", "st.global.f32 [%rd4], %f0;"]
    launch(right, y=large, threads=8, body=body)
    assert large[(3 << 30) // 4] == 1
    finds(r"st: out of bounds, y-1073741824 of 17179869184 bytes", wrong, y=large, threads=1, body=body)
    del large
    memory.close()


def test_lanes_that_are_not_here():
    shuffle = "shfl.sync.bfly.b32 %r3, %r0, 1, 31, 0xffffffff;"
    lines = ["setp.lt.u32 %p0, %r0, 7;", "@%p0 bra $S;", shuffle, "bra $E;", "$S:", "bar.warp.sync 127;", "bra $S;", "$E:"]
    with pytest.raises(SimulationError, match="shfl: lanes of its member mask are not here"):
        launch([*lines[:5], "bar.warp.sync 0xffffffff;", "$E:"], threads=32)
    # a lane outside of the mask that it names itself
    finds("vote: a lane is not in its own member mask", ["vote.sync.ballot.b32 %r3, %p1, 0xffff;"], threads=32)
    # lanes that are on their way are waited for
    late = ["setp.lt.u32 %p0, %r0, 7;", "@!%p0 bra $J;", "add.u32 %r4, %r0, 1;", "bra $B;", "$J:", shuffle, "bra $E;", "$B:",
            "add.u32 %r4, %r4, 1;", "bra $J;", "$E:"]  # fmt: skip
    launch(late, threads=32)
    finds("ldmatrix: not all lanes", ["setp.lt.u32 %p0, %r0, 7;", "@%p0 bra $S;",
          "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r31];", "$S:"], threads=32)  # fmt: skip


def test_what_is_not_known_names_its_line():
    for line in ("add.sat.u32 %r3, %r0, 1;", "tex.1d.v4.f32.s32 {%f0, %f0, %f0, %f0}, [x, {%r0}];", "add.rz.f16 %f0, %f0, 0;"):
        with pytest.raises(Unsupported, match=r"ptxsim: line \d+: the instruction"):
            launch([line])
    with pytest.raises(Unsupported, match=r"line \d+: %rd0 has 64 bits where 32 are wanted"):
        launch(["add.s32 %r3, %rd0, %r1;"])
    for line in (
        "cp.async.cg.shared.global [%r1], [%rd2], 8;", "bar.sync -1;", "bar.sync 1, 48;", "ld.global.v4.f32 {%f0}, [%rd2];",
        "setp.eq.u32 %p1;", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3}, [%r31];", "cvt.f32 %f0, %r0;",
        "atom.global.cas.b32 %r3, [%rd3], %r0;",
    ):  # fmt: skip
        with pytest.raises(Unsupported, match=r"ptxsim: line \d+"):
            launch([line])
    with pytest.raises(Unsupported, match=r"line \d+: there is no label \$NOWHERE"):
        launch(["bra $NOWHERE;"])


def test_arguments():
    kernel = Kernel(kernel_text(["ld.param.f32 %f0, [s];"], HEAD, [("x", "u64"), ("s", "f32")]))
    with pytest.raises(TypeError, match="s is .f32, found a tensor"):
        kernel.launch((1,), (32,), [torch.zeros(1), torch.zeros(1)])
    with pytest.raises(ValueError, match="2 parameters, found 3 arguments"):
        kernel.launch((1,), (32,), [torch.zeros(1), 1.0, 1])
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        kernel.launch((1,), (2048,), [torch.zeros(1), 1.0])
    with pytest.raises(ValueError, match="has no kernel other"):
        Kernel(kernel_text([], HEAD, []), "other")


