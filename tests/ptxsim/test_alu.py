"""Every arithmetic instruction against numpy, lane by lane, with the edges of each type among the
inputs."""

import math

import numpy as np
import pytest

from tests.ptxsim.lanes import KIND, run_lanes

RNG = np.random.default_rng(0)
INTEGERS = ["u16", "s16", "u32", "s32", "u64", "s64"]


def values(kind, seed=0, threads=32):
    """Random bits, and the edges."""
    rng, dtype = np.random.default_rng(seed), np.dtype(KIND[kind])
    if dtype.kind == "f":
        x = rng.standard_normal(threads) * 10.0 ** rng.integers(-3, 3, threads)
        x[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.5, 65504.0]
        return rng.permutation(x).astype(dtype)
    x = rng.integers(0, 256, threads * dtype.itemsize, dtype=np.uint8).view(dtype).copy()
    info = np.iinfo(dtype)
    x[:6] = [0, 1, info.max, info.min, 2, info.max - 1]
    return rng.permutation(x)


def wrapped(kind, value):
    """Python integers as the type's own, wrapping."""
    dtype = np.dtype(KIND[kind])
    return (
        np.array([int(v) & ((1 << dtype.itemsize * 8) - 1) for v in value], dtype=np.uint64)
        .astype(f"u{dtype.itemsize}")
        .view(dtype)
    )


def ints(*arrays):
    return [[int(v) for v in array] for array in arrays]


def check(opcode, kinds, out, function, inputs=None, extra=""):
    inputs = inputs or [values(kind, seed) for seed, kind in enumerate(kinds)]
    operands = ", ".join(f"%{name}" for name in "abcd"[: len(inputs)])
    found = run_lanes([f"{opcode} %out, {operands}{extra};"], inputs, KIND[out])
    wanted = function(*inputs)
    np.testing.assert_array_equal(found, wanted)


BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
    "div": lambda x, y: -1 if y == 0 else int(math.copysign(1, x) * math.copysign(1, y)) * (abs(x) // abs(y)),
    "rem": lambda x, y: x if y == 0 else int(math.copysign(1, x)) * (abs(x) % abs(y)),
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_integers(name, kind):
    check(f"{name}.{kind}", [kind, kind], kind, lambda x, y: wrapped(kind, map(BINARY[name], *ints(x, y))))


@pytest.mark.parametrize("kind", INTEGERS)
def test_products(kind):
    bits = np.dtype(KIND[kind]).itemsize * 8
    check(
        f"mul.hi.{kind}",
        [kind, kind],
        kind,
        lambda x, y: wrapped(kind, [a * b >> bits for a, b in zip(*ints(x, y), strict=True)]),
    )
    check(
        f"mad.lo.{kind}",
        [kind] * 3,
        kind,
        lambda x, y, z: wrapped(kind, [a * b + c for a, b, c in zip(*ints(x, y, z), strict=True)]),
    )
    high = [a * b >> bits for a, b in zip(*ints(values(kind), values(kind, 1)), strict=True)]
    check(
        f"mad.hi.{kind}",
        [kind] * 3,
        kind,
        lambda x, y, z: wrapped(kind, [a + c for a, c in zip(high, ints(z)[0], strict=True)]),
    )
    if bits < 64:
        wide = f"{kind[0]}{bits * 2}"
        check(
            f"mul.wide.{kind}",
            [kind, kind],
            wide,
            lambda x, y: wrapped(wide, [a * b for a, b in zip(*ints(x, y), strict=True)]),
        )
        check(
            f"mad.wide.{kind}", [kind, kind, wide], wide,
            lambda x, y, z: wrapped(wide, [a * b + c for a, b, c in zip(*ints(x, y, z), strict=True)]),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_signs(kind):
    check(f"abs.{kind}", [kind], kind, lambda x: wrapped(kind, map(abs, *ints(x))))
    check(f"neg.{kind}", [kind], kind, lambda x: wrapped(kind, [-v for v in ints(x)[0]]))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits(bits):
    kind = f"b{bits}"
    check(f"and.{kind}", [kind, kind], kind, np.bitwise_and)
    check(f"or.{kind}", [kind, kind], kind, np.bitwise_or)
    check(f"xor.{kind}", [kind, kind], kind, np.bitwise_xor)
    check(f"not.{kind}", [kind], kind, np.bitwise_not)
    check(f"cnot.{kind}", [kind], kind, lambda x: (x == 0).astype(x.dtype))


@pytest.mark.parametrize("kind", INTEGERS)
def test_shifts(kind):
    bits = np.dtype(KIND[kind]).itemsize * 8
    by = np.arange(32, dtype=np.uint32) * bits // 24
    x = values(kind)
    pairs = list(zip(*ints(x, by), strict=True))
    check(f"shl.b{bits}", None, f"b{bits}", lambda x, y: wrapped(f"b{bits}", [a << b for a, b in pairs]), [x, by])
    check(f"shr.{kind}", None, kind, lambda x, y: wrapped(kind, [a >> b for a, b in pairs]), [x, by])


def test_funnel_shifts():
    low, high, by = values("u32"), values("u32", 1), np.arange(32, dtype=np.uint32) * 3
    both = [(int(h) << 32 | int(v), int(n)) for v, h, n in zip(low, high, by, strict=True)]
    for mode, limit in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        for side, value in (("l", lambda v, n: v << n >> 32), ("r", lambda v, n: v >> n)):
            wanted = wrapped("u32", [value(v, limit(n)) for v, n in both])
            check(f"shf.{side}.{mode}.b32", None, "u32", lambda *_, w=wanted: w, [low, high, by])


def test_counts_of_bits():
    check("popc.b32", ["b32"], "u32", lambda x: np.array([int(v).bit_count() for v in x], np.uint32))
    check("popc.b64", ["b64"], "u32", lambda x: np.array([int(v).bit_count() for v in x], np.uint32))
    check("clz.b32", ["b32"], "u32", lambda x: np.array([32 - int(v).bit_length() for v in x], np.uint32))
    check("clz.b64", ["b64"], "u32", lambda x: np.array([64 - int(v).bit_length() for v in x], np.uint32))
    check("brev.b32", ["b32"], "b32", lambda x: np.array([int(f"{int(v):032b}"[::-1], 2) for v in x], np.uint32))
    check("bfind.u32", ["u32"], "u32", lambda x: wrapped("u32", [int(v).bit_length() - 1 for v in x]))


def field(value, first, length, bits, signed):
    first, length = first & 255, length & 255
    if not length:
        return 0
    sign = signed and value >> min(first + length - 1, bits - 1) & 1
    kept = min(length, max(bits - first, 0))
    got = (value & ((1 << bits) - 1)) >> first & ((1 << kept) - 1)
    return got | (-1 << kept) if sign else got


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_fields(kind):
    bits = int(kind[1:])
    first, length = RNG.integers(0, bits + 4, 32).astype(np.uint32), RNG.integers(0, bits + 4, 32).astype(np.uint32)
    x = values(kind)
    check(
        f"bfe.{kind}", None, kind,
        lambda x, y, z: wrapped(kind, [field(a, b, c, bits, kind[0] == "s") for a, b, c in zip(*ints(x, y, z), strict=True)]),
        [x, first, length],
    )  # fmt: skip
    if kind[0] == "u":
        into = values(kind, 7)

        def insert(a, d, b, c):
            ones = ((1 << min(c, max(bits - b, 0))) - 1) << b
            return (d & ~ones) | (a << b & ones)

        check(f"bfi.b{bits}", None, kind, lambda *v: wrapped(kind, map(insert, *ints(*v))), [x, into, first, length])


def test_permutations():
    x, y, selectors = values("u32"), values("u32", 1), values("u32", 2)

    def bytes_of(a, b, s):
        both, to = (b << 32 | a).to_bytes(8, "little"), []
        for i in range(4):
            n = s >> 4 * i & 15
            byte = both[n & 7]
            to.append((255 if byte & 128 else 0) if n & 8 else byte)
        return int.from_bytes(bytes(to), "little")

    check("prmt.b32", None, "u32", lambda *v: wrapped("u32", map(bytes_of, *ints(*v))), [x, y, selectors])


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xC0, 0x1B])
def test_lop3(table):
    def logic(a, b, c):
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))

    check("lop3.b32", ["b32"] * 3, "b32", lambda *v: wrapped("b32", map(logic, *ints(*v))), extra=f", {table:#x}")


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_floats(kind):
    with np.errstate(all="ignore"):
        check(f"add.rn.{kind}", [kind, kind], kind, np.add)
        check(f"sub.{kind}", [kind, kind], kind, np.subtract)
        check(f"mul.{kind}", [kind, kind], kind, np.multiply)
        check(f"div.rn.{kind}", [kind, kind], kind, np.divide)
        check(f"sqrt.rn.{kind}", [kind], kind, np.sqrt)
        check(f"rcp.rn.{kind}", [kind], kind, lambda x: 1 / x)
        check(f"abs.{kind}", [kind], kind, np.abs)
        check(f"neg.{kind}", [kind], kind, np.negative)
        check(f"min.{kind}", [kind, kind], kind, np.fmin)
        check(f"max.{kind}", [kind, kind], kind, np.fmax)
        check(f"copysign.{kind}", [kind, kind], kind, lambda x, y: np.copysign(y, x))
        if kind == "f32":
            check("min.NaN.f32", [kind, kind], kind, np.minimum)
            check("max.NaN.f32", [kind, kind], kind, np.maximum)


def test_fma_rounds_once():
    x, y, z = (np.float32(values("f32", seed)) for seed in (3, 4, 5))
    # 2⁻²⁴, which rounding the product would lose
    x[0], y[0], z[0] = 1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) * y + z.astype(np.float64)  # the product is exact there
        check("fma.rn.f32", None, "f32", lambda *_: exact.astype(np.float32), [x, y, z])
    a, b, c = np.full(32, 1 + 2.0**-30), np.full(32, 1 + 2.0**-30), np.full(32, -1 - 2.0**-29)
    check("fma.rn.f64", None, "f64", lambda *_: np.full(32, 2.0**-60), [a, b, c])


def test_approximations():
    x = np.abs(values("f32"))
    functions = {
        "ex2.approx.f32": np.exp2, "lg2.approx.f32": np.log2, "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
        "sin.approx.f32": np.sin, "cos.approx.f32": np.cos, "tanh.approx.f32": np.tanh,
    }  # fmt: skip
    for opcode, function in functions.items():
        with np.errstate(all="ignore"):
            found = run_lanes([f"{opcode} %out, %a;"], [x], np.float32)
            np.testing.assert_allclose(found, function(x.astype(np.float64)), rtol=1e-6, atol=1e-7)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("kind", [*INTEGERS, "f32", "f64"])
def test_comparisons(name, kind):
    x, y = values(kind), values(kind, 1)
    y[::3] = x[::3]
    ordered = ~(np.isnan(x) | np.isnan(y)) if kind[0] == "f" else np.ones(32, bool)
    lines = [".reg .pred %p, %q;", f"setp.{name}.{kind} %p, %a, %b;", "selp.u32 %out, 1, 0, %p;"]
    np.testing.assert_array_equal(run_lanes(lines, [x, y], np.uint32), COMPARISONS[name](x, y) & ordered)
    if kind[0] == "f":
        lines[1] = f"setp.{name}u.{kind} %p, %a, %b;"
        np.testing.assert_array_equal(run_lanes(lines, [x, y], np.uint32), COMPARISONS[name](x, y) | ~ordered)


def test_joined_comparisons():
    x, y = values("s32"), values("s32", 1)
    lines = [
        ".reg .pred %p, %q, %r;", "setp.lt.s32 %r, %a, 0;", "setp.lt.or.s32 %p|%q, %a, %b, !%r;", "selp.u32 %out, 1, 0, %p;",
        "@%q add.u32 %out, %out, 2;",
    ]  # fmt: skip
    wanted = ((x < y) | (x >= 0)) + 2 * (~(x < y) | (x >= 0))
    np.testing.assert_array_equal(run_lanes(lines, [x, y], np.uint32), wanted)


def test_ordered_or_not():
    for kind in ("f32", "f64"):
        x, y = values(kind), values(kind, 1)
        neither = ~(np.isnan(x) | np.isnan(y))
        for name, wanted in (("num", neither), ("nan", ~neither)):
            lines = [".reg .pred %p;", f"setp.{name}.{kind} %p, %a, %b;", "selp.u32 %out, 1, 0, %p;"]
            np.testing.assert_array_equal(run_lanes(lines, [x, y], np.uint32), wanted)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_choice_and_predicates(kind):
    x, y = values(kind), values(kind, 1)
    lines = [
        ".reg .pred %p, %q, %r; .reg .b32 %z; mov.u32 %z, %tid.x;", "setp.lt.u32 %p, %z, 20;", "setp.gt.u32 %q, %z, 10;",
        "xor.pred %r, %p, %q;", f"selp.{kind} %out, %a, %b, %r;",
    ]  # fmt: skip
    lane = np.arange(32)
    np.testing.assert_array_equal(run_lanes(lines, [x, y], x.dtype), np.where((lane < 20) ^ (lane > 10), x, y))


def test_parts():
    x = values("u64")
    lines = [".reg .b32 %l, %h;", "mov.b64 {%l, %h}, %a;", "mov.b64 %out, {%h, %l};"]
    np.testing.assert_array_equal(run_lanes(lines, [x], np.uint64), x << np.uint64(32) | x >> np.uint64(32))
    lines = [".reg .b16 %s<4>;", "mov.b64 {%s0, %s1, %s2, %s3}, %a;", "mov.b64 %out, {%s3, %s2, %s1, %s0};"]
    turned = x.view(np.uint16).reshape(32, 4)[:, ::-1]
    np.testing.assert_array_equal(run_lanes(lines, [x], np.uint64).view(np.uint16).reshape(32, 4), turned)
    x = values("u64")
    lines = [".reg .b32 %l, %h; .reg .b16 %s<4>;", "mov.b64 {%l, %h}, %a;", "mov.b32 {%s0, %s1}, %l;", "mov.b32 {_, %s3}, %h;",
             "mov.b64 %out, {%s1, %s0, %s3, %s3};"]  # fmt: skip
    parts = x.view(np.uint16).reshape(32, 4)
    np.testing.assert_array_equal(run_lanes(lines, [x], np.uint64).view(np.uint16).reshape(32, 4), parts[:, [1, 0, 3, 3]])


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", INTEGERS)
def test_conversions_between_integers(source, to):
    check(f"cvt.{to}.{source}", [source], to, lambda x: wrapped(to, *ints(x)))


@pytest.mark.parametrize("kind", INTEGERS)
def test_conversions_of_integers_and_floats(kind):
    info = np.iinfo(KIND[kind])
    x = values("f32") * np.float32(1000)
    for mode, rounded in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        with np.errstate(all="ignore"):
            wanted = [
                (0 if info.bits < 64 else 1 << 63 if info.min == 0 else info.min)
                if math.isnan(v)
                else max(info.min, min(info.max, int(v) if math.isfinite(v) else int(math.copysign(1e30, v))))
                for v in rounded(x)
            ]
        check(f"cvt.{mode}.{kind}.f32", None, kind, lambda _, w=wanted: np.array(w, dtype=KIND[kind]), [x])
    check(f"cvt.rn.f32.{kind}", [kind], "f32", lambda x: x.astype(np.float32))
    check(f"cvt.rn.f64.{kind}", [kind], "f64", lambda x: x.astype(np.float64))


def test_bytes_in_wider_registers():
    x = values("u32")
    low = x & 255
    np.testing.assert_array_equal(run_lanes(["cvt.u32.u8 %out, %a;"], [x], np.uint32), low)
    np.testing.assert_array_equal(run_lanes(["cvt.s32.s8 %out, %a;"], [x], np.int32), low.astype(np.uint8).view(np.int8))
    np.testing.assert_array_equal(run_lanes(["cvt.rn.f32.u8 %out, %a;"], [x], np.float32), low.astype(np.float32))
    np.testing.assert_array_equal(run_lanes(["cvt.u16.u32 %out, %a;"], [x], np.uint32), x & 0xFFFF)
    np.testing.assert_array_equal(
        run_lanes(["cvt.s16.s32 %out, %a;"], [x.view(np.int32)], np.int32), x.astype(np.uint16).view(np.int16)
    )
