"""Numbers of 16 and 8 bits: comparisons, conversions, what is cut; two integers at once; integers
of many words."""

import math

import ml_dtypes
import numpy as np
import pytest

from tests.ptxsim.lanes import KIND, run_lanes
from tests.ptxsim.test_alu import COMPARISONS, INTEGERS, ints, values, wrapped
from tests.ptxsim.test_alu_more import flush
from tests.ptxsim.test_half import FORMATS, floats, numbers, rounded

TINY = {"f16": 2.0**-14, "bf16": 2.0**-126}


def some(kind, seed):
    """(bits, float64) with equal and subnormal ones among them."""
    bits = numbers(kind, seed)[0]
    bits[::5] = numbers(kind, 0)[0][::5]
    bits[1:4] = [1, 0x8002, 0x0003]
    return bits, floats(kind, bits)


def twice(bits):
    """Two in 32 bits: the upper one is the next lane's."""
    return bits.astype(np.uint32) | np.roll(bits, 1).astype(np.uint32) << 16


def apart(found):
    return found.view(np.uint16).reshape(32, 2)


def directed(kind, x, mode):
    """Rounded toward zero, down or up."""
    low = rounded(kind, x, toward_zero=True)
    bits, lowest, largest = FORMATS[kind]
    x = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        unit = np.exp2(np.maximum(np.frexp(x)[1] - bits, lowest).astype(np.float64))
        away = low + np.copysign(unit, x)
        away = np.where(np.abs(away) > largest, np.copysign(np.inf, x), away)
    up = (x != low) & ((x > 0) if mode == "rp" else (x < 0)) & (mode != "rz") & ~np.isnan(x)
    return np.where(up, away, low)


@pytest.mark.parametrize("kind", FORMATS)
def test_sums_of_two_widths(kind):
    (a, x), (b, y) = some(kind, 0), some(kind, 1)
    c = np.random.default_rng(0).normal(size=32).astype(np.float32)
    with np.errstate(all="ignore"):
        wanted = {"fma.rn": x * y + c, "add": x + c, "sub": x - c}
        for name, value in wanted.items():
            lines = [f"{name}.f32.{kind} %out, %a, {'%b, ' * (name == 'fma.rn')}%c;"]
            np.testing.assert_array_equal(run_lanes(lines, [a, b, c], np.float32), value.astype(np.float32), err_msg=name)


@pytest.mark.parametrize("kind", FORMATS)
def test_comparisons(kind):
    (a, x), (b, y) = some(kind, 0), some(kind, 1)
    for ftz in ("", ".ftz") if kind == "f16" else ("",):
        if ftz:
            x, y = (np.where(np.abs(v) < TINY[kind], 0, v) for v in (x, y))
        ordered = ~(np.isnan(x) | np.isnan(y))
        wanted = {name: function(x, y) & ordered for name, function in COMPARISONS.items()}
        wanted |= {f"{name}u": function(x, y) | ~ordered for name, function in COMPARISONS.items()}
        for name, value in {**wanted, "num": ordered, "nan": ~ordered}.items():
            lines = [".reg .pred %p, %q; .reg .b32 %r;", f"setp.{name}{ftz}.{kind} %p, %a, %b;", "selp.u32 %out, 1, 0, %p;"]
            np.testing.assert_array_equal(run_lanes(lines, [a, b], np.uint32), value, err_msg=name)
            found = run_lanes([f"set.{name}{ftz}.{kind}.{kind} %out, %a, %b;"], [a, b], np.uint16)
            np.testing.assert_array_equal(floats(kind, found), value)
            lines[1:] = [f"setp.{name}{ftz}.{kind}x2 %p|%q, %a, %b;", "selp.u32 %out, 1, 0, %p;", "selp.u32 %r, 2, 0, %q;",
                         "add.u32 %out, %out, %r;"]  # fmt: skip
            found = run_lanes(lines, [twice(a), twice(b)], np.uint32)
            np.testing.assert_array_equal(found, value + 2 * np.roll(value, 1))
    found = apart(run_lanes([f"set.gt.u32.{kind}x2 %out, %a, %b;"], [twice(a), twice(b)], np.uint32))
    more = np.greater(*(floats(kind, v) for v in (a, b)))
    np.testing.assert_array_equal(found, np.stack([more, np.roll(more, 1)], 1) * np.uint16(0xFFFF))
    found = apart(run_lanes([f"set.gt.{kind}x2.{kind}x2 %out, %a, %b;"], [twice(a), twice(b)], np.uint32))
    np.testing.assert_array_equal(floats(kind, found[:, 1]), np.roll(more, 1))


def test_set_of_other_types():
    x, y = values("f32"), values("f32", 1)
    y[::3] = x[::3]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(run_lanes(["set.ltu.f32.f32 %out, %a, %b;"], [x, y], np.float32), ~(x >= y))
        np.testing.assert_array_equal(run_lanes(["set.ge.s32.f32 %out, %a, %b;"], [x, y], np.int32), -(x >= y).astype(np.int32))


@pytest.mark.parametrize("to", ["u8", "s8", *INTEGERS])
def test_integers_from_halves(to):
    info = np.iinfo({"u8": np.uint8, "s8": np.int8, **KIND}[to])
    out = "s32" if info.bits == 8 else to

    def check(name, inputs, x):
        for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            # NaN is 0, or where 64 bits take part the highest bit alone
            lost = 0 if info.bits < 64 and name != "f64" else 1 << info.bits - 1 if info.min == 0 else info.min
            near = np.clip(function(x), -1e30, 1e30)
            wanted = [lost if math.isnan(v) else max(info.min, min(info.max, int(v))) for v in near]
            how, source = (f"{mode}.ftz", "f32") if name == "ftz" else (mode, name)
            found = run_lanes([f"cvt.{how}.{to}.{source} %out, %a;"], [inputs], KIND[out])
            np.testing.assert_array_equal(found, wrapped(out, wanted), err_msg=f"{mode} {name}")

    for kind in FORMATS:
        bits = np.where(np.arange(32) % 2, numbers(kind, 3)[0], some(kind, 4)[0])
        bits[10:16] = {"f16": [0x3800, 0x3E00, 0x4100, 0xB800, 0x5C00, 0xD800],
                       "bf16": [0x3F00, 0x3FC0, 0x4020, 0xBF00, 0x4380, 0xC300]}[kind]  # fmt: skip
        check(kind, bits, floats(kind, bits))
    x = values("f32") * np.float32(100)
    x[4:10] = [1e-40, -1e-40, 0.5, -0.5, 2.5, 300]
    check("ftz", x, flush(x))
    if info.bits == 8:
        check("f32", x, x)
    check("f64", x.astype(np.float64), x.astype(np.float64))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("source", [*INTEGERS, "s8", "u8"])
def test_halves_from_integers(kind, source):
    x = values(source if source in INTEGERS else "s32")
    if source in ("u64", "s64", "u32", "s32"):
        x[8:12] = [257, 65519, 65520, (1 << 24) + (1 << 16) + 1]  # beside a tie of bf16
    held = x.astype({"u8": np.uint8, "s8": np.int8, **KIND}[source])
    bits, lowest, largest = FORMATS[kind]
    for mode in ("rn", "rz", "rm", "rp"):
        found = floats(kind, run_lanes([f"cvt.{mode}.{kind}.{source} %out, %a;"], [x], np.uint16))
        for got, v in zip(found, (int(v) for v in held), strict=True):
            unit = 1 << max(abs(v).bit_length() - bits, 0)
            low, rest = v // unit, v % unit
            up = {"rn": 2 * rest > unit or (2 * rest == unit and low & 1), "rz": rest and v < 0, "rm": 0, "rp": rest > 0}[mode]
            wanted = (low + bool(up)) * unit
            if abs(wanted) > largest:
                inward = mode == "rz" or mode == ("rm" if v > 0 else "rp")
                wanted = math.copysign(largest if inward else math.inf, wanted)
            assert got == wanted, (mode, v)


@pytest.mark.parametrize("kind", FORMATS)
def test_between_floats(kind):
    bits, x = some(kind, 5)
    other = "bf16" if kind == "f16" else "f16"
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        found = floats(kind, run_lanes([f"cvt.{mode}.{kind}.{kind} %out, %a;"], [bits], np.uint16))
        np.testing.assert_array_equal(found, function(x))
        found = run_lanes([f"cvt.{mode}.f64.f64 %out, %a;"], [values("f64")], np.float64)
        np.testing.assert_array_equal(found, function(values("f64")))
    np.testing.assert_array_equal(run_lanes([f"cvt.f64.{kind} %out, %a;"], [bits], np.float64), x)
    steps, lowest, largest = FORMATS[kind]
    wide = values("f64")
    wide[8:18] = [1 + 2.0**-steps, 1 + 3 * 2.0**-steps, 1 + 2.0**-steps + 2.0**-50, 1.5 * 2.0**lowest, 2.5 * 2.0**lowest,
                  2.0 ** (lowest - 1), -(2.0**-200), largest * (1 + 2.0**-20), -largest * (1 + 2.0**-20), 1e300]  # fmt: skip
    for mode in ("rn", "rz", "rm", "rp"):
        wanted = rounded(kind, wide) if mode == "rn" else directed(kind, wide, mode)
        found = run_lanes([f"cvt.{mode}.{kind}.f64 %out, %a;"], [wide], np.uint16)
        np.testing.assert_array_equal(floats(kind, found), wanted, err_msg=mode)
        with np.errstate(all="ignore"):
            single = wide.astype(np.float32)
        wanted = rounded(kind, single) if mode == "rn" else directed(kind, single, mode)
        found = run_lanes([f"cvt.{mode}.{kind}.f32 %out, %a;"], [single], np.uint16)
        np.testing.assert_array_equal(floats(kind, found), wanted, err_msg=mode)
        wanted = rounded(other, x) if mode == "rn" else directed(other, x, mode)
        found = run_lanes([f"cvt.{mode}.{other}.{kind} %out, %a;"], [bits], np.uint16)
        np.testing.assert_array_equal(floats(other, found), wanted, err_msg=mode)
    y = np.roll(single, 3)
    for relu in ("", ".relu"):
        for mode in ("rn", "rz"):
            first, second = (rounded(kind, v, toward_zero=mode == "rz") for v in (single, y))
            if relu:
                first, second = np.where(first < 0, 0, first), np.where(second < 0, 0, second)
            found = run_lanes([f"cvt.{mode}{relu}.{kind}.f32 %out, %a;"], [single], np.uint16)
            np.testing.assert_array_equal(floats(kind, found), first)
            found = apart(run_lanes([f"cvt.{mode}{relu}.{kind}x2.f32 %out, %a, %b;"], [single, y], np.uint32))
            np.testing.assert_array_equal(floats(kind, found[:, 1]), first)
            np.testing.assert_array_equal(floats(kind, found[:, 0]), second)


def test_flushed_halves():
    x = values("f32")
    x[:3] = [1e-40, -1e-40, 2.0**-24]
    found = run_lanes(["cvt.rn.ftz.f16.f32 %out, %a;"], [x], np.uint16)
    np.testing.assert_array_equal(floats("f16", found), rounded("f16", flush(x)))
    bits, y = some("f16", 1)
    np.testing.assert_array_equal(run_lanes(["cvt.ftz.f32.f16 %out, %a;"], [bits], np.float32), y.astype(np.float32))


@pytest.mark.parametrize("to", ["u8", "s8", *INTEGERS])
@pytest.mark.parametrize("source", INTEGERS)
def test_integers_that_saturate(to, source):
    x = values(source)
    x[6:12] = [127, 128, 255, 256, 32767, 32768 if source != "s16" else -129]
    out = "s32" if to[1:] == "8" else to
    info = np.iinfo({"u8": np.uint8, "s8": np.int8, **KIND}[to])
    found = run_lanes([f"cvt.sat.{to}.{source} %out, %a;"], [x], KIND[out])
    np.testing.assert_array_equal(found, wrapped(out, [max(info.min, min(info.max, int(v))) for v in x]))


FUNCTIONS = {"tanh.approx": np.tanh, "ex2.approx": np.exp2}
CUT = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "fma.rn": lambda x, y, z: x * y + z}


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_and_what_is_cut(kind):
    held = [some(kind, seed) for seed in range(3)]
    bits, x = zip(*held, strict=True)

    def check(opcode, count, wanted):
        operands = ", ".join(f"%{c}" for c in "abc"[:count])
        found = run_lanes([f"{opcode}.{kind} %out, {operands};"], list(bits[:count]), np.uint16)
        np.testing.assert_array_equal(floats(kind, found), wanted, err_msg=opcode)
        found = apart(run_lanes([f"{opcode}.{kind}x2 %out, {operands};"], [twice(v) for v in bits[:count]], np.uint32))
        np.testing.assert_array_equal(floats(kind, found[:, 0]), wanted, err_msg=opcode)
        np.testing.assert_array_equal(floats(kind, found[:, 1]), np.roll(wanted, 1), err_msg=opcode)

    with np.errstate(all="ignore"):
        check("tanh.approx", 1, rounded(kind, np.tanh(x[0])))
        near = np.where(np.abs(x[0]) < 2.0**-126, 0, x[0])
        wanted = rounded(kind, np.exp2(near))
        wanted = np.where(np.abs(wanted) < 2.0**-126, 0, wanted)
        check("ex2.approx" if kind == "f16" else "ex2.approx.ftz", 1, wanted)
        exact = rounded(kind, x[0] * x[1] + x[2])
        check("fma.rn.relu", 3, np.where(exact < 0, 0, exact))
        check("min.NaN", 2, np.minimum(*x[:2]))
        check("max.NaN", 2, np.maximum(*x[:2]))
        for name, function in CUT.items() if kind == "f16" else ():
            count = 3 if "fma" in name else 2
            exact = rounded(kind, function(*x[:count]))
            check(f"{name}.sat", count, np.where(np.isnan(exact), 0, np.clip(exact, 0, 1)))


EIGHT = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


@pytest.mark.parametrize("kind", EIGHT)
def test_eight_bits(kind):
    dtype, largest = EIGHT[kind]

    def narrow(x, relu):
        x = np.where(np.isnan(x), x, np.clip(x, 0 if relu else -largest, largest))
        return x.astype(dtype)

    def same(found, wanted):
        np.testing.assert_array_equal(found.view(dtype).astype(np.float32), wanted.astype(np.float32))
        assert (found[np.isnan(wanted.astype(np.float32))] == 0x7F).all()

    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    near = np.sort(every)
    ties = ((near[1:].astype(np.float64) + near[:-1]) / 2).astype(np.float32)  # exact
    around = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)), every]
    edges = np.float32([np.nan, np.inf, -np.inf, -0.0, 1e-40, -1e-9, 449, 464, 465, 480, 57345, 61440, 65536, -1e30])
    x = np.concatenate([*around, edges])
    x = np.resize(x, -(-len(x) // 32) * 32)
    for relu in ("", ".relu"):
        for part in x.reshape(-1, 32):
            other = np.roll(part, 1)
            found = run_lanes([f"cvt.rn.satfinite{relu}.{kind}x2.f32 %out, %a, %b;"], [part, other], np.uint16)
            found = found.view(np.uint8).reshape(32, 2)
            same(found[:, 1].copy(), narrow(part, relu))
            same(found[:, 0].copy(), narrow(other, relu))
        for part in x[np.abs(np.nan_to_num(x)) < 60000][:320].reshape(-1, 32).astype(np.float16):
            found = run_lanes([f"cvt.rn.satfinite{relu}.{kind}x2.f16x2 %out, %a;"], [twice(part.view(np.uint16))], np.uint16)
            found = found.view(np.uint8).reshape(32, 2)
            same(found[:, 0].copy(), narrow(part.astype(np.float32), relu))
            same(found[:, 1].copy(), narrow(np.roll(part, 1).astype(np.float32), relu))
        for part in np.arange(256, dtype=np.uint8).reshape(-1, 32):
            both = part.astype(np.uint16) | np.roll(part, 1).astype(np.uint16) << 8
            found = apart(run_lanes([f"cvt.rn{relu}.f16x2.{kind}x2 %out, %a;"], [both], np.uint32))
            wanted = part.view(dtype).astype(np.float32)
            wanted = np.where(wanted < 0, 0, wanted) if relu else wanted
            np.testing.assert_array_equal(floats("f16", found[:, 0]), wanted)
            np.testing.assert_array_equal(floats("f16", found[:, 1]), np.roll(wanted, 1))


def test_two_integers_at_once():
    x, y = values("u32"), values("u32", 1)
    for kind in ("u16", "s16"):
        a, b = (v.view(KIND[kind]).reshape(32, 2) for v in (x, y))
        wanted = {"add": a + b, "min": np.minimum(a, b), "max": np.maximum(a, b)}
        if kind == "s16":
            wanted |= {"min.relu": np.maximum(np.minimum(a, b), 0), "max.relu": np.maximum(np.maximum(a, b), 0)}
        for name, value in wanted.items():
            found = run_lanes([f"{name}.{kind}x2 %out, %a, %b;"], [x, y], np.uint32)
            np.testing.assert_array_equal(found.view(KIND[kind]).reshape(32, 2), value, err_msg=name)


def test_bytes_in_registers_of_their_own():
    x = values("u16")
    lines = [".reg .b8 %u, %v;", "mov.b16 {%u, %v}, %a;", "mov.b16 %out, {%v, %u};"]
    np.testing.assert_array_equal(run_lanes(lines, [x], np.uint16), x << 8 | x >> 8)
    lines = [".reg .b8 %u;", "cvt.u8.u16 %u, %a;", "mov.b16 %out, {%u, 3};"]
    np.testing.assert_array_equal(run_lanes(lines, [x], np.uint16), (x & 255) | 0x300)


@pytest.mark.parametrize("bits", [32, 64])
def test_integers_of_two_words(bits):
    kind, low = f"u{bits}", (1 << bits) - 1
    parts = [values(kind, seed) for seed in range(4)]
    parts[0][::3], parts[2][::3] = low, 1  # which carry
    x, y = ([lo | hi << bits for lo, hi in zip(*ints(*pair), strict=True)] for pair in (parts[:2], parts[2:]))
    for op, value in (("add", lambda a, b: a + b), ("sub", lambda a, b: a - b)):
        lines = [f".reg .b{bits} %l;", f"{op}.cc.{kind} %l, %a, %c;", f"{op}c.cc.{kind} %out, %b, %d;"]
        wanted = [value(a, b) for a, b in zip(x, y, strict=True)]
        np.testing.assert_array_equal(run_lanes(lines, parts, KIND[kind]), wrapped(kind, [v >> bits for v in wanted]))
        lines += [f"{op}c.{kind} %out, %a, 0;"]
        borrowed = [v >> 2 * bits & 1 for v in wanted]
        carried = wrapped(kind, [value(a & low, v) for a, v in zip(x, borrowed, strict=True)])
        np.testing.assert_array_equal(run_lanes(lines, parts, KIND[kind]), carried)
        # of a difference the flag says that nothing was borrowed
        lines[-1] = f"addc.{kind} %out, 0, 0;"
        flag = [v ^ (op == "sub") for v in borrowed]
        np.testing.assert_array_equal(run_lanes(lines, parts, KIND[kind]), np.array(flag, KIND[kind]))
    # a product of two words and one: its second and third word
    lines = [f".reg .b{bits} %l, %m;", f"mul.lo.{kind} %l, %a, %c;", f"mad.lo.cc.{kind} %l, %a, %c, %d;",
             f"madc.hi.cc.{kind} %m, %a, %c, 0;", f"madc.hi.{kind} %out, %b, %c, 0;",
             f"mad.lo.cc.{kind} %m, %b, %c, %m;"]  # fmt: skip
    first = [a & low for a in x]
    second = [(a * (b & low) + (b >> bits)) >> bits for a, b in zip(first, y, strict=True)]
    wanted = [(s + (a >> bits) * (b & low)) & low for s, a, b in zip(second, x, y, strict=True)]
    found = run_lanes([*lines, f"mov.b{bits} %out, %m;"], parts, KIND[kind])
    np.testing.assert_array_equal(found, wrapped(kind, wanted))
