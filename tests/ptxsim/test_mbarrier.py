"""Who learns what at an mbarrier: a lane, a warp, those who wait for one copy and not for
another."""

import pytest
import torch

from lora_kernels.ptxsim import TensorMap
from tests.ptxsim.test_bulk import COMMIT, DONE, FENCE, INIT, OUT, SEND, WAIT, expect, launch, load, numbers

SYNC = "bar.warp.sync 0xffffffff;"
# two warps: %p2 the first one, %p3 lane 0 of the second; %r2 the place of the other warp's thread
WARPS = [
    "setp.lt.u32 %p2, %r0, 32;", "setp.eq.u32 %p3, %r0, 32;", "xor.b32 %r2, %r1, 128;",
    "@%p0 mbarrier.init.shared::cta.b64 [other], 1;", *INIT,
]  # fmt: skip
ARRIVE, READ = "@%p0 mbarrier.arrive.shared::cta.b64 _, [full];", ["ld.shared.f32 %f0, [%r2];", "st.global.f32 [%rd3], %f0;"]
# lane 0 of the second warp alone goes through the loop
ONE_WAITS = ["@!%p3 bra $J;", *WAIT, "$J:"]


def passed_on(before=SYNC, waits=WAIT, after=None):
    """The first warp writes, its lane 0 arrives; the second one waits and reads."""
    return [*WARPS, *SEND, "@!%p2 bra $S;", *([before] if before else []), ARRIVE, "bra $E;", "$S:", *waits,
            *([after] if after else []), *READ, "$E:"]  # fmt: skip


def given_back(before=SYNC):
    """The first warp reads and its lane 0 arrives; the second one waits and writes where it
    read."""
    return [*WARPS, *SEND, "bar.sync 0;", "@!%p2 bra $S;", *READ, *([before] if before else []), ARRIVE, "bra $E;", "$S:",
            *WAIT, "st.shared.f32 [%r1], %f1;", "$E:"]  # fmt: skip


def errors_of(lines, **options):
    x, found = TensorMap(numbers(16, 16), (8, 8)), []
    for seed in range(4):
        found += launch(lines, x, seed=seed, tolerant=True, **options)[1].errors
    return "\n".join(found)


def test_a_lane_that_arrives_speaks_for_itself_until_its_warp_synchronises():
    assert errors_of(passed_on()) == "" and errors_of(given_back()) == ""
    assert "shared race with a write of warp 0 lane 1" in errors_of(passed_on(before=None))
    assert "shared race with a read of warp 0" in errors_of(given_back(before=None))
    shared = [each.replace("[%r2]", "[buffer+128]") for each in given_back(before=None)]
    assert "lane 0: st at 128: shared race with a read of warp 0" in errors_of(shared)
    # its own writes it may pass on
    own = [each if "st.shared" not in each else f"@%p0 {each}" for each in passed_on(before=None)]
    own = [each.replace("ld.shared.f32 %f0, [%r2]", "ld.shared.f32 %f0, [buffer]") for each in own]
    assert errors_of(own) == ""
    # but not those that follow its arrival
    late = [each for each in own if each != SEND[1]]
    late.insert(late.index(ARRIVE) + 1, f"@%p0 {SEND[1]}")
    assert "shared race with a write of warp 0 lane 0" in errors_of(late) or "nobody wrote" in errors_of(late)


def test_all_lanes_may_arrive_one_after_another():
    halves = ["mbarrier.arrive.shared::cta.b64 _, [full];", "bra $E;"]
    lines = [*WARPS, *SEND, "@!%p2 bra $S;", "setp.lt.u32 %p4, %r0, 16;", "@%p4 bra $H;", *halves, "$H:", *halves, "$S:", *WAIT,
             *READ, "$E:"]  # fmt: skip
    assert errors_of([each.replace("[full], 1;", "[full], 32;") for each in lines]) == ""
    fewer = [each.replace("[full], 1;", "[full], 16;").replace("bra $H;", "bra $E;") for each in lines]
    assert "shared race with a write of warp 0 lane 0" in errors_of(fewer)


def test_a_lane_that_waits_learns_for_itself_until_its_warp_synchronises():
    assert errors_of(passed_on(waits=ONE_WAITS, after=SYNC)) == ""
    assert errors_of(passed_on(waits=ONE_WAITS, after="bar.sync 1, 32;")) == ""
    assert "lane 1: ld at" in errors_of(passed_on(waits=ONE_WAITS))
    # what it waited for it may read itself, and pass on to others
    alone = [each.replace("ld.shared", "@%p3 ld.shared") for each in passed_on(waits=ONE_WAITS)]
    assert errors_of(alone) == ""
    on = [each.replace("[full]", "[other]") for each in (ARRIVE.replace("%p0", "%p3"), *WAIT)]
    on = [each.replace("$W", "$V") for each in on]
    assert errors_of(passed_on(waits=[*ONE_WAITS, *on])) == ""


def test_a_fence_of_the_proxy_is_that_of_its_lane():
    store = "@%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd0, {0, 0}], [buffer];"
    after, early = [store, COMMIT, DONE], f"@%p0 {FENCE}"
    assert errors_of([*SEND, FENCE, "bar.sync 0;", *after]) == ""
    assert errors_of([*SEND, "bar.sync 0;", early, *after]) == ""
    assert "no fence.proxy.async after the write of warp 0 lane 1" in errors_of([*SEND, early, "bar.sync 0;", *after])


def test_who_waits_for_one_copy_knows_nothing_of_another():
    second = [each.replace("[full]", "[other]").replace("buffer]", "buffer+1024]") for each in (expect(256), load())]
    lines = [*WARPS, FENCE, expect(256), load(), *second, "@!%p2 bra $S;", *WAIT, "bra $O;", "$S:"]
    wait = [each.replace("$W", "$V") for each in WAIT]
    assert errors_of([*lines, *wait, "$O:", *OUT, "bar.sync 0;", *[each.replace("$W", "$U").replace("full", "other")
                                                                   for each in WAIT]]) == ""  # fmt: skip
    wrong = [*lines, *[each.replace("full", "other") for each in wait], "$O:", *OUT]
    for late in (True, False):
        assert "shared race with a write of cp.async.bulk" in errors_of(wrong, late=late)


def test_wait_group_of_wgmma_is_one_for_the_warp():
    """It is .sync.aligned: lane 0 may tell others that the warp's reads are done."""
    lines = [each if each != SYNC else "wgmma.wait_group.sync.aligned 0;" for each in given_back()]
    assert errors_of(lines) == ""


@pytest.mark.parametrize("late", [True, False])
def test_values_arrive(late):
    y, _ = launch(passed_on(), TensorMap(numbers(16, 16), (8, 8)), late=late)
    assert torch.equal(y[32:], torch.arange(32.0))


def test_work_between_waits_is_no_deadlock():
    """The second warp looks 3000 times in vain, with a little work between, before it arrives
    itself."""

    def work(label, times, look=()):
        return [f"mov.u32 %r9, {times};", f"{label}: sub.u32 %r9, %r9, 1;", *look, *["add.u32 %r10, %r10, 1;"] * 10,
                "setp.ne.u32 %p6, %r9, 0;", f"@%p6 bra {label};"]  # fmt: skip

    look = [WAIT[0].removeprefix("$W: ").replace("%p1", "%p5").replace("try_wait", "test_wait")]
    lines = [*WARPS, "@%p2 bra $E;", *work("$L", 3000, look), ARRIVE.replace("%p0", "%p3"), *WAIT, "$E:"]
    assert errors_of(lines) == ""


def test_lanes_that_wait_let_those_run_that_release_them():
    """Lanes 1 to 31 wait at a lower address than that where lane 0 arrives."""
    lines = [*WARPS, "@!%p2 bra $E;", "@%p0 bra $A;", *WAIT, "bra $E;", "$A:", ARRIVE, "$E:"]
    assert errors_of(lines) == ""
    assert "deadlock: waits at an mbarrier" in errors_of([each for each in lines if each != ARRIVE])
