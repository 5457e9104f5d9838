"""bf16 products on AMX tiles against float64, with odd shapes, strides, and NaN wherever nothing may be read or written."""

import math

import pytest
import torch

_cpu = pytest.importorskip("lora_kernels._cpu", reason="the CPU kernels are not built here")
if not _cpu.has_matmul():
    pytest.skip("this processor has no AMX tiles", allow_module_level=True)

from lora_kernels.ops.buffers import matrix  # noqa: E402
from lora_kernels.ops.tiles import FEW, few_tokens, matmul, padded  # noqa: E402

SHAPES = [(1, 1, 1), (3, 33, 17), (15, 64, 31), (16, 32, 16), (17, 100, 50), (33, 31, 65), (48, 129, 97), (64, 257, 40)]


def operands(tokens, n_in, n_out, gap=3):
    """x [tokens, in] and w [out, in] inside larger matrices of NaN."""
    generator = torch.Generator().manual_seed(tokens)
    made = []
    for rows in (tokens, n_out):
        held = torch.full((rows, n_in + gap), math.nan, dtype=torch.bfloat16)
        held[:, :n_in] = torch.randn(rows, n_in, generator=generator).to(torch.bfloat16)
        made.append(held[:, :n_in])
    return made


def close(found, x, w):
    # float32 sums of exact products: n·2⁻²⁴ of the sum of their sizes
    wide_x, wide_w = x.double(), w.double()
    allowed = (wide_x.abs() @ wide_w.abs().T) * x.shape[1] * 2.0**-24
    assert ((found.double() - wide_x @ wide_w.T).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_tokens(shape):
    x, w = operands(*shape)
    close(few_tokens(x, w), x, w)


@pytest.mark.parametrize("shape", [*SHAPES, (90, 129, 97), (130, 1100, 300)], ids=str)
def test_matmul_both_ways(shape):
    x, w = operands(*shape)
    close(matmul(padded(x), w, len(x), transposed=True), x, w)
    flipped = operands(shape[0], shape[1], shape[2])[1].T.contiguous()
    close(matmul(padded(x), flipped, len(x), transposed=False), x, flipped.T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_tokens_writes_its_result_and_nothing_else(shape):
    x, w = operands(*shape)
    tokens, n_in = x.shape
    held = torch.full((tokens + 1, len(w) + 5), 7.0)
    _cpu.matmul_few(matrix(x), matrix(w), held.data_ptr(), held.stride(0), tokens, n_in, len(w), 2)
    close(held[:tokens, : len(w)], x, w)
    assert (held[tokens] == 7).all() and (held[:, len(w) :] == 7).all()


def test_a_nan_stays_in_its_token_and_in_its_row_of_w():
    x, w = operands(40, 129, 97)
    x[7, 5] = w[33, 128] = math.nan
    for y in (few_tokens(x, w), matmul(padded(x), w, len(x), transposed=True)):
        bad = torch.zeros(40, 97, dtype=torch.bool)
        bad[7] = bad[:, 33] = True
        assert torch.equal(y.isnan(), bad)


def test_the_result_of_a_token_is_that_of_the_token_alone():
    x, w = operands(FEW, 300, 70)
    y = few_tokens(x, w)
    for tokens in (1, 16, 17, 33, 63):
        assert torch.equal(few_tokens(x[:tokens], w), y[:tokens])
        assert torch.equal(few_tokens(x[FEW - tokens :], w), y[FEW - tokens :])


def test_more_than_few_tokens_are_refused():
    x, w = operands(FEW + 1, 32, 16)
    with pytest.raises(ValueError, match="matmul_few: too many tokens"):
        few_tokens(x, w)
