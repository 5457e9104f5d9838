"""Roundings toward zero, down and up, and sums that saturate, against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptxsim.lanes import KIND, run_lanes
from tests.ptxsim.test_alu import INTEGERS, values
from tests.ptxsim.test_alu_more import flush

MOST = Fraction(float(np.finfo(np.float64).max))
MODES = ("rz", "rm", "rp")


def sign_of(value):
    return (value > 0) - (value < 0)


def directed(kind, mode, guess, past):
    """The number below or above an exact one, `past(c)` the sign of c minus it; `guess` is near
    it."""
    dtype = KIND[kind]
    low = dtype(min(max(guess, -float(np.finfo(dtype).max)), float(np.finfo(dtype).max)))

    def beyond(c):
        return sign_of(float(c)) if np.isinf(c) else past(Fraction(float(c)))

    while beyond(low) > 0:
        low = np.nextafter(low, dtype(-np.inf))
    while beyond(after := np.nextafter(low, dtype(np.inf))) <= 0:
        low = after
    if not np.isinf(low) and past(Fraction(float(low))) == 0:
        return low
    upward = mode == "rp" or (mode == "rz" and past(Fraction(0)) > 0)
    return np.nextafter(low, dtype(np.inf)) if upward else low


def exactly(kind, mode, function, *arrays):
    """Of sums and products of finite numbers; else as numpy has it."""
    with np.errstate(all="ignore"):
        made = []
        for each in zip(*arrays, strict=True):
            if not all(np.isfinite(each)):
                made.append(function(*each))
                continue
            exact = function(*(Fraction(float(v)) for v in each))
            if exact == 0:
                made.append(0)
                continue
            guess = sign_of(exact) * math.inf if abs(exact) >= Fraction(2) ** 1024 else float(min(max(exact, -MOST), MOST))
            made.append(directed(kind, mode, guess, lambda c, exact=exact: sign_of(c - exact)))
        return np.array(made, KIND[kind])


def inputs(kind, count):
    """Numbers of many sizes; sums that need a bit more, overflow, and vanish among the smallest."""
    tiny, most = float(np.finfo(KIND[kind]).smallest_subnormal), float(np.finfo(KIND[kind]).max)
    found = [values(kind, seed) for seed in range(count)]
    edges = [[1, tiny, 0.25], [-1, tiny, 3], [most, most, 1], [-most, most, -1], [3 * tiny, 0.5, 0], [-3 * tiny, 0.5, tiny],
             [1.1, 1.3, -1.4], [most, -tiny, tiny], [tiny, tiny, -tiny], [most, 2, -most]]  # fmt: skip
    for i, row in enumerate(edges):
        for array, value in zip(found, row, strict=False):
            array[i] = value
    return found


OPERATIONS = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_sums_and_products(kind, mode):
    x, y, z = inputs(kind, 3)
    cases = [(name, function, (x, y)) for name, function in OPERATIONS.items()]
    for name, function, given in [*cases, ("fma", lambda x, y, z: x * y + z, (x, y, z))]:
        operands = ", ".join(f"%{c}" for c in "abc"[: len(given)])
        found = run_lanes([f"{name}.{mode}.{kind} %out, {operands};"], list(given), KIND[kind])
        np.testing.assert_array_equal(found, exactly(kind, mode, function, *given), err_msg=name)
        if kind == "f32":
            flushed = [flush(v) for v in given]
            found = run_lanes([f"{name}.{mode}.ftz.f32 %out, {operands};"], list(given), np.float32)
            np.testing.assert_array_equal(found, flush(exactly(kind, mode, function, *flushed)), err_msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_quotients_and_roots(kind, mode):
    def quotient(x, y):
        return KIND[kind](x) / KIND[kind](y) if not (np.isfinite(float(x)) and np.isfinite(float(y))) or y == 0 else x / y

    def root(v):
        if not np.isfinite(v) or v <= 0:
            return np.sqrt(v)
        exact = Fraction(float(v))
        return directed(kind, mode, float(np.sqrt(v)), lambda c: sign_of(c * c - exact) if c >= 0 else -1)

    with np.errstate(all="ignore"):
        for ftz in ("", ".ftz") if kind == "f32" else ("",):
            x, y = inputs(kind, 2)
            fx, fy = (flush(x), flush(y)) if ftz else (x, y)
            end = flush if ftz else np.asarray
            # what is divided by zero is infinite or NaN in any rounding
            fits = fy != 0
            found = run_lanes([f"div.{mode}{ftz}.{kind} %out, %a, %b;"], [x, y], KIND[kind])
            np.testing.assert_array_equal(found[fits], end(exactly(kind, mode, quotient, fx[fits], fy[fits])))
            np.testing.assert_array_equal(found[~fits], fx[~fits] / fy[~fits])
            found = run_lanes([f"rcp.{mode}{ftz}.{kind} %out, %a;"], [y], KIND[kind])
            one = np.ones_like(fy)
            np.testing.assert_array_equal(found[fits], end(exactly(kind, mode, quotient, one[fits], fy[fits])))
            found = run_lanes([f"sqrt.{mode}{ftz}.{kind} %out, %a;"], [np.abs(x)], KIND[kind])
            np.testing.assert_array_equal(found, end(np.array([root(v) for v in np.abs(fx)], KIND[kind])))


def test_the_sign_of_a_sum_that_is_zero():
    x = np.full(32, 1.5, np.float32)
    for mode, negative in (("rn", False), ("rz", False), ("rm", True), ("rp", False)):
        found = run_lanes([f"sub.{mode}.f32 %out, %a, %b;"], [x, x], np.float32)
        assert (found == 0).all() and (np.signbit(found) == negative).all()
    # the host's own rounding is what it was
    assert np.float32(1) + np.float32(2**-24) == 1 and np.float32(-1) - np.float32(2**-24) == -1


@pytest.mark.parametrize("mode", MODES)
def test_conversions(mode):
    x = inputs("f64", 1)[0]
    x[12:20] = [1 + 2.0**-30, -1 - 2.0**-30, 1e-46, -1e-46, 1e39, -1e39, 3e-39, 2.0**-149]
    wanted = exactly("f32", mode, lambda v: v, x)
    np.testing.assert_array_equal(run_lanes([f"cvt.{mode}.f32.f64 %out, %a;"], [x], np.float32), wanted)
    np.testing.assert_array_equal(run_lanes([f"cvt.{mode}.ftz.f32.f64 %out, %a;"], [x], np.float32), flush(wanted))
    for kind in INTEGERS:
        whole = values(kind)
        for to in ("f32", "f64"):
            found = run_lanes([f"cvt.{mode}.{to}.{kind} %out, %a;"], [whole], KIND[to])
            wanted = [directed(to, mode, float(v), lambda c, v=v: sign_of(c - int(v))) for v in whole]
            np.testing.assert_array_equal(found, np.array(wanted, KIND[to]), err_msg=kind)


def test_sums_that_saturate():
    x, y, z = inputs("f32", 3)
    with np.errstate(all="ignore"):
        for ftz in ("", ".ftz"):
            a, b, c = (flush(v) if ftz else v for v in (x, y, z))
            wanted = {"add": a + b, "sub": a - b, "mul": a * b}
            for name, value in wanted.items():
                found = run_lanes([f"{name}{ftz}.sat.f32 %out, %a, %b;"], [x, y], np.float32)
                np.testing.assert_array_equal(found, np.where(np.isnan(value), 0, np.clip(value, 0, 1)), err_msg=name)
            value = (a.astype(np.float64) * b + c).astype(np.float32)
            found = run_lanes([f"fma.rn{ftz}.sat.f32 %out, %a, %b, %c;"], [x, y, z], np.float32)
            np.testing.assert_array_equal(found, np.where(np.isnan(value), 0, np.clip(value, 0, 1)))
        wide = np.float64([1e-40, -1e-40, 1e-50, 1.1, 1e300, np.nan, np.inf, -0.0] * 4)
        found = run_lanes(["cvt.rn.ftz.f32.f64 %out, %a;"], [wide], np.float32)
        np.testing.assert_array_equal(found, flush(wide.astype(np.float32)))
        np.testing.assert_array_equal(run_lanes(["cvt.ftz.f64.f32 %out, %a;"], [x], np.float64), flush(x).astype(np.float64))
        np.testing.assert_array_equal(run_lanes(["cvt.ftz.f32.f32 %out, %a;"], [x], np.float32), flush(x))


def test_the_upper_half_of_a_double():
    x = np.abs(values("f64"))
    x[:3] = [3.0, 1 + 2.0**-40, 1e-300]
    for opcode, function in (("rcp", lambda v: 1 / v), ("rsqrt", lambda v: 1 / np.sqrt(v))):
        with np.errstate(all="ignore"):
            found = run_lanes([f"{opcode}.approx.ftz.f64 %out, %a;"], [x], np.float64)
            np.testing.assert_allclose(found, function(x), rtol=2.0**-19)
        assert not (found.view(np.uint64) & 0xFFFFFFFF).any()
