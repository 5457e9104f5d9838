"""Formats of quantised weights: tiles of scales, powers of two, zeros, orders of 4-bit codes, 8-bit
floats."""

import math
from dataclasses import replace

import pytest
import torch

from lora_kernels import QuantisedWeight, lora_linear, use_backend, weight_norm
from lora_kernels.ops.cpu_quantised import Packed, widened
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.ops.quantised.weight import E2M1, HALVES, HIGH_FIRST, LOW_FIRST, beyond_blocks
from lora_kernels.testing import assert_problem, make_problem
from tests.ops.cpu import at_level
from tests.ops.quantised import FORMATS, KINDS, make_format, make_quantised
from tests.ops.test_cpu_levels import levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POWERS = torch.float8_e8m0fnu


@pytest.fixture(params=levels())
def level(request):
    with at_level(request.param), use_backend("cpu"):
        yield request.param


def assert_same(found, wanted):
    """Bit for bit, but for the bits of a NaN."""
    assert found.dtype is wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    found, wanted = (t.masked_fill(wanted.isnan(), 0) for t in (found, wanted))
    integer = torch.int32 if found.dtype is torch.float32 else torch.int16
    assert torch.equal(found.view(integer), wanted.view(integer))


def by_hand(w, n, k):
    """Formula (1) of one number, its code and its scale found by plain arithmetic."""
    at = n * w.shape[1] + k
    if w.kind:
        value = w.codes[n, k].double()
    else:
        half = w.numel() // 2
        byte, second = (at % half, at >= half) if w.order == HALVES else (at // 2, at % 2 == 1)
        high = second if w.order == LOW_FIRST else not second
        value = w.table[int(w.codes[byte]) >> 4 if high else int(w.codes[byte]) & 15].double()
    tiles = -(-w.shape[1] // w.block)
    block = n // w.block_rows * tiles + k // w.block if w.block_rows else at // w.block
    if w.zeros is not None:
        value = value - w.zeros[block].double()
        value = value.to(w.dtype).double() if w.zero_rounded else value
    scale = w.scales.view(torch.uint8)[block].double().sub(127).exp2() if w.scales.dtype is POWERS else w.scales[block]
    return (value * scale.double()).float().to(w.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_the_formula_by_hand(name, dtype):
    """The reference, number by number, where blocks are cut off at both edges."""
    w = make_format(name, 7, 45, dtype, block=16, block_rows=3)
    wanted = torch.stack([by_hand(w, n, k) for n in range(w.shape[0]) for k in range(w.shape[1])])
    assert_same(dequantised(w), wanted.view(w.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_the_formulas(level, name, dtype):
    for n_out, n_in in ((1, 1), (1, 2), (3, 33), (17, 100), (6, 257), (5, 1100), (9, 256), (2, 4160)):
        for block, rows in ((1, 1), (7, 2), (16, 3), (32, 3), (128, 128)):
            w = make_format(name, n_out, n_in, dtype, block, rows)
            assert_same(w.dequantise(), dequantised(w))
            assert_same(w.dequantise(torch.float32), dequantised(w.to(torch.float32)))


@pytest.mark.parametrize("name", FORMATS)
def test_some_rows(level, name):
    """Rows from any one on, in the type of W rounded and widened."""
    w = make_format(name, 30, 45, torch.bfloat16, block=16, block_rows=7)
    for first, last in ((0, 1), (6, 9), (14, 15), (13, 30)):
        rows = widened(Packed.of(*w.fields()).some(slice(first, last)))
        assert_same(rows, dequantised(w)[first:last].float())


def test_every_code(level):
    """All bytes of each kind and order: NaN, infinities, zeros of both signs, subnormal numbers."""
    all_codes, one, table = torch.arange(256).to(torch.uint8), torch.ones(1), torch.tensor(E2M1)
    high, low = table[all_codes.long() >> 4], table[all_codes.long() & 15]
    for dtype in DTYPES:
        for order, *pair in ((HIGH_FIRST, (high, low), 1), (LOW_FIRST, (low, high), 1), (HALVES, (high, low), 0)):
            wanted = torch.stack(*pair)
            w = QuantisedWeight(all_codes, (1, 512), one, 512, dtype, table, order=order)
            assert_same(w.dequantise()[0], wanted.reshape(-1).to(dtype))
        for eight in (torch.float8_e4m3fn, torch.float8_e5m2):
            codes = all_codes.view(eight)
            for scale in (1.0, -3.0, 2.0**-20):
                w = QuantisedWeight(codes, (1, 256), one * scale, 256, dtype)
                assert_same(w.dequantise()[0], (codes.float() * scale).to(dtype))


def test_every_power(level):
    """2^-127 and NaN too, in one row and in a tile of each."""
    powers = torch.arange(256).to(torch.uint8).view(POWERS)
    codes = torch.full((1, 256), 0x51, dtype=torch.uint8)
    pairs = QuantisedWeight(codes, (1, 512), powers, 2, torch.float32, torch.tensor(E2M1), order=LOW_FIRST)
    assert_same(pairs.dequantise(), (torch.tensor([0.5, 3.0]) * powers.float()[:, None]).view(1, 512))
    tiles = QuantisedWeight(codes.view(16, 16).view(torch.int8), (16, 16), powers, 1, torch.float32, block_rows=1)
    assert_same(tiles.dequantise(), powers.float().view(16, 16) * 0x51)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -2.0, 1e-39, 3e38])
def test_odd_scales_and_zeros(level, value):
    for name in ("int4 zeros", "hqq", "int8 zeros", "e4m3 tiles", "e5m2 rows"):
        w = make_format(name, 6, 64, torch.bfloat16)
        for part in (w.scales, w.zeros):
            if part is not None:
                kept, part[1] = float(part[1]), value
                assert_same(w.dequantise(), dequantised(w))
                part[1] = kept


def test_where_subnormal_numbers_are_flushed(level):
    """A thread that flushes float32's subnormal numbers still reads the 8-bit floats' own."""
    codes = torch.arange(128).to(torch.uint8).view(8, 16)
    wanted = [codes.view(eight).float() for eight in (torch.float8_e4m3fn, torch.float8_e5m2)]
    torch.set_flush_denormal(True)
    try:
        found = [
            QuantisedWeight(codes.view(eight), (8, 16), torch.ones(1), 128, torch.float32).dequantise()
            for eight in (torch.float8_e4m3fn, torch.float8_e5m2)
        ]
    finally:
        torch.set_flush_denormal(False)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("name", FORMATS)
def test_ops(level, name):
    """Pieces of rows that begin within blocks and bytes: few tokens, some, many, and the
    backward."""
    for tokens, n_in, n_out, rank, dtype in (
        (1, 33, 66, 3, torch.bfloat16), (5, 320, 96, 8, torch.float32), (70, 130, 31, 17, torch.float32),
        (70, 320, 96, 8, torch.bfloat16), (130, 161, 66, 4, torch.float16),
    ):  # fmt: skip
        w = make_format(name, n_out, n_in, dtype, block=32, block_rows=20)
        problem = make_problem(tokens, n_in, w.shape[0], rank, dtype, torch.float32, gain=True, bias=True)
        assert_problem(replace(problem, w=dequantised(w)), w)
        adapted = dequantised(w).double() + 1.5 * (problem.b.double() @ problem.a.double())
        norm = weight_norm(w, problem.a, problem.b, 1.5)
        torch.testing.assert_close(norm.double(), adapted.norm(dim=1), rtol=2e-6, atol=0)


def test_fields_go_and_come():
    for name in FORMATS:
        w = make_format(name, 32, 66)
        codes, parts, layout = w.fields()
        assert torch.equal(dequantised(w), dequantised(QuantisedWeight.of_fields(codes, parts, layout)))
        assert w.nbytes == sum(t.numel() * t.element_size() for t in (codes, *parts))


@pytest.mark.parametrize("name", ["mxfp4", "hqq"])
def test_schemas(name):
    w, p = make_format(name, 32, 66), make_problem(3, 66, 32, 4)
    codes, parts, layout = w.fields()
    torch.library.opcheck(torch.ops.lora_kernels.dequantise.default, (codes, parts, layout))
    compiled = torch.compile(lambda x: lora_linear(x, w, p.a, p.b, 0.5), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.x), lora_linear(p.x, w, p.a, p.b, 0.5))


def test_a_plain_layout_stays_short():
    """What is as it was before these formats has six numbers."""
    scale = torch.ones(1)
    assert len(QuantisedWeight(torch.zeros(8, 8, dtype=torch.int8), (8, 8), scale, 64, torch.float32).fields()[2]) == 6
    assert str(make_format("mxfp4", 8, 64)) == (
        "QuantisedWeight([8, 64], 4-bit codes, blocks of 1×32, scales of 8 bits, torch.float32)"
    )
    assert "blocks of 1×32, zeros" in str(make_format("int8 zeros", 8, 64))


def test_what_goes_beyond_blocks():
    """The words for kernels that read no more."""
    found = {name: beyond_blocks(make_format(name, 8, 64).fields()[2]) for name in FORMATS}
    order = "4-bit codes in another order"
    assert found == {
        "mxfp4": f"{order} and powers of two as scales", "int4 zeros": f"{order} and zeros",
        "hqq": f"{order} and zeros", "int8 zeros": "zeros", "int8 tiles": "tiles of scales",
        "e4m3 tiles": "tiles of scales", "e5m2 rows": "codes of float8_e5m2", "e4m3 powers": "powers of two as scales",
    }  # fmt: skip
    for kind in KINDS:
        assert beyond_blocks(make_quantised(kind, 8, 64).fields()[2]) is None


@pytest.mark.parametrize(("name", "change", "error", "message"), [
    ("e4m3 tiles", {"scales": torch.ones(3)}, ValueError, "scales must be 4 numbers without gaps, found 3"),
    ("e4m3 tiles", {"block_rows": -1}, ValueError, "block_rows must be at least 0, found -1"),
    ("e4m3 tiles", {"order": LOW_FIRST}, ValueError, "order 1 is none of codes of torch.float8_e4m3fn"),
    ("mxfp4", {"order": 3}, ValueError, "order 3 is none of codes of torch.uint8"),
    ("mxfp4", {"scales": torch.ones(16, dtype=torch.uint8)}, TypeError, "scales must be torch.float32, found torch.uint8"),
    ("int4 zeros", {"zeros": torch.ones(15)}, ValueError, "zeros must be 16 numbers without gaps, found 15"),
    ("int4 zeros", {"zeros": torch.ones(16).half()}, TypeError, "zeros must be torch.float32, found torch.float16"),
    ("hqq", {"shape": (1, 1), "codes": torch.zeros(1, dtype=torch.uint8)}, ValueError, r"halves want an even .* \[1, 1\]"),
])  # fmt: skip
def test_what_does_not_fit(name, change, error, message):
    w = make_format(name, 8, 64, block_rows=4)
    with pytest.raises(error, match=f"QuantisedWeight: {message}"):
        replace(w, **change)


def test_the_kernels_refuse_another_layout():
    w = make_format("mxfp4", 8, 64)
    codes, parts, layout = w.fields()
    for change, message in (
        (layout[:8], "6 or 12 numbers"), ([9, *layout[1:]], "not one that"), ([*layout[:7], 7, *layout[8:]], "not one that"),
        ([*layout[:9], 1, 0, 0], "parts are missing"), ([*layout[:4], 16, *layout[5:]], "a part with gaps"),
        ([*layout[:11], 3], "not one that"), ([*layout[:11], 4], "not one that"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"a quantised w: .*{message}"):
            widened(Packed.of(codes, parts, change))
