"""bf16 products on AMX tiles and by vdpbf16ps against float64, with odd shapes, strides, and NaN
wherever nothing may be read or written."""

import math
from pathlib import Path

import pytest
import torch

_cpu = pytest.importorskip("lora_kernels._cpu", reason="the CPU kernels are not built here")
FLAGS = {"avx512bf16": "avx512_bf16", "amx": "amx_bf16"}
LEVELS = [level for level in _cpu.levels() if level in FLAGS]
cpuinfo = Path("/proc/cpuinfo")
for level, flag in FLAGS.items():
    has = cpuinfo.is_file() and flag in cpuinfo.read_text()
    assert level in _cpu.built_with_tiles or not has, f"built without {level}"
if not LEVELS:
    pytest.skip("this processor has no products of bf16", allow_module_level=True)

from lora_kernels.ops.cpu_amx import product, product_back  # noqa: E402
from lora_kernels.ops.cpu_gemm import base_product, base_product_slices  # noqa: E402
from lora_kernels.ops.cpu_tensors import dropout_args as drop_mask  # noqa: E402
from lora_kernels.ops.cpu_tensors import transposed  # noqa: E402
from lora_kernels.ops.dropout import mask  # noqa: E402
from lora_kernels.testing.tolerances import assert_within_rounding  # noqa: E402
from tests.ops.cpu import at_level, operands  # noqa: E402

SHAPES = [(1, 1, 1), (3, 33, 17), (15, 64, 31), (16, 32, 16), (17, 100, 50), (33, 31, 65), (48, 129, 97), (64, 257, 40)]
SHAPES += [(65, 33, 5), (90, 129, 97), (130, 1100, 300)]


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    with at_level(request.param):
        assert _cpu.has_tiles()
        yield request.param


def by_columns(w, gap=5):
    """wᵀ [in, out] inside a larger matrix of NaN."""
    held = torch.full((w.shape[1], len(w) + gap), math.nan, dtype=torch.bfloat16)
    held[:, : len(w)] = w.T
    return held[:, : len(w)]


def close(found, x, w):
    # float32 sums of exact products: n·2⁻²⁴ of the sum of their sizes
    wide_x, wide_w = x.double(), w.double()
    allowed = (wide_x.abs() @ wide_w.abs().T) * x.shape[1] * 2.0**-24
    assert ((found.double() - wide_x @ wide_w.T).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape):
    x, w = operands(*shape, torch.bfloat16)
    close(product(x, w), x, w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_back(shape):
    x, w = operands(*shape, torch.bfloat16)
    close(product_back(x, by_columns(w)), x, w)


def random(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def outputs(tokens, n_out):
    """A result inside a matrix with one row and five columns more, which must stay as they are."""
    held = torch.full((tokens + 1, n_out + 5), 7.0)
    return held, held[:tokens, :n_out].double


def untouched(held, tokens, n_out):
    return bool((held[tokens] == 7).all() and (held[:, n_out:] == 7).all())


THREADS, TYPES = [1, 2, 3], [torch.bfloat16, torch.float16, torch.float32]
LAYERS = [(1, 1, 1), (17, 100, 50), (48, 129, 97), (64, 257, 40), (130, 1100, 70), (530, 1100, 300)]
# of the adapter's term 2⁻¹⁶ is lost: h, and B unless it is bf16, are two bf16 numbers each
TWO_NUMBERS, ONE_NUMBER = 2.0**-16, 2.0**-8


def lost_of_h(level, rank, n_in, n_out, b):
    """h is two numbers, but without AMX one from many ranks on, unless the adapter can cancel W."""
    two = level == "amx" or rank < _cpu.many_ranks or 2 * rank >= min(n_in, n_out) or b.dtype is not torch.bfloat16
    return TWO_NUMBERS if two else ONE_NUMBER


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("rank", [1, 5, 33, 70])
@pytest.mark.parametrize("adapter_dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_forward(shape, adapter_dtype, rank, threads, level):
    x, w = operands(*shape, torch.bfloat16)
    tokens, n_in, n_out = shape
    h, a, b, gain, bias = random(rank, (tokens, rank), (rank, n_in), (n_out, rank), (n_out,), (n_out,))
    a, b = a.to(adapter_dtype), b.to(adapter_dtype)
    wide_x, wide_w, wide_a, wide_b = x.double(), w.double(), a.double(), b.double()
    for from_a in (False, True):
        (y, y_found), (z, z_found) = outputs(tokens, n_out), outputs(tokens, n_out)
        given = h.clone()
        if from_a:
            given.fill_(math.nan)
        _cpu.tiles(
            x, w, a if from_a else None, b, y[:tokens, :n_out], z[:tokens, :n_out], bias, gain, given, 0.5, None, False,
            threads,
        )  # fmt: skip
        if from_a:
            allowed_h = 0.5 * (wide_x.abs() @ wide_a.abs().T) * (TWO_NUMBERS + n_in * 2.0**-24)
            assert ((given.double() - 0.5 * (wide_x @ wide_a.T)).abs() <= allowed_h).all()
        else:
            assert torch.equal(given, h)
        wide_h = given.double()
        truth = wide_x @ wide_w.T + wide_h @ wide_b.T
        allowed = (wide_x.abs() @ wide_w.abs().T) * (n_in + rank) * 2.0**-24
        lost = lost_of_h(level, rank, n_in, n_out, b)
        allowed += (wide_h.abs() @ wide_b.abs().T) * (lost + (n_in + rank) * 2.0**-24)
        assert ((z_found() - truth).abs() <= allowed).all()
        scaled = allowed * gain.double().abs() + ((gain.double() * truth).abs() + bias.double().abs()) * 2.0**-22
        assert ((y_found() - (gain.double() * truth + bias.double())).abs() <= scaled).all()
        assert untouched(y, tokens, n_out) and untouched(z, tokens, n_out)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("rank", [1, 16, 70])
@pytest.mark.parametrize("adapter_dtype", TYPES, ids=str)
@pytest.mark.parametrize("with_gain", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_backward(shape, dropout, with_gain, adapter_dtype, rank, threads, level):
    # dy [tokens, n_in], dx [tokens, n_out]: depth is what the layer gives out
    dy, w = operands(*shape, torch.bfloat16)
    tokens, n_in, n_out = shape
    a, b, gain = random(rank, (rank, n_out), (n_in, rank), (n_in,))
    a, b, seed = a.to(adapter_dtype), b.to(adapter_dtype), torch.tensor(2**40 + rank)
    p = torch.full((tokens, rank), math.nan)
    dx, found = outputs(tokens, n_out)
    across = by_columns(w)
    _cpu.tiles(
        dy, across, transposed(b), transposed(a), dx[:tokens, :n_out], None, None, gain if with_gain else None, p, 0.5,
        drop_mask(dropout, seed), True, threads,
    )  # fmt: skip
    dz = dy.double() * (gain.double() if with_gain else 1.0)
    sums = (n_in + rank) * 2.0**-24
    allowed_p = 0.5 * (dz.abs() @ b.double().abs()) * (2 * TWO_NUMBERS + sums)
    assert ((p.double() - 0.5 * (dz @ b.double())).abs() <= allowed_p).all()
    kept = mask(seed, dropout, tokens, n_out, torch.float32, dy.device).double() if dropout else 1.0
    truth = dz @ w.double().T + kept * (p.double() @ a.double())
    # dz is two bf16 numbers, but without AMX one unless the adapter can cancel W
    two = level == "amx" or 2 * rank >= min(n_in, n_out)
    lost = (TWO_NUMBERS if two else ONE_NUMBER) if with_gain else 0.0
    allowed = (dz.abs() @ w.double().abs().T) * (lost + sums)
    of_p = lost_of_h(level, rank, n_in, n_out, a)
    allowed += kept * (p.double().abs() @ a.double().abs()) * (of_p + (n_in + rank) * 2.0**-24)
    assert ((found() - truth).abs() <= allowed).all()
    assert untouched(dx, tokens, n_out)


@pytest.mark.parametrize("shape", [(0, 8, 9), (40, 0, 9), (40, 8, 0)], ids=str)
def test_a_product_of_nothing(shape):
    x, w = operands(*shape, torch.bfloat16)
    assert torch.equal(base_product(x, w), x.float() @ w.float().T)
    pieces = [wide for _, wide in base_product_slices(x, w)]
    assert torch.equal(torch.cat(pieces, 1) if pieces else x.new_zeros(40, 0).float(), x.float() @ w.float().T)


def test_a_nan_stays_in_its_token_and_in_its_row_of_w():
    for tokens in (40, 130):
        x, w = operands(tokens, 129, 97, torch.bfloat16)
        x[7, 5] = w[33, 128] = math.nan
        bad = torch.zeros(tokens, 97, dtype=torch.bool)
        bad[7] = bad[:, 33] = True
        for y in (product(x, w), product_back(x, by_columns(w))):
            assert torch.equal(y.isnan(), bad)


def test_the_result_of_a_token_is_that_of_the_token_alone():
    x, w = operands(150, 1300, 70, torch.bfloat16)
    y = product(x, w)
    for tokens in (1, 16, 17, 33, 63, 64, 65, 140):
        assert torch.equal(product(x[:tokens], w), y[:tokens])
        assert torch.equal(product(x[150 - tokens :], w), y[150 - tokens :])


def test_y_is_rounded_once_and_dx_with_a_gain_twice():
    tokens, n_in, n_out, rank = 40, 300, 200, 16
    x, w = operands(tokens, n_in, n_out, torch.bfloat16)
    a, b, dy, gain = random(1, (rank, n_in), (n_out, rank), (tokens, n_out), (n_out,))
    a, b, dy = a.bfloat16(), b.bfloat16(), dy.bfloat16()
    y, dx = torch.empty(tokens, n_out, dtype=torch.bfloat16), torch.empty(tokens, n_in, dtype=torch.bfloat16)
    h, p = torch.empty(tokens, rank), torch.empty(tokens, rank)
    update = 0.1 * b.double() @ a.double()
    _cpu.tiles(x, w, a, b, y, None, None, gain, h, 0.1, None, False, 2)
    assert_within_rounding(y, gain.double() * (x.double() @ (w.double() + update).T), torch.bfloat16, 1.02)
    for of, ratio in ((None, 1.02), (gain, 1.5)):
        _cpu.tiles(dy, w, transposed(b), transposed(a), dx, None, None, of, p, 0.1, None, True, 2)
        dz = dy.double() if of is None else dy.double() * of.double()
        assert_within_rounding(dx, dz @ (w.double() + update), torch.bfloat16, ratio)


def test_an_adapter_of_many_ranks_that_dominates_is_rounded_twice_at_most(level):
    tokens, n_in, n_out, rank = 40, 300, 200, 64
    assert rank >= _cpu.many_ranks
    x, w = operands(tokens, n_in, n_out, torch.bfloat16)
    a, b = (t.bfloat16() for t in random(1, (rank, n_in), (n_out, rank)))
    y, h = torch.empty(tokens, n_out, dtype=torch.bfloat16), torch.empty(tokens, rank)
    _cpu.tiles(x, w, a, b, y, None, None, None, h, 1.0, None, False, 2)
    truth = x.double() @ (w.double() + b.double() @ a.double()).T
    assert_within_rounding(y, truth, torch.bfloat16, 1.02 if level == "amx" else 1.5)
    for small in (b * 0.02, b.float()):
        _cpu.tiles(x, w, a.to(small.dtype), small, y, None, None, None, h, 1.0, None, False, 2)
        truth = x.double() @ (w.double() + small.double() @ a.double()).T
        assert_within_rounding(y, truth, torch.bfloat16, 1.02)


def test_infinite_h_is_not_made_nan():
    x, w = operands(70, 64, 32, torch.bfloat16)
    h, b = torch.full((70, 1), math.inf), torch.ones(32, 1, dtype=torch.bfloat16)
    y = torch.empty(70, 32)
    _cpu.tiles(x, w, None, b, y, None, None, None, h, 1.0, None, False, 2)
    assert (y == math.inf).all()


@pytest.mark.parametrize("tokens", [3, 70])
def test_what_is_below_the_smallest_normal_number_is_at_most_lost(tokens):
    x = torch.full((tokens, 32), 2.0**-65).bfloat16()
    w = (torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 2.0**-61).bfloat16()
    y = torch.empty(tokens, 40, dtype=torch.bfloat16)
    _cpu.tiles(x, w, None, None, y, None, None, None, None, 1.0, None, False, 2)
    exact = x.double() @ w.double().T
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + 32 * 2.0**-126).all()
    assert (y.double()[exact.abs() > 2.0**-122] != 0).all()


@pytest.mark.parametrize("gains", ["trained", "any"])
@pytest.mark.parametrize("rank", [5, 70])
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_a_base_that_is_dropped_too_is_products_of_bf16(monkeypatch, tokens, rank, gains):
    """DoRA with dropout: y and dx are rounded once or little more, and no W becomes float32."""
    from lora_kernels import lora_linear
    from lora_kernels.ops.lora_linear import cpu_dropped_base

    for name in ("wide_forward", "wide_input_gradient"):
        monkeypatch.setattr(cpu_dropped_base, name, lambda *args: pytest.fail("W is widened"))
    x, w, a, b = random(7, (tokens, 257), (140, 257), (rank, 257), (140, rank))
    gain, bias, dy = random(8, (140,), (140,), (tokens, 140))
    gain = 1 + 0.1 * gain if gains == "trained" else gain
    x, w, a, b, gain, bias, dy = (t.bfloat16() for t in (x, w, a, b * 0.1, gain, bias, dy))
    learnt = [t.requires_grad_() for t in (x, a, b, gain)]
    seed = torch.tensor(11)
    y = lora_linear(x, w, a, b, 0.5, bias, gain, 0.3, seed=seed, dropout_semantics="peft")
    grads = torch.autograd.grad(y, learnt, dy)
    wide = [t.detach().double().requires_grad_() for t in learnt]
    xs, as_, bs, gains = wide
    dropped = xs * mask(seed, 0.3, tokens, 257, torch.float64, x.device)
    z = dropped @ w.double().T + 0.5 * (dropped @ as_.T) @ bs.T
    wanted = gains * z + (xs - dropped) @ w.double().T + bias.double()
    assert_within_rounding(y.detach(), wanted.detach(), torch.bfloat16, 1.02 if rank < 48 else 1.1, name="y")
    for name, found, right, times in zip(
        ("dx", "da", "db", "dgain"), grads, torch.autograd.grad(wanted, wide, dy.double()), (1.1, 1.5, 1.5, 1.5), strict=True
    ):
        assert_within_rounding(found, right, torch.bfloat16, times, name=name)
