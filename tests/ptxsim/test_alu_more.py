"""Arithmetic that flushes or saturates, on two floats at once, with three sources and on bytes,
against numpy."""

import numpy as np
import pytest

from tests.ptxsim.lanes import KIND, run_lanes
from tests.ptxsim.test_alu import COMPARISONS, INTEGERS, check, ints, values, wrapped


def flush(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x).astype(np.float32)


def test_flushed_floats():
    x, y, z = values("f32"), values("f32", 1), values("f32", 2)
    x[:6], y[:6] = [1e-40, -1e-40, 1e-30, 2.0**-126, 1e-39, -3e-39], [1e-40, 1.0, 1e-10, -(2.0**-127), 2.0, 5e-39]
    fx, fy, fz = flush(x), flush(y), flush(z)

    def same(opcode, wanted, kind, *inputs):
        check(opcode, None, kind, lambda *_: wanted.astype(KIND[kind]), list(inputs))

    with np.errstate(all="ignore"):
        two = {"add": fx + fy, "sub": fx - fy, "mul": fx * fy, "div.rn": fx / fy}
        two |= {"min": np.fmin(fx, fy), "max": np.fmax(fx, fy)}
        for name, wanted in two.items():
            same(f"{name}.ftz.f32", flush(wanted), "f32", x, y)
        same("fma.rn.ftz.f32", flush((fx.astype(np.float64) * fy + fz).astype(np.float32)), "f32", x, y, z)
        one = {"abs": np.abs(fx), "neg": -fx, "sqrt.rn": np.sqrt(fx), "rcp.rn": 1 / fx}
        for name, wanted in one.items():
            same(f"{name}.ftz.f32", flush(wanted), "f32", x)
        wide = fx.astype(np.float64)
        near = {"rsqrt": 1 / np.sqrt(wide), "ex2": np.exp2(wide), "lg2": np.log2(wide)}
        near |= {"sin": np.sin(wide), "cos": np.cos(wide)}
        for name, wanted in near.items():
            found = run_lanes([f"{name}.approx.ftz.f32 %out, %a;"], [x], np.float32)
            np.testing.assert_allclose(found, flush(wanted), rtol=1e-6, atol=1e-7)
        small = np.clip(np.nan_to_num(x), -1e6, 1e6).astype(np.float32)
        for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            same(f"cvt.{mode}.ftz.f32.f32", function(fx), "f32", x)
            same(f"cvt.{mode}.ftz.s32.f32", function(flush(small)), "s32", small)
            same(f"cvt.{mode}.ftz.u32.f32", function(np.abs(flush(small))), "u32", np.abs(small))
        same("cvt.sat.f32.f32", np.where(np.isnan(x), 0, np.clip(x, 0, 1)), "f32", x)
        same("cvt.ftz.sat.f32.f32", np.where(np.isnan(x), 0, np.clip(fx, 0, 1)), "f32", x)
    neither = ~(np.isnan(x) | np.isnan(y))
    compared = {name: function(fx, fy) & neither for name, function in COMPARISONS.items()}
    compared |= {f"{name}u": function(fx, fy) | ~neither for name, function in COMPARISONS.items()}
    for name, wanted in {**compared, "num": neither, "nan": ~neither}.items():
        lines = [".reg .pred %p;", f"setp.{name}.ftz.f32 %p, %a, %b;", "selp.u32 %out, 1, 0, %p;"]
        np.testing.assert_array_equal(run_lanes(lines, [x, y], np.uint32), wanted)


def test_more_counts_of_bits():
    check("bfind.shiftamt.u32", ["u32"], "u32", lambda x: wrapped("u32", [32 - int(v).bit_length() if v else -1 for v in x]))
    check("brev.b64", ["b64"], "b64", lambda x: np.array([int(f"{int(v):064b}"[::-1], 2) for v in x], np.uint64))


def test_masks_of_bits():
    x, by = values("u32"), np.arange(32, dtype=np.uint32)
    first, count = np.resize(np.uint32([0, 5, 31, 32, 40]), 32), np.resize(np.uint32([0, 1, 8, 31, 32, 33, 64]), 32)

    def ones(a, b):
        return ((1 << b) - 1) << a

    check("bmsk.clamp.b32", None, "u32", lambda *v: wrapped("u32", map(ones, *ints(*v))), [first, count])
    wrap = [ones(a & 31, b & 31) for a, b in zip(*ints(first, count), strict=True)]
    check("bmsk.wrap.b32", None, "u32", lambda *_: wrapped("u32", wrap), [first, count])
    for n in (0, 1, 3, -1, -2, 30):
        wanted = []
        for a, b in zip(*ints(x, by), strict=True):
            places = [i for i in (range(b, 32) if n >= 0 else range(b, -1, -1)) if a >> i & 1]
            places = [i for i in places if i == b] if n == 0 else places[abs(n) - 1 :]
            wanted.append(places[0] if places else -1)
        nth = np.full(32, n, np.int32)
        check("fns.b32", None, "u32", lambda *_, w=wanted: wrapped("u32", w), [x, by, nth])


@pytest.mark.parametrize("kind", INTEGERS)
def test_distances(kind):
    def distance(a, b, c):
        return abs(a - b) + c

    check(f"sad.{kind}", [kind] * 3, kind, lambda *v: wrapped(kind, map(distance, *ints(*v))))


def test_products_of_24_bits_and_sums_that_saturate():
    low = {"u32": lambda v: v % 2**24, "s32": lambda v: (v + 2**23) % 2**24 - 2**23}
    for kind, cut in low.items():
        pairs = zip(*ints(values(kind), values(kind, 1)), strict=True)
        wanted = wrapped(kind, [cut(a) * cut(b) for a, b in pairs])
        check(f"mul24.lo.{kind}", [kind] * 2, kind, lambda *_, w=wanted: w)
    x, y = (values("s32", seed).astype(np.int64) for seed in (0, 1))
    for name, exact in (("add", x + y), ("sub", x - y)):
        wanted = np.clip(exact, -(2**31), 2**31 - 1).astype(np.int32)
        check(f"{name}.sat.s32", ["s32"] * 2, "s32", lambda *_, w=wanted: w)


def test_a_guard_that_is_a_target():
    lane = np.arange(32, dtype=np.uint32)
    lines = [
        ".reg .pred %p, %q; .reg .b32 %u, %v;", "setp.lt.u32 %p, %a, 20;", "setp.lt.u32 %q, %a, 0;",
        "@%p setp.lt.u32 %p|%q, %a, 10;", "selp.u32 %u, 1, 0, %p;", "selp.u32 %v, 2, 0, %q;", "add.u32 %out, %u, %v;",
    ]  # fmt: skip
    np.testing.assert_array_equal(run_lanes(lines, [lane], np.uint32), np.where(lane < 10, 1, np.where(lane < 20, 2, 0)))
    lines[3] = "setp.lt.and.u32 %p|%q, %a, 10, %p;"
    np.testing.assert_array_equal(run_lanes(lines, [lane], np.uint32), np.where(lane < 10, 1, np.where(lane < 20, 2, 0)))


def test_three_sources():
    x, y, z = values("f32"), values("f32", 1), values("f32", 2)
    for name, two in {"min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum}.items():
        check(f"{name}.f32", None, "f32", lambda *_, two=two: two(two(x, y), z), [x, y, z])


def test_pairs_of_floats():
    x, y, z = (np.stack([values("f32", i), values("f32", i + 7)], 1) for i in range(3))
    whole = [np.ascontiguousarray(v).view(np.uint64).ravel() for v in (x, y, z)]
    with np.errstate(all="ignore"):
        for name, wanted in {"add.rn": x + y, "sub.rn": x - y, "mul.rn": x * y}.items():
            found = run_lanes([f"{name}.f32x2 %out, %a, %b;"], whole[:2], np.uint64).view(np.float32).reshape(32, 2)
            np.testing.assert_array_equal(found, wanted)
        found = run_lanes(["fma.rn.f32x2 %out, %a, %b, %c;"], whole, np.uint64).view(np.float32).reshape(32, 2)
        np.testing.assert_array_equal(found, (x.astype(np.float64) * y + z).astype(np.float32))


@pytest.mark.parametrize("kind_a", ["s32", "u32"])
@pytest.mark.parametrize("kind_b", ["s32", "u32"])
def test_dp4a(kind_a, kind_b):
    x, y, z = values("u32"), values("u32", 1), values("s32", 2)
    bytes_a = x.view(np.int8 if kind_a == "s32" else np.uint8).reshape(32, 4).astype(np.int64)
    bytes_b = y.view(np.int8 if kind_b == "s32" else np.uint8).reshape(32, 4).astype(np.int64)
    wanted = wrapped("s32", (bytes_a * bytes_b).sum(1) + z)
    check(f"dp4a.{kind_a}.{kind_b}", None, "s32", lambda *_: wanted, [x, y, z])


def test_lane_masks():
    lane = [int(v) for v in range(32)]
    masks = {"eq": [1 << i for i in lane], "lt": [(1 << i) - 1 for i in lane], "le": [(2 << i) - 1 for i in lane],
             "gt": [-2 << i for i in lane], "ge": [-1 << i for i in lane]}  # fmt: skip
    for name, wanted in masks.items():
        found = run_lanes([f"mov.u32 %out, %lanemask_{name};"], [np.arange(32, dtype=np.uint32)], np.uint32)
        np.testing.assert_array_equal(found, wrapped("u32", wanted))
