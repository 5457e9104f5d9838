"""Weights kept as codes and scales: their numbers, and every op on them."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from lora_kernels import (
    Member,
    QuantisedWeight,
    dora_linear,
    lora_linear,
    lora_linear_group,
    merged_weight,
    use_backend,
    weight_norm,
)
from lora_kernels.ops import row_norm_squared
from lora_kernels.ops.cpu_gemm import choice
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.ops.quantised.weight import LOW_FIRST
from lora_kernels.testing import assert_problem, make_problem
from tests.ops.cpu import at_level
from tests.ops.quantised import KINDS, NF4, make_format, make_quantised
from tests.ops.test_cpu_levels import levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 33), (17, 100), (31, 65), (64, 257), (5, 1100)]


@pytest.fixture(params=levels())
def level(request):
    with at_level(request.param), use_backend("cpu"):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_the_formulas(level, kind, dtype):
    """Bit for bit: blocks that end within rows, within bytes, and beyond the last number."""
    for n_out, n_in in SHAPES:
        for block in (7, 32, 64, 128, 2048, n_in, n_out * n_in):
            w = make_quantised(kind, n_out, n_in, block, dtype)
            assert torch.equal(w.dequantise(), dequantised(w)), (n_out, n_in, block)
            assert torch.equal(w.dequantise(torch.float32), dequantised(w.to(torch.float32)))


def test_every_code(level):
    """All bytes of each kind, NaN and zeros of both signs too."""
    all_codes = torch.arange(256).to(torch.uint8)
    one = torch.ones(1)
    table = torch.tensor(NF4)
    for dtype in DTYPES:
        pairs = QuantisedWeight(all_codes, (1, 512), one, 512, dtype, table).dequantise()[0]
        assert torch.equal(pairs[0::2], table[all_codes.long() >> 4].to(dtype))
        assert torch.equal(pairs[1::2], table[all_codes.long() & 15].to(dtype))
        for codes in (all_codes.view(torch.int8), all_codes.view(torch.float8_e4m3fn)):
            found = QuantisedWeight(codes, (1, 256), one, 256, dtype).dequantise()[0]
            wanted = codes.float().to(dtype)
            assert torch.equal(found.isnan(), wanted.isnan())
            assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
            assert torch.equal(found.signbit() | found.isnan(), wanted.signbit() | wanted.isnan())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -2.0, 1e-39, 3e38])
def test_odd_scales(level, value):
    for kind in ("nibbles", "int8", "float8"):
        w = make_quantised(kind, 4, 64, 64, torch.bfloat16)
        w.scales[2] = value
        found, wanted = w.dequantise(), dequantised(w)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lora_linear(level, kind, dtype):
    for tokens in (0, 1, 5, 13, 70, 130):
        for n_in, n_out, rank, block in ((1, 1, 1, 64), (33, 65, 3, 64), (130, 31, 17, 32), (320, 96, 8, 64)):
            w = make_quantised(kind, n_out, n_in, block, dtype)
            problem = make_problem(tokens, n_in, n_out, rank, dtype, torch.float32, gain=True, bias=True)
            assert_problem(replace(problem, w=dequantised(w)), w)
    dropped = replace(make_problem(70, 320, 96, 8, dtype, gain=True, bias=True, dropout=0.3), w=dequantised(w))
    assert_problem(dropped, w)
    assert_problem(replace(dropped, dropout_semantics="lora_only", bias=None), w)


@pytest.mark.parametrize("kind", ["nibbles", "nested", "int8", "low first", "powers"])
def test_few_tokens(level, kind):
    """Codes that become numbers where they meet x, of whole blocks in each row: rows by eight, by
    four and what is left; a row's bits do not depend on how many tokens there are."""
    most = max(choice(torch.bfloat16).small, choice(torch.bfloat16).small_codes)
    for n_out, n_in, block in ((13, 192, 64), (31, 1152, 128), (8, 96, 32), (23, 4160, 64)):
        if kind == "powers":
            w = make_format("mxfp4", n_out, n_in, torch.bfloat16, block=block)
        else:
            w = make_quantised("nibbles" if kind == "low first" else kind, n_out, n_in, block, torch.bfloat16)
        w = replace(w, order=LOW_FIRST) if kind == "low first" else w
        p = make_problem(most, n_in, n_out, 3, torch.bfloat16, gain=True, bias=True)
        rows = []
        for tokens in sorted({1, 2, 3, min(5, most), most}):
            some = replace(p, x=p.x[:tokens], dy=p.dy[:tokens], w=dequantised(w))
            rows.append(lora_linear(some.x, w, p.a, p.b, p.scale, p.bias, p.gain)[0])
            assert_problem(some, w)
        assert all(torch.equal(row, rows[0]) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_without_gradients(level, kind):
    """Their short way gives what the op gives; it reads a part as it is at each call, and copies of
    the weight."""
    w, p = make_quantised(kind, 33, 66, 64, torch.bfloat16), make_problem(2, 66, 33, 4, torch.bfloat16, gain=True)

    def both(w):
        y = lora_linear(p.x, w, p.a, p.b, 0.5, None, p.gain)
        assert torch.equal(y, lora_linear(p.x, w, p.a.clone().requires_grad_(), p.b, 0.5, None, p.gain))
        return y

    y = both(w)
    assert torch.equal(both(copy.deepcopy(w)), y)
    if kind != "float8":  # torch pickles no such tensor
        assert torch.equal(both(pickle.loads(pickle.dumps(w))), y)
    w.codes.data = w.codes.view(torch.uint8).flip(0).view(w.codes.dtype)
    assert torch.equal(both(w), both(replace(w))) and not torch.equal(both(w), y)


@pytest.mark.parametrize("kind", KINDS)
def test_reference(kind):
    w = make_quantised(kind, 31, 66, 64, torch.bfloat16)
    problem = make_problem(9, 66, 31, 4, torch.bfloat16, gain=True, bias=True, dropout=0.3)
    with use_backend("reference"):
        assert_problem(replace(problem, w=dequantised(w)), w)


@pytest.mark.parametrize("tokens", [3, 200])
def test_twice_and_whole_rows_alone(level, tokens):
    """The same bits again; and rows of x do not change one another."""
    w = make_quantised("nested", 96, 640, 64, torch.bfloat16)
    p = make_problem(tokens, 640, 96, 8, torch.bfloat16)
    y = lora_linear(p.x, w, p.a, p.b)
    assert torch.equal(y, lora_linear(p.x, w, p.a, p.b))
    x = p.x.clone()
    x[1:] = math.nan
    assert torch.equal(lora_linear(x, w, p.a, p.b)[0], y[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_norms(level, kind, dtype):
    for n_out, n_in, rank in ((1, 1, 1), (33, 65, 3), (530, 31, 17), (5, 3000, 70)):
        w = make_quantised(kind, n_out, n_in, 64, dtype)
        dense, p = dequantised(w), make_problem(1, n_in, n_out, rank, dtype)
        adapted = dense.double() + 1.5 * (p.b.double() @ p.a.double())
        norm = weight_norm(w, p.a, p.b, 1.5)
        torch.testing.assert_close(norm.double(), adapted.norm(dim=1), rtol=2e-6, atol=0)
        squared = row_norm_squared(w)
        torch.testing.assert_close(squared.double(), dense.double().square().sum(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(weight_norm(w, p.a, p.b, 1.5, squared), norm, rtol=1e-6, atol=0)
        a, b = (t.float().requires_grad_() for t in (p.a, p.b))
        found = torch.autograd.grad(weight_norm(w, a, b, 1.5).sum(), (a, b))
        wanted = torch.autograd.grad((dense.double() + 1.5 * (b.double() @ a.double())).norm(dim=1).sum(), (a, b))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_merged_weight():
    w, p = make_quantised("nested", 33, 66, 64, torch.bfloat16), make_problem(1, 66, 33, 4, torch.bfloat16)
    gain, wanted = torch.rand(33) + 0.5, dequantised(w).double() + 1.5 * (p.b.double() @ p.a.double())
    merged = merged_weight(w, p.a, p.b, 1.5, gain)
    assert merged.dtype is torch.bfloat16
    torch.testing.assert_close(merged.double(), gain.double()[:, None] * wanted, rtol=2**-8, atol=1e-6)
    out = torch.empty(33, 66, dtype=torch.bfloat16)
    assert merged_weight(w, p.a, p.b, 1.5, gain, out) is out
    assert torch.equal(out, merged)


@pytest.mark.filterwarnings("ignore:.*slow reference")
def test_gradcheck():
    w = make_quantised("nested", 6, 10, 8, torch.float64)
    p = make_problem(3, 10, 6, 2, torch.float64, gain=True, bias=True)
    leaves = list(p.require_grad().values())
    torch.autograd.gradcheck(lambda x, a, b, bias, gain: lora_linear(x, w, a, b, 0.5, bias, gain), leaves)
    a, b = (t.detach().requires_grad_() for t in (p.a, p.b))
    torch.autograd.gradcheck(lambda a, b: weight_norm(w, a, b, 0.5), (a, b))
    torch.autograd.gradgradcheck(lambda x, a, b: lora_linear(x, w, a, b, 0.5), leaves[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_compile(kind):
    w, p = make_quantised(kind, 32, 66, 64), make_problem(3, 66, 32, 4)
    codes, parts, layout = w.fields()
    torch.library.opcheck(torch.ops.lora_kernels.dequantise.default, (codes, parts, layout))
    plain = (p.x, codes, p.a, p.b, 1.0, None, None, 0.0, None, False)
    forward = torch.ops.lora_kernels.lora_linear_forward.default
    torch.library.opcheck(forward, (*plain, True, False, None, parts, layout))
    y, h, _ = forward(*plain, True, False, None, parts, layout)
    backward = torch.ops.lora_kernels.lora_linear_backward.default
    torch.library.opcheck(backward, (y, *plain, h, None, None, [1, 1, 1, 0, 0], None, parts, layout))
    norm = (codes, p.a, p.b, 0.5, None, parts, layout)
    torch.library.opcheck(torch.ops.lora_kernels.weight_norm_forward.default, norm)
    compiled = torch.compile(lambda x: lora_linear(x, w, p.a, p.b, 0.5), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.x), lora_linear(p.x, w, p.a, p.b, 0.5))


def test_autocast():
    w, p = make_quantised("nibbles", 32, 64, 64), make_problem(3, 64, 32, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(p.x, w, p.a, p.b)
    assert torch.equal(y, lora_linear(p.x.bfloat16(), w.to(torch.bfloat16), p.a, p.b))


def test_fields_go_and_come():
    for kind in KINDS:
        w = make_quantised(kind, 8, 66, 64, torch.bfloat16)
        again = QuantisedWeight.of_fields(*w.fields())
        assert torch.equal(dequantised(w), dequantised(again))
        assert w.nbytes == sum(t.numel() * t.element_size() for t in (w.codes, *w.fields()[1]))
        assert repr(w).startswith("QuantisedWeight([8, 66], ")


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"codes": torch.zeros(8, 16)}, TypeError, "codes must be uint8, int8, float8_e4m3fn or float8_e5m2"),
    ({"codes": torch.zeros(63, dtype=torch.uint8)}, ValueError, "codes must be 64 numbers without gaps, found 63"),
    ({"codes": torch.zeros(64, 2, dtype=torch.uint8)[:, 0]}, ValueError, "codes must be 64 numbers without gaps, found 64 w"),
    ({"scales": torch.ones(3)}, ValueError, "scales must be 2 numbers without gaps, found 3"),
    ({"scales": torch.ones(2).half()}, TypeError, "scales must be torch.float32, found torch.float16"),
    ({"scales": torch.ones(2, device="meta")}, ValueError, r"scales must be on cpu \(codes\), found meta"),
    ({"table": None}, TypeError, "table must be torch.float32, found NoneType"),
    ({"table": torch.ones(15)}, ValueError, "table must be 16 numbers"),
    ({"outer": torch.ones(1)}, TypeError, "scales must be torch.uint8, found torch.float32"),
    ({"shape": (128,)}, ValueError, r"shape must be \[out, in\] or \[experts, out, in\], found \[128\]"),
    ({"block": 0}, ValueError, "blocks must have numbers, found 0 and 256"),
    ({"dtype": torch.int8}, TypeError, "dtype must be a floating one"),
])  # fmt: skip
def test_what_does_not_fit(change, error, message):
    parts = {
        "codes": torch.zeros(64, dtype=torch.uint8), "shape": (8, 16), "scales": torch.ones(2), "block": 64,
        "dtype": torch.float32, "table": torch.tensor(NF4),
    }  # fmt: skip
    with pytest.raises(error, match=f"QuantisedWeight: {message}"):
        QuantisedWeight(**parts | change)


def test_what_the_op_refuses():
    w, p = make_quantised("nibbles", 8, 16, 64, torch.bfloat16), make_problem(3, 16, 8, 2)
    with pytest.raises(TypeError, match="w must have the dtype of x, torch.float32, found torch.bfloat16"):
        lora_linear(p.x, w, p.a, p.b)
    with pytest.raises(TypeError, match="w is a QuantisedWeight, which has its scales; w_scale must be None"):
        lora_linear(p.x, w.to(torch.float32), p.a, p.b, w_scale=torch.ones(8))
    with pytest.raises(ValueError, match=r"x must have 16 features \(w is \[8, 16\]\), found \[3, 15\]"):
        lora_linear(p.x[:, :15], w.to(torch.float32), p.a, p.b)
    with use_backend("cuda", simulate=True), pytest.raises(NotImplementedError, match="x is torch.float32"):
        lora_linear(p.x, w.to(torch.float32), p.a, p.b)


def test_the_ops_made_of_others():
    """A group and DoRA with its norm: as the ops one by one."""
    p = make_problem(5, 66, 33, 4, torch.bfloat16)
    weights = [make_quantised(kind, 33, 66, 64, torch.bfloat16) for kind in KINDS]
    members = [Member(w, p.a, p.b, 0.5) for w in weights]
    ys = lora_linear_group(p.x, [*members, Member(p.w, p.a, p.b, 0.5)])
    for y, w in zip(ys, [*weights, p.w], strict=True):
        assert torch.equal(y, lora_linear(p.x, w, p.a, p.b, 0.5))
    magnitude = torch.rand(33) + 0.5
    for w in weights:
        y, norm = dora_linear(p.x, w, p.a, p.b, magnitude, 0.5)
        assert torch.equal(norm, weight_norm(w, p.a, p.b, 0.5))
        assert torch.equal(y, lora_linear(p.x, w, p.a, p.b, 0.5, None, magnitude / norm))
