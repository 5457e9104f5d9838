"""x Wᵀ with float32 sums and x packed, at each level, inside matrices of NaN, against float64."""

import math
from dataclasses import replace

import pytest
import torch

_cpu = pytest.importorskip("lora_kernels._cpu", reason="the CPU kernels are not built here")

from lora_kernels.ops import cpu_gemm as module  # noqa: E402
from lora_kernels.ops.cpu_gemm import base_product, base_product_slices, choice, forced_choice, packs_x  # noqa: E402
from tests.ops.cpu import at_level, operands  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 33, 17), (16, 15, 7), (33, 64, 48), (40, 97, 50), (48, 130, 49), (49, 200, 6), (64, 500, 65)]
SHAPES += [(65, 127, 13), (96, 193, 100), (97, 64, 55), (130, 31, 9)]


@pytest.fixture(params=_cpu.levels())
def level(request):
    with at_level(request.param):
        yield request.param


def product(x, w, threads=2):
    """The result inside a matrix with a row and five columns more, which must stay as they are."""
    held = torch.full((len(x) + 1, len(w) + 5), math.nan)
    held[len(x)] = held[:, len(w) :] = 7
    assert _cpu.base_product(x, w, held[: len(x), : len(w)], threads)
    assert (held[len(x)] == 7).all() and (held[:, len(w) :] == 7).all()
    return held[: len(x), : len(w)]


def packing(dtype, first, last):
    """The row in use, but with x packed from and up to so many tokens."""
    return forced_choice(replace(choice(dtype), packed_from=first, packed=last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(level, shape, threads, dtype):
    x, w = operands(*shape, dtype)
    y, wide_x, wide_w = product(x, w, threads), x.double(), w.double()
    # a sum of at most 64 products, then of the blocks
    allowed = (wide_x.abs() @ wide_w.abs().T) * (min(shape[1], 64) + shape[1] // 64 + 1) * 2.0**-24
    assert ((y.double() - wide_x @ wide_w.T).abs() <= allowed).all()


def test_the_bits_of_a_token_do_not_depend_on_the_others(level):
    x, w = operands(96, 300, 70, torch.float32)
    y = product(x, w)
    for count in (1, 7, 33, 64, 65):
        assert torch.equal(product(x[:count], w), y[:count])
        assert torch.equal(product(x[-count:], w, 3), y[-count:])


def test_special_numbers_stay_in_their_token_and_their_output(level):
    x, w = operands(64, 129, 97, torch.float32)
    x[7, 5], x[9, 128], w[33, 128] = math.nan, math.inf, -math.inf
    y, expected = product(x, w), x @ w.T
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf()) and torch.equal(y[y.isinf()], expected[y.isinf()])


def test_depth_or_outputs_or_tokens_of_none(level):
    assert torch.equal(product(torch.empty(40, 0), torch.empty(9, 0)), torch.zeros(40, 9))
    assert product(torch.empty(40, 8), torch.empty(0, 8)).shape == (40, 0)
    assert product(torch.empty(0, 8), torch.empty(9, 8)).shape == (0, 9)


def test_columns_are_refused():
    x, w, y = torch.randn(40, 8), torch.randn(9, 8), torch.full((40, 9), math.nan)
    for args in ((x.T.contiguous().T, w, y), (x, w.T.contiguous().T, y), (x, w, y.T.contiguous().T)):
        assert not _cpu.base_product(*args, 1) and args[2].isnan().all()
        assert torch.allclose(base_product(x.contiguous(), *args[1:]), x @ w.T, atol=1e-5)
        args[2].fill_(math.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [4, 24, 25, 64, 65, 256, 257])
def test_any_way_to_the_product(level, tokens, dtype):
    with packing(dtype, 25, 256):
        check_any_way(tokens, dtype)


def test_more_tokens_than_are_packed_at_a_time(level, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 48)
    for dtype in DTYPES:
        with packing(dtype, 1, 200):
            check_any_way(130, dtype)


def check_any_way(tokens, dtype):
    x, w = operands(tokens, 200, 300, dtype)
    y = torch.full((tokens, 300), math.nan)
    found = base_product(x, w, y)
    assert found is y or (found.dtype is torch.float32 and dtype is not torch.float32)
    wanted = x.float() @ w.float().T
    assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.allclose(torch.cat([wide for _, wide in base_product_slices(x, w)], 1), wanted, atol=1e-4)


def test_what_is_packed(level):
    for dtype, first, last in ((torch.float32, 25, 64), (torch.bfloat16, 1, 256), (torch.float16, 7, 7)):
        w, tiles = torch.empty(3, 8, dtype=dtype), _cpu.has_tiles() and dtype is torch.bfloat16
        with packing(dtype, first, last):
            found = [tokens for tokens in range(300) if packs_x(torch.empty(tokens, 8, dtype=dtype), w)]
        assert found == ([] if tiles else list(range(first, last + 1)))
    with packing(torch.float32, 0, 2**31):
        for x, w in ((8, torch.empty(3, 8).half()), (3, torch.empty(8, 3).T), (0, torch.empty(3, 0))):
            assert not packs_x(torch.empty(40, x), w)


def test_more_outputs_than_a_piece(monkeypatch, level):
    """The float32 product of 16-bit weights is never there as a whole."""
    monkeypatch.setattr(module, "PIECE", 64 * 40)
    monkeypatch.setattr(module, "BLOCK", 16)
    x, w = operands(40, 33, 150, torch.float16)
    with packing(torch.float16, 1, 64):
        pieces = list(base_product_slices(x, w))
    assert [p.shape[1] for _, p in pieces] == [64, 64, 22]
    assert torch.allclose(torch.cat([p for _, p in pieces], 1), x.float() @ w.float().T, atol=1e-4)
