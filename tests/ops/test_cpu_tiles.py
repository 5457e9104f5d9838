"""bf16 products on AMX tiles against float64, with odd shapes, strides, and NaN wherever nothing may be read or written."""

import math

import pytest
import torch

_cpu = pytest.importorskip("lora_kernels._cpu", reason="the CPU kernels are not built here")
if not _cpu.has_matmul():
    pytest.skip("this processor has no AMX tiles", allow_module_level=True)

from lora_kernels.ops.buffers import matrix, vector  # noqa: E402
from lora_kernels.ops.tiles import matmul, product  # noqa: E402

SHAPES = [(1, 1, 1), (3, 33, 17), (15, 64, 31), (16, 32, 16), (17, 100, 50), (33, 31, 65), (48, 129, 97), (64, 257, 40)]
SHAPES += [(65, 33, 5), (90, 129, 97), (130, 1100, 300)]


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
def test_product(shape):
    x, w = operands(*shape)
    close(product(x, w), x, w)
    close(product(x, w, scale=0.25) * 4, x, w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul(shape):
    x, w = operands(*shape)
    close(matmul(x, w.T.contiguous()), x, w)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 5, 33, 70])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 100, 50), (48, 129, 97), (64, 257, 40), (130, 1100, 70)], ids=str)
def test_forward_tiles(shape, adapter_dtype, rank, threads):
    x, w = operands(*shape)
    tokens, n_in = x.shape
    n_out = len(w)
    generator = torch.Generator().manual_seed(rank)
    h, b, gain, bias = (torch.randn(s, generator=generator) for s in ((tokens, rank), (n_out, rank), (n_out,), (n_out,)))
    b = b.to(adapter_dtype)
    # one row and five columns more than the result, which must stay as they are
    y, z = torch.full((tokens + 1, n_out + 5), 7.0), torch.full((tokens + 1, n_out + 5), 7.0)
    _cpu.forward_tiles(
        matrix(x), matrix(w), matrix(b), matrix(y), matrix(z), vector(bias), vector(gain), h.data_ptr(), 1.0,
        tokens, n_in, n_out, rank, threads,
    )  # fmt: skip
    truth = x.double() @ w.double().T + h.double() @ b.double().T
    # of the adapter's term 2⁻¹⁶ is lost: h, and b unless it is bf16, are two bf16 numbers each
    allowed = (x.double().abs() @ w.double().abs().T) * (n_in + rank) * 2.0**-24
    allowed += (h.double().abs() @ b.double().abs().T) * (2.0**-16 + rank * 2.0**-24)
    assert ((z[:tokens, :n_out].double() - truth).abs() <= allowed).all()
    scaled = allowed * gain.double().abs() + (gain.double() * truth).abs() * 2.0**-22 + bias.double().abs() * 2.0**-22
    assert ((y[:tokens, :n_out].double() - (gain.double() * truth + bias.double())).abs() <= scaled).all()
    for held in (y, z):
        assert (held[tokens] == 7).all() and (held[:, n_out:] == 7).all()


def test_a_nan_stays_in_its_token_and_in_its_row_of_w():
    for tokens in (40, 130):
        x, w = operands(tokens, 129, 97)
        x[7, 5] = w[33, 128] = math.nan
        bad = torch.zeros(tokens, 97, dtype=torch.bool)
        bad[7] = bad[:, 33] = True
        for y in (product(x, w), matmul(x, w.T.contiguous())):
            assert torch.equal(y.isnan(), bad)


def test_the_result_of_a_token_is_that_of_the_token_alone():
    x, w = operands(150, 1300, 70)
    y = product(x, w)
    for tokens in (1, 16, 17, 33, 63, 64, 65, 140):
        assert torch.equal(product(x[:tokens], w), y[:tokens])
        assert torch.equal(product(x[150 - tokens :], w), y[150 - tokens :])


def test_infinite_h_is_not_made_nan():
    x, w = operands(70, 64, 32)
    h, b = torch.full((70, 1), math.inf), torch.ones(32, 1, dtype=torch.bfloat16)
    y = torch.empty(70, 32)
    arguments = (matrix(x), matrix(w), matrix(b), matrix(y), None, None, None, h.data_ptr(), 1.0, 70, 64, 32, 1, 2)
    _cpu.forward_tiles(*arguments)
    assert (y == math.inf).all()
