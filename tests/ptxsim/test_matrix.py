"""The matrix instructions of a warp against numpy, in the layout that PTX ISA 9.7.14 draws."""

import numpy as np
import pytest
import torch

from lora_kernels.ptxsim import Kernel
from tests.ptxsim.lanes import kernel_text

RNG = np.random.default_rng(0)


def run_registers(lines, inputs, outputs, head=()):
    """`lines` turn registers %i0… (each an array [32] of uint32) into %o0…; gives those [outputs,
    32]."""
    registers = [f".reg .b32 %t, %i<{len(inputs) + 1}>, %o<{outputs + 1}>, %s; .reg .b64 %a, %b, %c, %d;", *head]
    body = ["mov.u32 %t, %tid.x;", "ld.param.u64 %a, [x];", "ld.param.u64 %b, [y];", "mad.wide.u32 %c, %t, 4, %a;",
            "mad.wide.u32 %d, %t, 4, %b;"]  # fmt: skip
    body += [f"ld.global.b32 %i{i}, [%c+{128 * i}];" for i in range(len(inputs))]
    body += lines
    body += [f"st.global.b32 [%d+{128 * i}], %o{i};" for i in range(outputs)]
    x = torch.from_numpy(np.ascontiguousarray(np.stack(inputs)).view(np.int32).copy())
    y = torch.zeros(outputs, 32, dtype=torch.int32)
    Kernel(kernel_text(body, registers, [("x", "u64"), ("y", "u64")])).launch((1,), (32,), [x, y], [y])
    return y.numpy().view(np.uint32)


def braces(name, first, count):
    return "{" + ", ".join(f"%{name}{i}" for i in range(first, first + count)) + "}"


def fragment(matrix, per):
    """A [16, K] or B [K, 8] transposed: registers [count, 32], `per` elements side by side in
    depth, as whole numbers."""
    rows, depth = matrix.shape
    width = 32 // per
    found = []
    for half in range(depth // (4 * per)):
        for top in range(rows // 8):
            register = np.zeros(32, np.uint64)
            for lane in range(32):
                for e in range(per):
                    value = int(matrix[lane // 4 + 8 * top, lane % 4 * per + half * 4 * per + e]) & ((1 << width) - 1)
                    register[lane] |= np.uint64(value << (width * e))
            found.append(register.astype(np.uint32))
    return found


def numbers(kind, shape):
    """(the numbers in float64, their bits)."""
    if kind in ("s8", "u8"):
        x = RNG.integers(-128, 128, shape) if kind == "s8" else RNG.integers(0, 256, shape)
        return x.astype(np.float64), x
    x = RNG.standard_normal(shape).astype(np.float32)
    if kind == "tf32":
        bits = x.view(np.uint32) & 0xFFFFE000
        return bits.view(np.float32).astype(np.float64), bits
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    t = torch.from_numpy(x).to(dtype)
    return t.double().numpy(), t.view(torch.int16).numpy().view(np.uint16)


PER = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "u8": 4}
SHAPES = [(16, "bf16"), (8, "bf16"), (16, "f16"), (8, "f16"), (8, "tf32"), (4, "tf32"), (32, "s8"), (32, "u8"), (16, "s8")]


@pytest.mark.parametrize(("depth", "kind"), SHAPES, ids=str)
def test_mma(depth, kind):
    a, a_bits = numbers(kind, (16, depth))
    b, b_bits = numbers(kind, (depth, 8))
    whole = kind in ("s8", "u8")
    c = RNG.integers(-1000, 1000, (16, 8)).astype(np.int32) if whole else RNG.standard_normal((16, 8)).astype(np.float32)
    registers = fragment(a_bits, PER[kind]) + fragment(b_bits.T, PER[kind])
    c_bits = c.view(np.uint32)
    for r in range(4):
        registers.append(np.array([c_bits[i // 4 + r // 2 * 8, i % 4 * 2 + r % 2] for i in range(32)], np.uint32))
    n_a, n_b = 16 * depth // 32 // PER[kind], 8 * depth // 32 // PER[kind]
    out = "s32" if whole else "f32"
    line = f"mma.sync.aligned.m16n8k{depth}.row.col.{out}.{kind}.{kind}.{out} {braces('o', 0, 4)}, {braces('i', 0, n_a)}, "
    line += f"{braces('i', n_a, n_b)}, {braces('i', n_a + n_b, 4)};"
    found = run_registers([line], registers, 4)
    d = np.zeros((16, 8), np.uint32)
    for r in range(4):
        for i in range(32):
            d[i // 4 + r // 2 * 8, i % 4 * 2 + r % 2] = found[r, i]
    if whole:
        np.testing.assert_array_equal(d.view(np.int32), (a @ b).astype(np.int64) + c)
    else:
        np.testing.assert_allclose(d.view(np.float32), a @ b + c, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("kind_a", "kind_b"), [("s8", "u8"), ("u8", "s8")])
def test_mma_of_signed_and_unsigned(kind_a, kind_b):
    (a, a_bits), (b, b_bits) = numbers(kind_a, (16, 32)), numbers(kind_b, (32, 8))
    registers = fragment(a_bits, 4) + fragment(b_bits.T, 4) + [np.zeros(32, np.uint32)] * 4
    line = f"mma.sync.aligned.m16n8k32.row.col.s32.{kind_a}.{kind_b}.s32 {braces('o', 0, 4)}, {braces('i', 0, 4)}, "
    found = run_registers([line + f"{braces('i', 4, 2)}, {braces('i', 6, 4)};"], registers, 4).view(np.int32)
    d = np.zeros((16, 8), np.int32)
    for r in range(4):
        for i in range(32):
            d[i // 4 + r // 2 * 8, i % 4 * 2 + r % 2] = found[r, i]
    np.testing.assert_array_equal(d, a @ b)


@pytest.mark.parametrize("depth", [16, 32])
def test_mma_that_saturates(depth):
    a, b = np.full((16, depth), 127), np.full((depth, 8), 127)
    a[8:] = -128
    n_a, n_b = depth // 8, depth // 16
    start = np.full(32, 2**31 - 1000, np.int64)
    low = (-start).astype(np.uint32)
    start = start.astype(np.uint32)
    registers = fragment(a, 4) + fragment(b.T, 4) + [start, start, low, low]
    line = f"mma.sync.aligned.m16n8k{depth}.row.col.satfinite.s32.s8.s8.s32 {braces('o', 0, 4)}, {braces('i', 0, n_a)}, "
    found = run_registers([line + f"{braces('i', n_a, n_b)}, {braces('i', n_a + n_b, 4)};"], registers, 4).view(np.int32)
    assert (found[:2] == 2**31 - 1).all() and (found[2:] == -(2**31)).all()


@pytest.mark.parametrize("kind_a", ["e4m3", "e5m2"])
@pytest.mark.parametrize("kind_b", ["e4m3", "e5m2"])
def test_mma_of_eight_bits(kind_a, kind_b):
    dtypes = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    a, b = torch.randn(16, 32).to(dtypes[kind_a]), torch.randn(32, 8).to(dtypes[kind_b])
    a[0, :2] = torch.tensor([448.0, -(2.0**-9)]).to(dtypes[kind_a])  # the largest, and a subnormal
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    registers = fragment(a.view(torch.uint8).numpy(), 4) + fragment(b.view(torch.uint8).numpy().T, 4)
    c_bits = c.view(np.uint32)
    for r in range(4):
        registers.append(np.array([c_bits[i // 4 + r // 2 * 8, i % 4 * 2 + r % 2] for i in range(32)], np.uint32))
    line = f"mma.sync.aligned.m16n8k32.row.col.f32.{kind_a}.{kind_b}.f32 {braces('o', 0, 4)}, {braces('i', 0, 4)}, "
    found = run_registers([line + f"{braces('i', 4, 2)}, {braces('i', 6, 4)};"], registers, 4).view(np.float32)
    wanted = c
    for k in range(32):  # in order, in float32
        wanted = wanted + a.float().numpy()[:, k : k + 1] * b.float().numpy()[k]
    for r in range(4):
        for i in range(32):
            assert found[r, i] == wanted[i // 4 + r // 2 * 8, i % 4 * 2 + r % 2]


def test_mma_with_half_sums():
    a, a_bits = numbers("f16", (16, 16))
    b, b_bits = numbers("f16", (16, 8))
    c, c_bits = numbers("f16", (16, 8))
    registers = fragment(a_bits, 2) + fragment(b_bits.T, 2) + fragment(c_bits, 2)
    operands = ", ".join([braces("o", 0, 2), braces("i", 0, 4), braces("i", 4, 2), braces("i", 6, 2)])
    line = f"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {operands};"
    found = run_registers([line], registers, 2).view(np.float16).reshape(2, 32, 2)
    d = np.zeros((16, 8))
    for r in range(2):
        for i in range(32):
            d[i // 4 + 8 * r, i % 4 * 2 : i % 4 * 2 + 2] = found[r, i]
    np.testing.assert_allclose(d, a @ b + c, atol=4e-3, rtol=2e-3)


SHARED = [".shared .align 16 .b8 tile[1024];"]
# each lane fills 32 bytes of the tile; row i of matrix m lies at (8·m + i) · 32
FILL = ["mov.u32 %s, tile;", "mad.lo.u32 %s, %t, 32, %s;", "st.shared.v4.b32 [%s], {%i0, %i1, %i2, %i3};", "bar.sync 0;"]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count, trans):
    rows = RNG.integers(0, 2**16, (32, 8)).astype(np.uint16)
    inputs = list(rows.view(np.uint32).T)
    line = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {braces('o', 0, count)}, [%s];"
    found = run_registers([*FILL, line], inputs, count, SHARED)
    for m in range(count):
        matrix = rows[8 * m : 8 * m + 8]
        matrix = matrix.T if trans else matrix
        np.testing.assert_array_equal(found[m].view(np.uint16).reshape(8, 8), matrix)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix(count, trans):
    registers = [RNG.integers(0, 2**32, 32).astype(np.uint32) for _ in range(count)]
    store = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%s], {braces('i', 0, count)};"
    lines = ["mov.u32 %s, tile;", "mad.lo.u32 %s, %t, 32, %s;", store, "bar.sync 0;"]
    lines += [f".reg .pred %p; setp.lt.u32 %p, %t, {8 * count};"]
    lines += [line for i in range(4) for line in (f"mov.b32 %o{i}, 0;", f"@%p ld.shared.b32 %o{i}, [%s+{4 * i}];")]
    found = run_registers(lines, registers, 4, SHARED)
    for m in range(count):
        matrix = registers[m].view(np.uint16).reshape(8, 8)
        rows = np.ascontiguousarray(found[:, 8 * m : 8 * m + 8].T).view(np.uint16)
        np.testing.assert_array_equal(rows, matrix.T if trans else matrix)


def test_movmatrix():
    x = RNG.integers(0, 2**32, 32).astype(np.uint32)
    found = run_registers(["movmatrix.sync.aligned.m8n8.trans.b16 %o0, %i0;"], [x], 1)
    np.testing.assert_array_equal(found[0].view(np.uint16).reshape(8, 8), x.view(np.uint16).reshape(8, 8).T)


@pytest.mark.parametrize(("stride", "passes"), [(16, 1), (32, 2), (64, 4), (128, 8), (144, 1)])
def test_bank_conflicts_are_counted(stride, passes):
    """8 rows of 16 bytes, `stride` apart: rows whose distance is a multiple of 128 bytes share
    banks."""
    text = kernel_text(
        ["mov.u32 %t, %tid.x;", "mov.u32 %s, tile;", f"mad.lo.u32 %u, %t, {stride}, %s;", "mov.u32 %z, 0;",
         "st.shared.v4.b32 [%u], {%z, %z, %z, %z};", "bar.sync 0;",
         "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%o0, %o1, %o2, %o3}, [%u];"],
        [".reg .b32 %t, %s, %u, %z, %o<4>;", ".shared .align 16 .b8 tile[8192];"], [],
    )  # fmt: skip
    counters = Kernel(text).launch((1,), (32,), []).counters
    assert counters["shared_ideal"] == 8  # 32 times 16 bytes, 128 a pass, stored and loaded
    assert counters["shared_wavefronts"] == 8 * passes
