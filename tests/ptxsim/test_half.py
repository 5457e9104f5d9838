"""Instructions on numbers of 16 bits, and conversions of floats, against float64 rounded once."""

import math

import numpy as np
import pytest
import torch

from tests.ptxsim.lanes import run_lanes
from tests.ptxsim.test_alu import values, wrapped

# bits of mantissa with the leading one, exponent of the smallest step, largest finite number
FORMATS = {"f16": (11, -24, 65504.0), "bf16": (8, -133, float(torch.finfo(torch.bfloat16).max))}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def rounded(kind, x, toward_zero=False):
    bits, lowest, largest = FORMATS[kind]
    x = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        unit = np.exp2(np.maximum(np.frexp(x)[1] - bits, lowest).astype(np.float64))
        y = (np.trunc if toward_zero else np.rint)(x / unit) * unit
        y = np.where(np.isfinite(x), y, x)
        over = np.isfinite(x) & (np.abs(y) > largest)
        return np.where(over, np.copysign(largest if toward_zero else np.inf, x), y)


def numbers(kind, seed):
    """(bits, float64): random ones of many sizes, and the edges."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(32) * 2.0 ** rng.integers(-6, 6, 32)
    x[:9] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, FORMATS[kind][2], 2.0 ** FORMATS[kind][1], -1.5]
    t = torch.from_numpy(rng.permutation(x)).to(DTYPES[kind])
    return t.view(torch.int16).numpy().view(np.uint16), t.double().numpy()


def floats(kind, bits):
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16).copy()).view(DTYPES[kind]).double().numpy()


OPERATIONS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax, "min.NaN": np.minimum,
    "max.NaN": np.maximum, "fma.rn": lambda x, y, z: x * y + z, "neg": np.negative, "abs": np.abs,
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, kind):
    count = {"fma.rn": 3, "neg": 1, "abs": 1}.get(name, 2)
    inputs = [numbers(kind, seed) for seed in range(count)]
    if count > 1:
        inputs[1][0][::4], inputs[1][1][::4] = inputs[0][0][::4], inputs[0][1][::4]
    with np.errstate(all="ignore"):
        wanted = rounded(kind, OPERATIONS[name](*(x for _, x in inputs)))
    operands = ", ".join(f"%{c}" for c in "abc"[:count])
    found = run_lanes([f"{name}.{kind} %out, {operands};"], [bits for bits, _ in inputs], np.uint16)
    np.testing.assert_array_equal(floats(kind, found), wanted)
    if "NaN" in name:
        return
    # two at once: the same in both halves, with the halves exchanged in the upper one
    pairs = [bits.astype(np.uint32) | np.roll(bits, 1).astype(np.uint32) << 16 for bits, _ in inputs]
    both = run_lanes([f"{name}.{kind}x2 %out, {operands};"], pairs, np.uint32).view(np.uint16).reshape(32, 2)
    np.testing.assert_array_equal(floats(kind, both[:, 0]), wanted)
    np.testing.assert_array_equal(floats(kind, both[:, 1]), np.roll(wanted, 1))


@pytest.mark.parametrize("kind", FORMATS)
def test_from_float32(kind):
    bits, lowest, _ = FORMATS[kind]
    x = values("f32")
    # halfway between two numbers, just beside, and among the smallest
    x[8:14] = [
        1 + 2.0**-bits,
        1 + 3 * 2.0**-bits,
        1 + 2.0**-bits + 2.0**-23,
        1.5 * 2.0**lowest,
        2.5 * 2.0**lowest,
        -(2.0 ** (lowest - 1)),
    ]
    x[14:16] = [65519.9, 65520.0]
    found = run_lanes([f"cvt.rn.{kind}.f32 %out, %a;"], [x], np.uint16)
    np.testing.assert_array_equal(floats(kind, found), rounded(kind, x))
    found = run_lanes([f"cvt.rz.{kind}.f32 %out, %a;"], [x], np.uint16)
    np.testing.assert_array_equal(floats(kind, found), rounded(kind, x, toward_zero=True))
    y = np.roll(x, 5)
    both = run_lanes([f"cvt.rn.{kind}x2.f32 %out, %a, %b;"], [x, y], np.uint32).view(np.uint16).reshape(32, 2)
    np.testing.assert_array_equal(floats(kind, both[:, 1]), rounded(kind, x))
    np.testing.assert_array_equal(floats(kind, both[:, 0]), rounded(kind, y))


@pytest.mark.parametrize("kind", FORMATS)
def test_to_float32_and_from_integers(kind):
    every = np.arange(0, 1 << 16, 67, dtype=np.uint16)[:960]
    for part in every.reshape(-1, 32):
        found = run_lanes([f"cvt.f32.{kind} %out, %a;"], [part], np.float32)
        np.testing.assert_array_equal(found.astype(np.float64), floats(kind, part))
    for source in ("u16", "s16", "u32", "s32", "u64", "s64"):
        x = values(source)
        found = run_lanes([f"cvt.rn.{kind}.{source} %out, %a;"], [x], np.uint16)
        # by way of float32 for bf16: integers of more than 24 bits may round twice
        exact = np.abs(x.astype(np.float64)) < 2**24
        np.testing.assert_array_equal(floats(kind, found)[exact], rounded(kind, x.astype(np.float64))[exact])


def test_between_floats():
    x = values("f32")
    np.testing.assert_array_equal(run_lanes(["cvt.f64.f32 %out, %a;"], [x], np.float64), x.astype(np.float64))
    y = values("f64")
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(run_lanes(["cvt.rn.f32.f64 %out, %a;"], [y], np.float32), y.astype(np.float32))
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        np.testing.assert_array_equal(run_lanes([f"cvt.{mode}.f32.f32 %out, %a;"], [x], np.float32), function(x))
    # ties go away from zero, and the low 13 bits are zeros
    z = np.float32([1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 - 2.0**-20, 3.0] * 8)
    wanted = np.float32([1 + 2.0**-10, -1 - 2.0**-10, 1.0, 3.0] * 8)
    np.testing.assert_array_equal(run_lanes(["cvt.rna.tf32.f32 %out, %a;"], [z], np.uint32).view(np.float32), wanted)
    np.testing.assert_allclose(run_lanes(["rsqrt.approx.f64 %out, %a;"], [np.abs(y)[:32] + 1], np.float64),
                               1 / np.sqrt(np.abs(y) + 1), rtol=1e-12)  # fmt: skip


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_from_float64(kind):
    info = np.iinfo(wrapped(kind, [0]).dtype)
    x = values("f64") * 1e3
    for mode, function in (("rni", np.rint), ("rzi", np.trunc)):
        wanted = []
        for v in function(x):
            far = 10**30 if v > 0 else -(10**30)
            lost = 1 << info.bits - 1 if info.min == 0 else info.min  # NaN: the highest bit alone
            wanted.append(lost if math.isnan(v) else max(info.min, min(info.max, int(v) if math.isfinite(v) else far)))
        found = run_lanes([f"cvt.{mode}.{kind}.f64 %out, %a;"], [x], info.dtype)
        np.testing.assert_array_equal(found, np.array(wanted, info.dtype))
    small = values(kind)
    bits = info.bits
    for narrow, dtype in (("u8", np.uint8), ("s8", np.int8)):
        lines = [f"cvt.{narrow}.{kind} %out, %a;"]
        np.testing.assert_array_equal(
            run_lanes(lines, [small], np.int32), small.astype(dtype).astype(np.int32), err_msg=str(bits)
        )
