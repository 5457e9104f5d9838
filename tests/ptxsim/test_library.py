"""CUDA's own functions, and what its kernels have beside their arguments, as nvcc compiles them."""

import math
import re

import numpy as np
import pytest
import torch

from lora_kernels.ptxsim import Kernel, SimulationError
from lora_kernels.ptxsim.nvcc import compile_ptx, find_nvcc
from tests.ptxsim.corpus import KERNELS

if find_nvcc() is None:
    pytest.skip("nvcc is not installed here (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

POINTS = np.concatenate([
    np.random.default_rng(0).standard_normal(200) * np.exp2(np.random.default_rng(1).integers(-12, 9, 200)),
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, 1e-40, -1e-40, 88.7, 89, -87.4, -103.9, -150, 1e5],
    [105615.5, -2e7, 1e30],
])  # fmt: skip


def erf(x):
    return np.array([math.erf(v) for v in x])


# float64's value, and how many of the last places it may be off: CUDA's own bound (its programming
# guide, appendix) and ours
SINGLE = {
    "exp": (np.exp, 2), "exp2": (np.exp2, 2), "expm1": (np.expm1, 2), "log": (np.log, 2), "log2": (np.log2, 2),
    "log1p": (np.log1p, 2), "sin": (np.sin, 2), "cos": (np.cos, 2), "tan": (np.tan, 4), "tanh": (np.tanh, 2),
    "sinh": (np.sinh, 3), "atan": (np.arctan, 2), "erf": (erf, 2), "cbrt": (np.cbrt, 1), "sqrt": (np.sqrt, 0.5),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2), "pow": (lambda x: np.abs(x) ** float(np.float32(1.7)), 4),
    "fmod": (lambda x: np.fmod(x, float(np.float32(1.3))), 0), "round": (lambda x: np.trunc(x + np.copysign(0.5, x)), 0),
    "fast_divide": (lambda x: x / 3, 2), "add_rz": (lambda x: x + float(np.float32(1e-3)), 1),
    "add_rd": (lambda x: x + float(np.float32(1e-3)), 1), "add_ru": (lambda x: x + float(np.float32(1e-3)), 1),
    "multiply_rz": (lambda x: x * float(np.float32(1.1)), 1), "divide_ru": (lambda x: x / 3, 1),
}  # fmt: skip
DOUBLE = {
    "exp": (np.exp, 2), "log": (np.log, 2), "sin": (np.sin, 2), "cos": (np.cos, 2), "tanh": (np.tanh, 2),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2), "pow": (lambda x: np.abs(x) ** 1.7, 2), "add_rz": (lambda x: x + 1e-3, 1),
}  # fmt: skip


def launch(source, entry, args, writes, threads=32, grid=1, arch="sm_80", **options):
    return Kernel(compile_ptx(KERNELS / source, arch), entry).launch((grid,), (threads,), args, writes, **options)


def results(entry, x):
    given, made = torch.from_numpy(x), torch.full((len(x),), -7.0, dtype=torch.from_numpy(x).dtype)
    launch("functions.cu", entry, [given, made, len(x)], [made], threads=64, grid=-(-len(x) // 64))
    return made.numpy()


def places_off(found, wanted, dtype):
    """How many of the last places of the exact value; NaN and infinities must be the same."""
    with np.errstate(all="ignore"):
        near = wanted.astype(dtype)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        fine = np.isfinite(near) & np.isfinite(found)
        # a largest number beside infinity is a place off
        assert (fine | np.isnan(wanted) | (found == near)).all()
        return (np.abs(found[fine].astype(wanted.dtype) - wanted[fine]) / np.spacing(np.abs(near[fine]))).max()


@pytest.mark.parametrize("name", SINGLE)
def test_functions(name):
    function, bound = SINGLE[name]
    with np.errstate(all="ignore"):
        x = POINTS.astype(np.float32)
        found, wanted = results(f"one_{name}", x), function(x.astype(np.float64))
    assert places_off(found, wanted, np.float32) <= bound


@pytest.mark.parametrize("name", DOUBLE)
def test_functions_of_doubles(name):
    function, bound = DOUBLE[name]
    with np.errstate(all="ignore"):
        found, wanted = results(f"double_{name}", POINTS), function(POINTS)
    assert places_off(found, wanted, np.float64) <= bound


def test_roundings_are_on_their_side():
    x = POINTS.astype(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) < 1e20)]
    exact = x.astype(np.float64) + float(np.float32(1e-3))
    down, up, zero = (results(f"one_add_{mode}", x).astype(np.float64) for mode in ("rd", "ru", "rz"))
    assert (down <= exact).all() and (up >= exact).all() and (np.abs(zero) <= np.abs(exact)).all() and (down < up).any()


def test_constants_and_variables():
    which, made = torch.arange(32, dtype=torch.int32) % 4, torch.zeros(32, dtype=torch.float64)
    launch("device.cu", "constants", [which, made], [made])
    factors, mixed = torch.tensor([1, 2.5, -3, 0]).double(), torch.tensor([10.0, 26.0]).double()
    assert torch.equal(made, factors[which.long()] + mixed[torch.arange(32) % 2])
    kernel = Kernel(compile_ptx(KERNELS / "device.cu"), "constants")
    with pytest.raises(SimulationError, match=r"ld: out of bounds, factors\+20 of 16 bytes"):
        kernel.launch((1,), (32,), [torch.full((32,), 5, dtype=torch.int32), made], [made])
    for _ in range(2):
        made = torch.zeros(32, dtype=torch.int32)
        launch("device.cu", "variables", [made], [made], shuffle=False)
        i = torch.arange(32)
        assert torch.equal(made, (3 + i % 2 + i % 5 + 1).int())


def test_counts_and_matches():
    for limit in (0, 5, 100):
        given, made = (torch.arange(96) < limit).int() * 9, torch.zeros(96, dtype=torch.int32)
        launch("device.cu", "counts", [given, made], [made], threads=96)
        assert (made == min(limit, 96) + 1000 * (limit > 95) + 2000 * (limit > 0)).all()
    given, wide = torch.arange(32, dtype=torch.int32) % 5, torch.arange(32) % 3 << 33
    made = torch.zeros(32, dtype=torch.int32)
    launch("device.cu", "matches", [given, wide, made], [made])
    same = [[sum(1 << j for j in range(32) if v[j] == v[i]) for i in range(32)] for v in (given.tolist(), wide.tolist())]
    wanted = [(a ^ b * 3 ^ 0x100000000) & 0xFFFFFFFF for a, b in zip(*same, strict=True)]
    assert made.numpy().view(np.uint32).tolist() == wanted


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_functions_that_are_called(arch):
    text = compile_ptx(KERNELS / "device.cu", arch)
    assert len(re.findall(r"\bcall", text)) >= 2
    given, made = torch.randn(32), torch.zeros(32)
    launch("device.cu", "calls", [given, made], [made], arch=arch)
    i = torch.arange(32)
    torch.testing.assert_close(made, given * i + given[1] + i + 1 + 3 * given)


def test_assertions_and_traps():
    given, made = torch.arange(1, 33, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    launch("device.cu", "asserts", [given, made], [made])
    assert torch.equal(given, made)
    given[9] = -1
    with pytest.raises(SimulationError, match=r"lane 9: assertion failed: given\[i\] > 0, .*device\.cu:\d+"):
        launch("device.cu", "asserts", [given, made], [made])
    given[9] = 77
    with pytest.raises(SimulationError, match="lane 9: trap"):
        launch("device.cu", "asserts", [given, made], [made])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("entry", "dtype"), [("halves", torch.float16), ("brains", torch.bfloat16)])
def test_halves(entry, dtype, arch):
    x = torch.cat([torch.randn(28) * 3, torch.tensor([float("nan"), 1.0, 2.0, -0.5])]).to(dtype)
    y = torch.where(torch.arange(32) % 3 == 0, x, torch.randn(32).to(dtype))
    z = torch.randn(32, 2).to(dtype)
    z[::4] = z[1::4]
    made = torch.zeros(32, dtype=torch.int32)
    launch("device.cu", entry, [x, y, z, made], [made], arch=arch)
    other = z[torch.arange(32) ^ 1]
    greater = (z > other).int()
    floors = torch.floor(x.float().nan_to_num(0)).int()
    wanted = (x > y).int() + 2 * (~(x >= y)).int() + 4 * x.isnan().int() + 8 * (z >= other).all(1).int()
    wanted += 16 * greater[:, 0] + 32 * greater[:, 1] + 64 * floors + (greater[:, 1] << 30)
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120"])  # by integers, by cvt
def test_bytes(arch):
    edges = torch.tensor([500.0, -1e9, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 0, 17, 19])
    given = torch.cat([torch.randn(16) * 10, edges, torch.randn(8)])
    narrow, made = torch.zeros(32, dtype=torch.uint8), torch.zeros(32)
    launch("device.cu", "bytes", [given, narrow, made], [narrow, made], arch=arch)
    first = given.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(narrow, first.view(torch.uint8))
    assert torch.equal(made, first.float() + 1000 * given.clamp(-57344, 57344).to(torch.float8_e5m2).float())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_shorts_and_products_of_many_words(arch):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2**32, 32, dtype=np.uint32)
    b = a[np.arange(32) ^ 1]
    made = torch.zeros(32, dtype=torch.int32)
    launch("device.cu", "shorts", [torch.from_numpy(a.view(np.int32)), made], [made], arch=arch)
    (ua, ub), (sa, sb) = ((a.view(t), b.view(t)) for t in (np.uint16, np.int16))
    parts = [ua + ub, np.maximum(sa, sb), np.minimum(ua, ub), np.maximum(ua, ub), np.minimum(sa, sb)]
    words = [np.ascontiguousarray(v).view(np.uint32) for v in parts]
    wanted = words[0] ^ words[1] ^ words[2] * np.uint32(3) ^ words[3] * np.uint32(5) ^ words[4] * np.uint32(7)
    np.testing.assert_array_equal(made.numpy().view(np.uint32), wanted)
    a = rng.integers(0, 2**64, (32, 2), dtype=np.uint64)
    a[::4, 1] = 0
    made = torch.zeros(32, 2, dtype=torch.int64)
    launch("device.cu", "quotients", [torch.from_numpy(a.view(np.int64)), made], [made], arch=arch)
    x, got = ([int(v[0]) | int(v[1]) << 64 for v in pairs] for pairs in (a, made.numpy().view(np.uint64)))
    signed = [v - (v >> 127 << 128) for v in x]
    for i, v in enumerate(signed):
        by = [signed[i ^ 1], 1000003]
        first, second = (abs(v) // abs(b) * (1 if (v < 0) == (b < 0) else -1) for b in by)
        assert (got[i] - (first + v - second * by[1])) % 2**128 == 0
    a = rng.integers(0, 2**64, 32, dtype=np.uint64)
    made = torch.zeros(32, dtype=torch.int64)
    launch("device.cu", "products", [torch.from_numpy(a.view(np.int64)), made], [made], arch=arch)
    x, ones = [int(v) for v in a], (1 << 128) - 1
    for i, got in enumerate(made.numpy().view(np.uint64)):
        c = (x[i] * x[i ^ 1] + (x[i ^ 1] << 32)) & ones
        assert int(got) == ((c * x[i] - (c << 1)) & ones) >> 64
