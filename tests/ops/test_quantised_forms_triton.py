"""Every form of codes, scales and zeros in Triton's kernels: numbers in the interpreter, each op
over them, MXFP4 in the simulator too, what is read, and planted bugs."""

import math
from dataclasses import replace

import pytest
import torch

from lora_kernels import QuantisedWeight, expert_weight_norm, lora_linear, use_backend, weight_norm
from lora_kernels.ops import missing_backends, row_norm_squared
from lora_kernels.ops.multi_lora import multi_lora
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.ops.quantised.weight import E2M1, HALVES, HIGH_FIRST, LOW_FIRST
from lora_kernels.ptxsim import device
from lora_kernels.testing import assert_expert_problem, assert_problem, assert_within_rounding, exact, make_problem
from lora_kernels.testing.interpreter_memory import InterpreterViolation
from tests.ops.quantised import FORMATS, make_experts, make_format, over_codes
from tests.ops.test_multi_lora import assert_exact, draw, planned
from tests.ops.test_quantised_formats import DTYPES, POWERS, assert_same

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops.lora_linear import triton_codes
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows
from tests.ops.interpreted import deterministic, interpreted
from tests.ops.quantised_plants import planted

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
slow = pytest.mark.slow
FEW = ("mxfp4", "hqq", "e4m3 tiles")
QUICK = [*FEW, *(pytest.param(name, marks=slow) for name in FORMATS if name not in FEW)]


@pytest.fixture(autouse=True)
def as_usual():
    with deterministic(False):
        yield


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_the_formulas(name):
    """Bit for bit: blocks cut off at both edges, groups of one number and of many."""
    for i, (n_out, n_in, block, rows) in enumerate((
        (1, 2, 1, 1), (7, 45, 16, 3), (6, 66, 7, 2), (9, 256, 128, 4), (10, 192, 64, 20),
    )):  # fmt: skip
        w = make_format(name, n_out, n_in, DTYPES[i % 3], block, rows)
        with interpreted():
            assert_same(w.dequantise(), dequantised(w))


@slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_of_many_sizes(name, dtype):
    for n_out, n_in in ((1, 1), (3, 33), (17, 100), (6, 257), (5, 1100), (2, 4160)):
        for block, rows in ((1, 1), (7, 2), (16, 3), (32, 3), (128, 128)):
            w = make_format(name, n_out, n_in, dtype, block, rows)
            with interpreted(seed=7):
                assert_same(w.dequantise(), dequantised(w))


@pytest.mark.parametrize("name", FORMATS)
def test_experts_and_some_rows(name):
    """Tiles end with each expert; rows from any one on; experts without tokens stay codes."""
    w = make_experts(name, 3, 22, 40, BF16, block=16, **({"block_rows": 5} if name.endswith("tiles") else {}))
    wanted = dequantised(w)
    with interpreted():
        assert_same(w.dequantise(), wanted)
        for first, rows in ((21, 3), (4, 20), (65, 1)):
            found = dequantise_rows(Quantised(*w.fields()), first, rows)
            assert_same(found, wanted.flatten(0, 1)[first : first + rows])
        some = dequantise_rows(Quantised(*w.fields()), offsets=torch.tensor([2, 2, 3])).view(w.shape)
    assert some[1].isnan().all() and some[0].equal(wanted[0]) and some[2].equal(wanted[2])


def test_every_code():
    """All bytes of each kind and order: NaN, infinities, zeros of both signs, subnormal numbers."""
    codes, one, table = torch.arange(256).to(torch.uint8), torch.ones(1), torch.tensor(E2M1)
    all_of = [QuantisedWeight(codes, (1, 512), one, 512, F32, table, order=order) for order in (HIGH_FIRST, LOW_FIRST, HALVES)]
    all_of += [
        QuantisedWeight(codes.view(eight), (1, 256), one * scale, 256, dtype)
        for eight in (torch.float8_e4m3fn, torch.float8_e5m2) for scale, dtype in ((1.0, F32), (-3.0, BF16), (2.0**-20, F16))
    ]  # fmt: skip
    with interpreted():
        for w in all_of:
            assert_same(w.dequantise(), dequantised(w))
    with use_backend("triton", simulate=True):
        for w in all_of[1], all_of[-1]:
            assert_same(w.dequantise(), dequantised(w))


def test_every_power():
    """2^-127 and NaN too."""
    powers = torch.arange(256).to(torch.uint8).view(POWERS)
    w = QuantisedWeight(
        torch.full((1, 256), 0x51, dtype=torch.uint8), (1, 512), powers, 2, F32, torch.tensor(E2M1), order=LOW_FIRST
    )
    wanted = (torch.tensor([0.5, 3.0]) * powers.float()[:, None]).view(1, 512)
    for where in (interpreted(), use_backend("triton", simulate=True)):
        with where:
            assert_same(w.dequantise(), wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf, -2.0, pytest.param(1e-39, marks=slow), pytest.param(3e38, marks=slow)])
def test_odd_scales_and_zeros(value):
    for name in ("hqq", "int8 zeros", "e5m2 rows"):
        w = make_format(name, 6, 64, BF16)
        for part in (w.scales, w.zeros):
            if part is not None:
                kept, part[1] = float(part[1]), value
                with interpreted():
                    assert_same(w.dequantise(), dequantised(w))
                part[1] = kept


def problem(name, tokens, n_in, n_out, rank, dtype=BF16, block=32, block_rows=20, **flags):
    w = make_format(name, n_out, n_in, dtype, block, block_rows)
    return replace(make_problem(tokens, n_in, w.shape[0], rank, dtype, **flags), w=dequantised(w)), w


@pytest.mark.parametrize("name", QUICK)
def test_few_tokens(name, monkeypatch):
    """y and all gradients from the codes; of the depth some tiles have more than one program, and
    tiles of scales end inside those of the product."""
    monkeypatch.setattr(triton_codes, "SHARE", 64)
    p, w = problem(name, 5, 96, 70, 4, gain=True, bias=True)
    with interpreted() as names:
        assert_problem(p, w)
    assert {"quantised_forward_kernel", "quantised_input_gradient_kernel"} <= set(names)


@slow
@pytest.mark.parametrize("name", FORMATS)
def test_odd_sizes(name, monkeypatch):
    monkeypatch.setattr(triton_codes, "SHARE", 64)
    for sizes, dtype, block, flags in (
        ((17, 45, 140, 5), F32, 16, {"dropout": 0.3}), ((3, 33, 65, 3), F16, 7, {"gain": True}),
        ((40, 130, 40, 20), BF16, 128, {"gain": True, "dropout": 0.3, "dropout_semantics": "lora_only"}),
    ):  # fmt: skip
        p, w = problem(name, *sizes, dtype, block, 7, **flags)
        with interpreted(90, seed=3):
            assert_problem(p, w)


@pytest.mark.parametrize("name", ["e4m3 tiles", pytest.param("hqq", marks=slow), pytest.param("mxfp4", marks=slow)])
def test_gains_of_zero(name):
    """y does not tell their gradients; the rows of W that do are read as codes."""
    p, w = problem(name, 3, 66, 40, 4, gain=True)
    p.gain[[0, 21, 39]] = 0.0
    gain = p.gain.clone().requires_grad_()
    with interpreted():
        found = torch.autograd.grad(lora_linear(p.x, w, p.a, p.b, p.scale, None, gain), gain, p.dy)[0]
    wanted = exact(p).values["gain"]
    assert_within_rounding(found, wanted, BF16, inherited=0.01, name="gain")
    torch.testing.assert_close(found[[0, 21, 39]].double(), wanted[[0, 21, 39]], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in FORMATS])
def test_many_tokens(name):
    """From W itself, made in each direction."""
    p, w = problem(name, 70, 96, 80, 8, gain=True)
    with interpreted() as names:
        assert_problem(p, w)
    assert names.count("dequantise_kernel") == 2


@pytest.mark.parametrize("name", QUICK)
def test_norms(name):
    w, p = make_format(name, 40, 96, BF16, 16, 7), make_problem(1, 96, 40, 8, BF16)
    dense = dequantised(w).double()
    with interpreted() as names:
        found, squares = weight_norm(w, p.a, p.b, 1.5), row_norm_squared(w)
    torch.testing.assert_close(found.double(), (dense + 1.5 * (p.b.double() @ p.a.double())).norm(dim=1), rtol=2e-6, atol=0)
    torch.testing.assert_close(squares.double(), dense.square().sum(1), rtol=1e-6, atol=0)
    assert names == ["quantised_norm_kernel"] * 2


@pytest.mark.parametrize("name", QUICK)
def test_experts(name):
    """Two experts with tokens and one without; the last tiles of each have fewer rows."""
    tiles = {"block_rows": 5} if name.endswith("tiles") else {}
    for transposed in (False, True):
        shape = (16, 22) if transposed else (22, 16)
        w = make_experts(name, 3, *shape, BF16, block=8, **tiles)
        with interpreted():
            assert_expert_problem(over_codes(w, [3, 0, 2], 16, 22, transposed, rank=2, gain=True))
        a, b = torch.randn(3, 2, 16), torch.randn(3, 22, 2)
        dense = dequantised(w).double()
        wanted = ((dense.mT if transposed else dense) + 0.3 * b.double() @ a.double()).norm(dim=2)
        with interpreted():
            found = expert_weight_norm(w, a, b, 0.3, transposed=transposed)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["mxfp4", *(pytest.param(name, marks=slow) for name in FORMATS if name != "mxfp4")])
def test_many_adapters(name):
    x, _, *rest = draw(5, 136, [64, 34], [8, 24, 5], 1, BF16)
    w = make_format(name, 98, 136, BF16, 8)
    with interpreted() as names:
        y = multi_lora(x, w, *(rest[0], planned(*rest[:3]), rest[3]))
    assert_exact(y, (x, dequantised(w), *rest))
    assert names[0] == "dequantise_kernel"


@pytest.mark.parametrize(("arch", "name"), [
    (80, "mxfp4"), (90, "mxfp4"), *(pytest.param(80, name, marks=slow) for name in FORMATS if name != "mxfp4"),
])  # fmt: skip
def test_simulated(arch, name):
    """As compiled: numbers, y and all gradients, norms."""
    p, w = problem(name, 5, 128, 70, 4, gain=True)
    with use_backend("triton", simulate=True), device(arch):
        assert_same(w.dequantise(), p.w)
        assert_problem(p, w)
        norm = weight_norm(w, p.a, p.b, 1.5)
    wanted = (p.w.double() + 1.5 * (p.b.double() @ p.a.double())).norm(dim=1)
    torch.testing.assert_close(norm.double(), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", FEW)
def test_what_is_read(name):
    """All that there is once, by whole sectors."""
    w = make_format(name, 96, 512, BF16, 128 if name == "e4m3 tiles" else 32, 128)
    with use_backend("triton", simulate=True), device(trace=True) as sim:
        w.dequantise()
    assert sim.launches == 1 and sim.dram()[0] <= 1.02 * w.nbytes
    assert sim.counters["store_sectors"] * 32 == 2 * w.numel()
    assert sim.counters["shared_wavefronts"] == sim.counters["shared_ideal"]


BUGS = [
    ("tl.join(pairs & 15, pairs >> 4)", "tl.join(pairs >> 4, pairs & 15)", "mxfp4"),
    ("((bits << 23) | rest)", "(bits << 23)", "powers"),
    ("(bits == 0) | (bits == 255)", "bits == 0", "powers"),
    ("tl.where(second[:, None], pairs & 15, pairs >> 4)", "tl.where(second[:, None], pairs >> 4, pairs & 15)", "hqq"),
    ("second, groups - weight.half, groups)", "second, groups, groups)", "hqq"),
    ("second = groups >= weight.half", "second = groups > weight.half", "hqq"),
    ("rounded(values - scales[1][:, None], KIND >> 5)", "values - scales[1][:, None]", "hqq"),
    ("rounded(values - scales[1][:, None], KIND >> 5)", "values", "int8 zeros"),
    ("tl.load(weight.zeros + blocks, mask", "tl.load(weight.zeros + blocks + 1, mask", "int4 zeros"),
    ("weight.row_groups) * GROUP, SHIFT", "weight.row_groups) * GROUP * 2, SHIFT", "e4m3 tiles"),
    ("down = rows // weight.tile_rows", "down = (rows + 1) // weight.tile_rows", "e4m3 tiles"),
    (".to(tl.int64) * weight.tiles_across", ".to(tl.int64) * weight.block", "int8 tiles"),
    ("(rows - experts * weight.expert_rows)", "(rows - experts)", "experts"),
    ("down = experts * weight.expert_tiles", "down = experts * (weight.expert_tiles - 1)", "experts"),
    ("if weight.expert_rows is None", "if weight.tile_rows is not None", "experts"),
    ("tl.uint16) << 8", "tl.uint16) << 7", "e5m2 rows"),
]  # fmt: skip


def form(name):
    """A weight whose numbers tell."""
    if name == "powers":
        powers = torch.arange(256).to(torch.uint8).view(POWERS)
        codes = torch.full((256,), 1, dtype=torch.int8)
        return QuantisedWeight(codes, (1, 256), powers, 1, F32)
    if name == "experts":
        return make_experts("e4m3 tiles", 3, 10, 24, BF16, block=8, block_rows=4)
    return make_format(name, 10, 24, BF16, 4 if name.endswith("tiles") else 8, 4)


@pytest.mark.parametrize(("old", "new", "name"), BUGS)
def test_planted_bugs(old, new, name, monkeypatch, tmp_path):
    planted(monkeypatch, tmp_path, old, new)
    w = form(name)
    with pytest.raises((AssertionError, InterpreterViolation)), interpreted():
        assert_same(w.dequantise(), dequantised(w))


@pytest.mark.parametrize(("old", "new"), [
    ("columns = first + tl.arange(0, BK // GROUP) * GROUP", "columns = tl.arange(0, BK // GROUP) * GROUP"),
    ("blocks_of_tiles(weight, rows[:, None], columns[None, :]", "blocks_of_tiles(weight, rows[:, None] + 1, columns[None, :]"),
])  # fmt: skip
def test_planted_bugs_of_a_tile(old, new, monkeypatch, tmp_path):
    """The scales of a product's tile are found by its rows and columns."""
    planted(monkeypatch, tmp_path, old, new)
    p, w = problem("e4m3 tiles", 5, 192, 40, 4, block=64, block_rows=20)
    with pytest.raises((AssertionError, InterpreterViolation)), interpreted():
        assert_within_rounding(lora_linear(p.x, w, *p.arguments()[2:]), exact(p).values["y"], BF16)
