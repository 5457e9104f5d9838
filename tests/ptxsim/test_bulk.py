"""mbarrier, copies in bulk and maps of tensors: right bytes, and each planted bug found."""

import numpy as np
import pytest
import torch

from lora_kernels.ptxsim import Kernel, SimulationError, TensorMap
from tests.ptxsim.lanes import kernel_text

HEAD = [
    ".reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %rd<16>; .reg .f32 %f<8>;",
    ".shared .align 1024 .b8 buffer[16384]; .shared .align 8 .b64 full; .shared .align 8 .b64 other;",
]
# %p0 thread 0; %rd3 this thread's 4 bytes of y; %r1 the same of the buffer
START = [
    "mov.u32 %r0, %tid.x;", "setp.eq.u32 %p0, %r0, 0;", "mov.b64 %rd0, map;", "ld.param.u64 %rd1, [y];",
    "mad.wide.u32 %rd3, %r0, 4, %rd1;", "mov.u32 %r31, buffer;", "mad.lo.u32 %r1, %r0, 4, %r31;", "mov.u32 %r8, 0;",
]  # fmt: skip
INIT = ["@%p0 mbarrier.init.shared::cta.b64 [full], 1;", "bar.sync 0;"]
WAIT = ["$W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [full], %r8;", "@!%p1 bra $W;"]
OUT = ["ld.shared.f32 %f0, [%r1];", "st.global.f32 [%rd3], %f0;"]
FENCE, PARAMETERS = "fence.proxy.async.shared::cta;", [("align 64 .b8", "map[128]"), ("u64", "y")]


def expect(count):
    return f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {count};"


def load(at="0, 0", rank=2):
    return (
        f"@%p0 cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes [buffer], [%rd0, {{{at}}}], [full];"
    )


def launch(lines, tensor_map, y=None, threads=64, **options):
    y = torch.zeros(threads) if y is None else y
    parameters = [(name, kind) for kind, name in PARAMETERS]
    kernel = Kernel(kernel_text([*START, *lines], HEAD, parameters, "sm_90"))
    run = kernel.launch((1,), (threads,), [tensor_map, y], [y, tensor_map.tensor], **options)
    return y, run


def numbers(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


def clipped(x, at, box):
    """A box of x whose elements outside of x are zero."""
    wanted = np.zeros(box, x.dtype)
    for i in np.ndindex(*box):
        place = tuple(a + b for a, b in zip(at, i, strict=True))
        if all(0 <= p < n for p, n in zip(place, x.shape, strict=True)):
            wanted[i] = x[place]
    return wanted


def swizzled(rows, span):
    """The bytes of a box as they lie in shared memory: piece j of row r of 128 bytes at j xor r,
    over `span` bytes."""
    held = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
    if not span:
        return held
    pieces, out = held.reshape(-1, 16), np.empty(held.size, np.uint8).reshape(-1, 16)
    for i in range(len(pieces)):
        out[i ^ (i // 8 % (span // 16))] = pieces[i]
    return out.reshape(-1)


def test_maps_in_a_struct():
    """They lie at multiples of 64 bytes, which the struct's size is one of, too; y comes between
    them."""
    x, y = numbers(16, 16), torch.zeros(64)
    start = [line.replace("map;", "both;").replace("[y]", "[both + 8]") for line in START]
    lines = ["add.u64 %rd0, %rd0, 64;", *INIT, expect(256), load("8, 0"), *WAIT, *OUT]
    kernel = Kernel(kernel_text([*start, *lines], HEAD, [("both[256]", "align 64 .b8")], "sm_90"))
    args = (0.5, y, TensorMap(x, (8, 8)), 3)
    kernel.launch((1,), (64,), [args], [y])
    assert torch.equal(y.view(8, 8), x[:8, 8:])
    with pytest.raises(ValueError, match="has 256 bytes, found 192"):
        kernel.launch((1,), (64,), [args[2:]], [y])


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(("shape", "box", "at", "span"), [
    ((16, 16), (8, 8), (0, 0), 0), ((16, 16), (8, 8), (12, 12), 32), ((16, 16), (8, 16), (-3, -5), 64),
    ((20, 36), (8, 32), (3, 5), 128), ((5, 8, 12), (2, 4, 4), (4, 6, 8), 0), ((64,), (64,), (8,), 0),
    ((3, 3, 4, 8), (1, 2, 2, 8), (2, 2, 1, 0), 32), ((2, 3, 3, 4, 8), (1, 1, 2, 2, 8), (1, 0, 2, -1, 4), 0),
])  # fmt: skip
def test_a_box_of_a_tensor(shape, box, at, span, late):
    x, count = numbers(*shape), int(np.prod(box))
    lines = [*INIT, FENCE, expect(4 * count), load(", ".join(map(str, reversed(at))), len(shape)), *WAIT, *OUT]
    y, run = launch(lines, TensorMap(x, box, span), threads=count, late=late)
    assert y.numpy().tobytes() == swizzled(clipped(x.numpy(), at, box), span).tobytes()
    inside = np.count_nonzero(clipped(np.ones(shape, np.float32), at, box))
    assert run.counters["load_bytes"] == 4 * inside
    # and back: what lies outside is not written
    held = y.clone()
    back = torch.full(shape, 7.0)
    lines = [
        "ld.global.f32 %f0, [%rd3];", "st.shared.f32 [%r1], %f0;", FENCE, "bar.sync 0;",
        f"@%p0 cp.async.bulk.tensor.{len(shape)}d.global.shared::cta.bulk_group"
        f" [%rd0, {{{', '.join(map(str, reversed(at)))}}}], [buffer];",
        "@%p0 cp.async.bulk.commit_group;", "@%p0 cp.async.bulk.wait_group.read 0;",
    ]  # fmt: skip
    _, run = launch(lines, TensorMap(back, box, span), held, threads=count, late=late)
    wanted = torch.full(shape, 7.0)
    for i in np.ndindex(*box):
        place = tuple(a + b for a, b in zip(at, i, strict=True))
        if all(0 <= p < n for p, n in zip(place, shape, strict=True)):
            wanted[place] = x[place]
    assert torch.equal(back, wanted) and run.counters["store_bytes"] == 4 * inside


GOOD = [*INIT, FENCE, expect(256), load(), *WAIT, *OUT]
BARRIER_LATER = ["@%p0 mbarrier.init.shared::cta.b64 [full], 1;", "@!%p0 bra $W;", expect(256), load(), *WAIT, *OUT]
ONE_WAITS = [*INIT, expect(256), load(), "setp.ge.u32 %p2, %r0, 32;", "@%p2 bra $R;", *WAIT, "$R:", "bar.sync 1;", *OUT]
UNORDERED = [*INIT, expect(256), load(), "setp.ge.u32 %p2, %r0, 32;", "@%p2 bra $R;", *WAIT, "$R:", *OUT]


@pytest.mark.parametrize(("lines", "message"), [
    ([*INIT, expect(256), load(), *OUT], r"ld at \d+: a cp.async into it has not been waited for"),
    ([*INIT, expect(256), load()], "exit: a cp.async.bulk into shared memory has not been waited for"),
    (UNORDERED, "has not been waited for|shared race with a write of cp.async.bulk"),
    ([*INIT, expect(240), load(), *WAIT, *OUT], "deadlock: waits at an mbarrier"),
    ([*INIT, expect(512), load(), *WAIT, *OUT], "deadlock: waits at an mbarrier"),
    ([*INIT, expect(256), *WAIT, *OUT], "deadlock: waits at an mbarrier"),
    (BARRIER_LATER, "mbarrier.wait: there is no mbarrier at|race|nobody wrote"),
    ([*INIT, "@%p0 mbarrier.arrive.noComplete.shared::cta.b64 _, [full], 2;"], "mbarrier.arrive: 2 arrivals where 1 of 1 are"),
    (["@%p0 mbarrier.init.shared::cta.b64 [full], 0;"], "mbarrier.init: 0 arrivals"),
    ([*INIT, INIT[0]], "mbarrier.init: there is one at"),
    (["bar.sync 0;", "@%p0 mbarrier.inval.shared::cta.b64 [full];"], "nobody wrote|there is no mbarrier"),
    ([*INIT, "st.shared.f32 [%r1], %f0;", expect(256), load(), *WAIT, *OUT], "cp.async.bulk at .*: shared race with a write"),
    ([*GOOD, expect(256), load()], "cp.async.bulk at .*: shared race with a read of warp|ld at .*: a cp.async into it has not"),
])  # fmt: skip
def test_planted_bugs_of_loads(lines, message):
    launch(GOOD, TensorMap(numbers(16, 16), (8, 8)))
    with pytest.raises(SimulationError, match=message):
        found = []
        for seed in range(4):
            _, run = launch(lines, TensorMap(numbers(16, 16), (8, 8)), seed=seed, tolerant=True)
            found += run.errors
        raise SimulationError("\n".join(found))


def test_after_a_barrier_one_warp_may_wait_for_all():
    y, _ = launch(ONE_WAITS, TensorMap(numbers(16, 16), (8, 8)))
    assert torch.equal(y.view(8, 8), numbers(16, 16)[:8, :8])


SEND = ["cvt.rn.f32.u32 %f0, %r0;", "st.shared.f32 [%r1], %f0;"]
BULK = "@%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd0, {0, 0}], [buffer];"
COMMIT, DONE = "@%p0 cp.async.bulk.commit_group;", "@%p0 cp.async.bulk.wait_group 0;"


@pytest.mark.parametrize(("lines", "message"), [
    ([*SEND, "bar.sync 0;", BULK, COMMIT, DONE], "cp.async.bulk at .*: no fence.proxy.async after the write of warp"),
    ([*SEND, FENCE, BULK, COMMIT, DONE], "race with a write of warp|nobody wrote"),
    ([*SEND, FENCE, "bar.sync 0;", BULK, COMMIT], "exit: a cp.async.bulk out of shared memory has not been waited for"),
    ([*SEND, FENCE, "bar.sync 0;", BULK, DONE], "exit: a cp.async.bulk out of shared memory has not been waited for"),
    ([*SEND, FENCE, "bar.sync 0;", BULK, COMMIT, "bar.sync 0;", "st.shared.f32 [%r1], %f1;", DONE],
     "st at .*: a cp.async.bulk out of it has not been waited for"),
    ([*SEND, FENCE, "bar.sync 0;", BULK, COMMIT, DONE, "st.shared.f32 [%r1], %f1;"], "shared race with a read of warp 0"),
])  # fmt: skip
def test_planted_bugs_of_stores(lines, message):
    x = torch.zeros(8, 8)
    launch([*SEND, FENCE, "bar.sync 0;", BULK, COMMIT, DONE], TensorMap(x, (8, 8)))
    assert torch.equal(x, torch.arange(64.0).view(8, 8))
    found = [launch(lines, TensorMap(x, (8, 8)), seed=seed, tolerant=True)[1].errors for seed in range(4)]
    with pytest.raises(SimulationError, match=message):
        raise SimulationError("\n".join(sum(found, [])))


@pytest.mark.parametrize(("x", "box", "span", "message"), [
    (numbers(16, 16), (8, 6), 0, "a row of its box has 24 bytes, which must be a multiple of 16"),
    (numbers(16, 16), (8, 16), 32, "a row of its box has 64 bytes, its swizzle is of 32"),
    (numbers(16, 18), (8, 8), 0, "its strides must be multiples of 16 bytes"),
    (numbers(16, 17)[:, 1:], (8, 8), 0, "its address must be a multiple of 16 bytes"),
    (numbers(4, 16, 16), (1, 8, 8), 0, "the tensor has 3 dimensions"),
])  # fmt: skip
def test_maps_that_a_driver_would_refuse(x, box, span, message):
    with pytest.raises(SimulationError, match=message):
        launch([*INIT, expect(256), load(), *WAIT, *OUT], TensorMap(x, box, span))


def test_what_is_no_map():
    with pytest.raises(ValueError, match="the last one contiguous"):
        TensorMap(numbers(4, 4).T, (4, 4)).encoded()
    with pytest.raises(ValueError, match="swizzle must be one of"):
        TensorMap(numbers(4, 4), (4, 4), 16).encoded()
    for size in (0, 257, 70000):
        with pytest.raises(ValueError, match=rf"the sizes of the box must be 1 to 256, found \[4, {size}\]"):
            TensorMap(numbers(4, 4), (4, size)).encoded()
    with pytest.raises(ValueError, match="the type must be one of .*torch.float32.*, found torch.complex64"):
        TensorMap(numbers(4, 4, dtype=torch.complex64), (4, 4)).encoded()
    with pytest.raises(SimulationError, match="tensor map: there is none"):
        x = TensorMap(numbers(16, 16), (8, 8))
        launch(["mov.b64 %rd0, %rd1;", *GOOD], x, torch.zeros(64))
    with pytest.raises(SimulationError, match=r"cp.async.bulk: misaligned shared address \d+"):
        launch([*INIT, expect(256), load().replace("[buffer]", "[buffer+64]"), *WAIT], TensorMap(numbers(16, 16), (8, 8)))


@pytest.mark.parametrize("lines", [
    [load("0, 0, 0, 0, 0", 5)], [load("0, 0, 0, 0, 0", 5).replace("shared::cta.global.mbarrier::complete_tx::bytes [buffer],",
     "global.shared::cta.bulk_group").replace(", [full];", ", [buffer];")],
    ["mov.u32 %r9, 0xfffffff0;", "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [buffer], %r9;"],
])  # fmt: skip
def test_more_than_shared_memory_holds(lines):
    """Reported at once: the first box has 2 ** 41 bytes."""
    x = torch.zeros(8192).as_strided((256,) * 5, (4, 4, 4, 4, 1))
    with pytest.raises(SimulationError, match=r"cp.async.bulk: shared memory out of bounds, \d+ bytes of \d+"):
        launch([*INIT, *lines], TensorMap(x, (256,) * 5))


def test_bytes_in_a_row():
    """cp.async.bulk without a tensor, both ways."""
    x, y = numbers(64), torch.zeros(64)
    lines = [
        *INIT, expect(256), "mov.b64 %rd5, map;", "ld.param.b64 %rd4, [map+8];",
        "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [buffer], [%rd4], 256, [full];", *WAIT,
        FENCE, "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [buffer], 256;", COMMIT, DONE,
    ]  # fmt: skip
    launch(lines, TensorMap(x, (64,)), y)
    assert torch.equal(x, y)
    with pytest.raises(SimulationError, match="addresses and size must be multiples of 16 bytes"):
        launch([each.replace("[buffer], 256;", "[buffer], 8;") for each in lines], TensorMap(x, (64,)), y)
    with pytest.raises(SimulationError, match=r"out of bounds, map\+256 of 256 bytes"):
        launch([each.replace("256", "512") for each in lines], TensorMap(x, (64,)), torch.zeros(128))


def test_states_counts_and_bytes():
    """arrive gives the phase, test_wait takes it; expect_tx and complete_tx by themselves; several
    arrivals."""
    lines = [
        "@%p0 mbarrier.init.shared::cta.b64 [full], 66;", "bar.sync 0;",
        "mbarrier.arrive.shared::cta.b64 %rd4, [full];", "mov.u32 %r5, 2;",
        "@%p0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [full], 64;",
        "mbarrier.test_wait.shared::cta.b64 %p1, [full], %rd4;", "selp.b32 %r6, 1, 0, %p1;", "bar.sync 0;",
        "@%p0 mbarrier.arrive.noComplete.shared::cta.b64 %rd5, [full], %r5;",
        "@%p0 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [full], 64;", "bar.sync 0;",
        "mbarrier.test_wait.shared::cta.b64 %p1, [full], %rd4;", "selp.b32 %r7, 2, 0, %p1;", "add.u32 %r6, %r6, %r7;",
        "st.global.b32 [%rd3], %r6;", "bar.sync 0;", "@%p0 mbarrier.inval.shared::cta.b64 [full];",
    ]  # fmt: skip
    y, _ = launch(lines, TensorMap(numbers(16, 16), (8, 8)), torch.zeros(64, dtype=torch.int32))
    assert (y == 2).all()


def test_cp_async_that_an_mbarrier_waits_for():
    x, arrive = numbers(16, 16), "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [full];"
    lines = [
        "@%p0 mbarrier.init.shared::cta.b64 [full], 64;", "bar.sync 0;", "ld.param.b64 %rd4, [map+8];",
        "mad.wide.u32 %rd4, %r0, 4, %rd4;", "cp.async.ca.shared.global [%r1], [%rd4], 4;", arrive, *WAIT,
        "xor.b32 %r1, %r1, 128;", *OUT,
    ]  # fmt: skip
    for late in (True, False):
        y, _ = launch(lines, TensorMap(x, (8, 8)), late=late)
        assert torch.equal(y.view(2, 32), x.view(-1)[:64].view(2, 32).flip(0))
    with pytest.raises(SimulationError, match="has not been waited for"):
        launch([each for each in lines if each not in WAIT], TensorMap(x, (8, 8)))
    own = ["@%p0 mbarrier.init.shared::cta.b64 [full], 1;", "bar.sync 0;", *lines[2:5], arrive.replace(".noinc", "")]
    launch([*own, "bar.sync 0;", "@%p0 mbarrier.arrive.shared::cta.b64 _, [full];", *lines[6:]], TensorMap(x, (8, 8)))


def test_two_stores_from_one_buffer():
    """The buffer is free when both are done, not one."""
    lines = [*SEND, FENCE, "bar.sync 0;", BULK, COMMIT, BULK, COMMIT]
    write, one = ["bar.sync 0;", "st.shared.f32 [%r1], %f1;"], DONE.replace(" 0;", " 1;")
    launch([*lines, DONE, *write], TensorMap(numbers(8, 8), (8, 8)))
    with pytest.raises(SimulationError, match="a cp.async.bulk out of it has not been waited for"):
        launch([*lines, one, *write, DONE], TensorMap(numbers(8, 8), (8, 8)))


def test_values_passed_on_by_an_mbarrier():
    """One warp writes and arrives, the other waits and reads: ordered; not ordered if nobody
    waits."""
    lines = [
        "@%p0 mbarrier.init.shared::cta.b64 [full], 32;", "bar.sync 0;", "setp.lt.u32 %p2, %r0, 32;", *SEND,
        "@%p2 mbarrier.arrive.shared::cta.b64 _, [full];", "@%p2 bra $E;", *WAIT, "xor.b32 %r1, %r1, 128;", *OUT, "$E:",
    ]  # fmt: skip
    for seed in range(4):
        y, _ = launch(lines, TensorMap(numbers(16, 16), (8, 8)), seed=seed)
        assert torch.equal(y[32:], torch.arange(32.0))
    without = [each for each in lines if each not in WAIT]
    with pytest.raises(SimulationError, match="race|nobody wrote"):
        for seed in range(4):
            launch(without, TensorMap(numbers(16, 16), (8, 8)), seed=seed)
