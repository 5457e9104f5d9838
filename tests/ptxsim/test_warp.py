"""What lanes and warps do together, what ends a kernel, and what a thread may ask of its place. PTX
ISA 9.7.13, 10."""

import numpy as np
import pytest
import torch

from lora_kernels.ptxsim import Kernel, Unsupported
from tests.ptxsim.lanes import kernel_text, run_lanes
from tests.ptxsim.test_checks import finds, launch

U32 = np.arange(32, dtype=np.uint32)
HALVES = ["setp.lt.u32 %p0, %r0, 16;", "selp.b32 %r4, 0xffff, 0xffff0000, %p0;"]


@pytest.mark.parametrize("line", [
    "shfl.sync.bfly.b32 %r3, %r0, 1, 31, {};", "bar.warp.sync {};", "match.any.sync.b32 %r3, %r0, {};",
    "redux.sync.add.u32 %r3, %r0, {};",
])  # fmt: skip
def test_a_lane_outside_of_its_member_mask(line):
    name = "bar.warp.sync" if "bar" in line else line.split(".")[0]
    finds(f"{name}: a lane is not in its own member mask", [line.format("0x7fffffff")], threads=32)
    finds(f"{name}: lanes of its member mask are not here", ["setp.lt.u32 %p0, %r0, 7;",
          f"@!%p0 {line.format('-1')}"], threads=32)  # fmt: skip
    launch([*HALVES, line.format("%r4")], threads=32)  # each half by itself
    launch(["setp.gt.u32 %p0, %r0, 7;", "@%p0 bra $S;", line.format("0xff"), "$S:"], threads=32)


def test_a_shuffle_from_outside_of_the_member_mask():
    finds("shfl: reads lane 16, which is not in its member mask", [*HALVES, "shfl.sync.down.b32 %r3, %r0, 1, 31, %r4;"],
          threads=32)  # fmt: skip
    finds("shfl: reads lane 7, which is not here", ["setp.eq.u32 %p0, %r0, 7;", "@%p0 bra $S;",
          "shfl.sync.idx.b32 %r3, %r0, 7, 31, 0xffffff7f;", "$S:"], threads=32)  # fmt: skip


@pytest.mark.parametrize("bits", [32, 64])
def test_match(bits):
    x = (U32 % 5 * 1000).astype(f"u{bits // 8}")
    if bits == 64:
        x = x + (x << np.uint64(40)) * (U32 % 2)
    wanted = [sum(1 << j for j in range(32) if x[j] == x[i]) for i in range(32)]
    np.testing.assert_array_equal(run_lanes([f"match.any.sync.b{bits} %out, %a, -1;"], [x], np.uint32), wanted)
    halves = [".reg .pred %h, %q; .reg .b32 %m, %u;", "mov.u32 %u, %tid.x;", "setp.lt.u32 %h, %u, 16;",
              "selp.b32 %m, 0xffff, 0xffff0000, %h;"]  # fmt: skip
    mask = np.where(U32 < 16, 0xFFFF, 0xFFFF0000).astype(np.uint32)
    found = run_lanes([*halves, f"match.any.sync.b{bits} %out, %a, %m;"], [x], np.uint32)
    np.testing.assert_array_equal(found, np.array(wanted, np.uint32) & mask)
    y = np.where(U32 < 16, 7, x)  # the lower half agrees, the upper one does not
    lines = [*halves, f"match.all.sync.b{bits} %out|%q, %a, %m;", "@%q add.u32 %out, %out, 1;"]
    np.testing.assert_array_equal(run_lanes(lines, [y], np.uint32), np.where(U32 < 16, 0x10000, 0))
    found = run_lanes([f"match.all.sync.b{bits} %out, %a, -1;"], [np.full_like(x, 3)], np.uint32)
    np.testing.assert_array_equal(found, np.full(32, 2**32 - 1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("barrier", ["bar.red", "barrier.cta.red"])
def test_barriers_that_reduce(seed, barrier):
    n = 112  # the last warp has half its lanes
    x = np.arange(n, dtype=np.uint32)
    start = [".reg .pred %p, %q;", "setp.lt.u32 %p, %a, {limit};"]
    aligned = ".aligned" if "cta" in barrier else ""
    for limit in (0, 1, 40, n):
        lines = [line.format(limit=limit) for line in start]
        found = run_lanes([*lines, f"{barrier}.popc{aligned}.u32 %out, 0, %p;"], [x], np.uint32, threads=n, seed=seed)
        np.testing.assert_array_equal(found, limit)
        found = run_lanes([*lines, f"{barrier}.popc{aligned}.u32 %out, 1, !%p;"], [x], np.uint32, threads=n, seed=seed)
        np.testing.assert_array_equal(found, n - limit)
        for name, value in (("and", limit == n), ("or", limit > 0)):
            line = f"{barrier}.{name}{aligned}.pred %q, 0, %p;"
            found = run_lanes([*lines, line, "selp.u32 %out, 1, 0, %q;"], [x], np.uint32, threads=n, seed=seed)
            np.testing.assert_array_equal(found, value)


def test_a_barrier_that_reduces_of_some_warps_and_its_order():
    # warps 0 and 1 at barrier 2, one after another, the others pass by
    lines = [".reg .pred %p, %q, %r; .reg .b32 %n;", "setp.ge.u32 %r, %a, 64;", "mov.u32 %out, 0;", "@%r bra $E;",
             "setp.lt.u32 %p, %a, 40;", "mov.u32 %n, 2;", "bar.red.popc.u32 %out, %n, 64, %p;",
             "bar.red.and.pred %q, 2, 64, %p;", "@%q add.u32 %out, %out, 1000;", "$E:"]  # fmt: skip
    found = run_lanes(lines, [np.arange(96, dtype=np.uint32)], np.uint32, threads=96)
    np.testing.assert_array_equal(found, np.where(np.arange(96) < 64, 40, 0))
    # it orders memory as bar.sync does
    pass_on = ["st.shared.u32 [%r1], %r0;", "bar.red.or.pred %p1, 0, %p0;", "xor.b32 %r3, %r0, 63;",
               "mad.lo.u32 %r3, %r3, 4, %r31;", "ld.shared.u32 %r3, [%r3];"]  # fmt: skip
    launch(["setp.lt.u32 %p0, %r0, 32;", *pass_on])
    finds("bar: some warps reduce at barrier 0, some do not", ["setp.lt.u32 %p0, %r0, 32;", "@%p0 bra $A;", "bar.sync 0;",
          "bra $E;", "$A:", "bar.red.or.pred %p1, 0, %p0;", "$E:"])  # fmt: skip
    finds("bar: not all lanes", ["setp.lt.u32 %p0, %r0, 7;", "@%p0 bar.red.or.pred %p1, 0, %p0;"])


@pytest.mark.parametrize("line", ["trap;", "brkpt;"])
def test_a_trap_is_found_and_ends_its_lanes(line):
    end = ["setp.eq.u32 %p0, %r0, 5;", f"@%p0 {line}", "cvt.rn.f32.u32 %f0, %r0;", "st.global.f32 [%rd3], %f0;"]
    finds("block .0, 0, 0. warp 0 lane 5: trap", end)
    y, run = launch(end, y=torch.full((256,), -1.0), tolerant=True)
    assert y[4:7].tolist() == [4, -1, 6] and len(run.errors) == 1
    launch([end[0].replace("5", "500"), *end[1:]])


def test_clocks_grow():
    for name, bits in (("%clock64", 64), ("%globaltimer", 64), ("%clock", 32), ("%globaltimer_lo", 32)):
        lines = [f".reg .b{bits} %x, %y; .reg .pred %p;", f"mov.u{bits} %x, {name};", "add.u32 %out, %a, 1;",
                 f"mov.u{bits} %y, {name};", f"setp.lt.u{bits} %p, %x, %y;", "selp.u32 %out, 1, 0, %p;"]  # fmt: skip
        np.testing.assert_array_equal(run_lanes(lines, [U32], np.uint32), 1)


def test_the_only_block_of_a_cluster():
    for name, value in (("%smid", 0), ("%cluster_ctarank", 0), ("%cluster_nctarank", 1), ("%cluster_ctaid.x", 0),
                        ("%cluster_nctaid.y", 1), ("%clusterid.x", 0), ("%nclusterid.x", 1)):  # fmt: skip
        np.testing.assert_array_equal(run_lanes([f"mov.u32 %out, {name};"], [U32], np.uint32), value)
    lines = [".shared .b32 cell;", ".reg .b32 %c; .reg .b64 %w, %z;", "mov.u32 %c, cell;",
             "mapa.shared::cluster.u32 %c, %c, 0;", "st.shared::cluster.u32 [%c], 7;", "mov.u64 %z, cell;",
             "cvta.shared.u64 %w, %z;", "mapa.u64 %w, %w, 0;", "bar.warp.sync -1;", "ld.u32 %out, [%w];"]  # fmt: skip
    np.testing.assert_array_equal(run_lanes(lines, [U32], np.uint32), 7)
    finds("mapa: of a block that its cluster has not", ["mov.u32 %r4, 1;", "mapa.shared::cluster.u32 %r3, %r1, %r4;"])
    text = kernel_text([], [], [("x", "u64")])
    Kernel(text.replace("\n{", "\n.reqnctapercluster 1, 1, 1\n{"))
    with pytest.raises(Unsupported, match="line 4: clusters of several blocks"):
        Kernel(text.replace("\n{", "\n.explicitcluster\n.reqnctapercluster 2, 1, 1\n{"))
    with pytest.raises(Unsupported, match="barrier.cluster.arrive"):
        launch(["barrier.cluster.arrive;"])


def test_spaces_of_addresses():
    places = {"global": "%g", "shared": "%s", "local": "%l", "param::entry": "%q"}
    head = [".shared .b32 cell; .local .b32 own;", ".reg .b64 %g, %s, %l, %q, %z; .reg .pred %p; .reg .b32 %t1;",
            "mov.u64 %z, cell;", "cvta.shared.u64 %s, %z;", "mov.u64 %z, own;", "cvta.local.u64 %l, %z;", "mov.b64 %z, p0;",
            "cvta.param.u64 %q, %z;", "ld.param.u64 %g, [p0];", "mov.u32 %out, 0;"]  # fmt: skip
    for space in places:
        lines = [line for i, place in enumerate(places.values()) for line in (
            f"isspacep.{space} %p, {place};", f"selp.u32 %t1, {1 << i}, 0, %p;", "add.u32 %out, %out, %t1;")]  # fmt: skip
        np.testing.assert_array_equal(run_lanes([*head, *lines], [U32], np.uint32), 1 << list(places).index(space))
    back = ["cvta.to.local.u64 %z, %l;", "st.local.u32 [%z], %a;", "ld.u32 %out, [%l];"]
    np.testing.assert_array_equal(run_lanes([*head, *back], [U32], np.uint32), U32)


def test_loads_of_the_same_element_and_hints():
    x, y = torch.arange(64, dtype=torch.float32), torch.zeros(64)
    launch(["ldu.global.f32 %f0, [%rd2];", "createpolicy.fractional.L2::evict_last.b64 %rd4, 1.0;",
            "prefetch.global.L1 [%rd2];", "prefetchu.L1 [%rd2];", "st.global.cs.f32 [%rd3], %f0;",
            ".pragma \"nounroll\";"], x, y)  # fmt: skip
    assert torch.equal(x, y)
    copy = ["cp.async.ca.shared.global.L2::128B [%r1], [%rd2], 4;", "cp.async.wait_all;", "ld.shared.f32 %f0, [%r1];",
            "st.global.L1::no_allocate.f32 [%rd3], %f0;"]  # fmt: skip
    launch(copy, x, y.zero_())
    assert torch.equal(x, y)
