"""weight_norm of a transposed W on the CPU, as an embedding's table is: the norm against float64,
in blocks, without a copy of its rows."""

import pytest
import torch

from lora_kernels import use_backend, weight_norm
from lora_kernels.ops import row_norm_squared
from lora_kernels.ops.weight_norm import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    def copies(w):
        raise AssertionError("rows of W were copied")

    monkeypatch.setattr(cpu, "LARGE_TABLE", 0)
    monkeypatch.setattr(cpu, "TABLE_BLOCK", 30000)
    monkeypatch.setattr(cpu, "_row_blocks", copies)
    with use_backend("cpu"):
        yield


def draw(n_out, n_in, rank, dtype, b_size=0.01, adapter_dtype=None):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n_in, n_out, generator=generator).mul_(0.02).to(dtype).t()
    a = torch.randn(rank, n_in, generator=generator) * n_in**-0.5
    b = torch.randn(n_out, rank, generator=generator) * b_size
    return w, a.to(adapter_dtype or dtype), b.to(adapter_dtype or dtype)


def exact(w, a, b, scale):
    return (w.double() + scale * (b.double() @ a.double())).square().sum(1).sqrt()


def assert_right(found, wanted, limit):
    assert found.dtype is torch.float32
    assert ((found.double() - wanted).abs() / wanted).max() <= limit


@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 1), (31, 17, 3), (65, 129, 17), (7, 2050, 5), (96, 1500, 8)], ids=str)
def test_typical(dtype, shape):
    for b_size, scale in ((0.01, 2.0), (0.3, -1.0), (0.0, 1.0)):
        w, a, b = draw(*shape, dtype, b_size)
        before = w.clone()
        squared = row_norm_squared(w)
        assert_right(squared, w.double().square().sum(1), 1e-6)
        for given in (None, squared):
            assert_right(weight_norm(w, a, b, scale, given), exact(w, a, b, scale), LIMIT[dtype])
        assert torch.equal(w, before)


@dtypes
@pytest.mark.parametrize("noise", [1.0, 1e-1, 1e-2])
def test_rows_that_cancel(dtype, noise):
    w, a, b = draw(65, 512, 16, dtype, 4.0, torch.float32)
    update = b.double() @ a.double()
    w[::2] = (noise * w.double() / 0.02 + 3 * update)[::2].to(dtype)
    for given in (None, row_norm_squared(w)):
        assert_right(weight_norm(w, a, b, -3.0, given), exact(w, a, b, -3.0), max(LIMIT[dtype], 4e-7 / noise))


def test_zero_and_infinite_rows_stay_in_their_rows():
    w, a, b = draw(9, 40, 4, torch.float32)
    w, b = w.clone(), b.clone()
    clean = weight_norm(w, a, b, 1.0)
    w[3], b[3], b[5, 1] = 0, 0, torch.nan
    found = weight_norm(w, a, b, 1.0)
    rest = [0, 1, 2, 4, 6, 7, 8]
    assert found[3] == 0 and found[5].isnan() and torch.equal(found[rest], clean[rest])
    ones = torch.full((32, 5), -4.0).t()
    assert weight_norm(ones, torch.ones(2, 32), torch.ones(5, 2), 2.0).equal(torch.zeros(5))


def test_gradients():
    w, a, b = draw(31, 170, 3, torch.float32, 0.1)
    wide = [t.double().requires_grad_() for t in (a, b)]
    ours = [t.requires_grad_() for t in (a, b)]
    exact(w, *wide, 2.0).sum().backward()
    weight_norm(w, *ours, 2.0).sum().backward()
    for found, wanted in zip(ours, wide, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)
