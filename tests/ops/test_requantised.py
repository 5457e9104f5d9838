"""Merged weights of quantised bases as codes again."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import QuantisedWeight, merged_weight, requantised_weight
from lora_kernels.ops.quantised.requantise import requantised
from tests.ops.quantised import FORMATS, KINDS, make_format, make_quantised

SHAPES = ((48, 64), (33, 100), (7, 33), (1, 2))


def adapter(n_out, n_in, size=0.05):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, n_in, generator=generator) * size, torch.randn(n_out, 4, generator=generator)


def made(name, shape, dtype=torch.float32):
    return make_quantised(name, *shape, dtype=dtype) if name in KINDS else make_format(name, *shape, dtype)


def values(w):
    """Of every code, in float64."""
    if w.table is not None:
        return w.table.double()
    if w.codes.dtype is torch.int8:
        return torch.arange(-128, 128).double()
    every = torch.arange(256).to(torch.uint8).view(w.codes.dtype).double()
    return every[every.isfinite()]


def blocks_of(w):
    """The number of each number's block."""
    numbers = torch.arange(w.numel())
    if not w.block_rows:
        return (numbers // w.block).view(w.shape)
    row, column = numbers // w.shape[1], numbers % w.shape[1]
    return (row // w.block_rows * -(-w.shape[1] // w.block) + column // w.block).view(w.shape)


def scales_and_zeros(w):
    scales = w.scales.float().flatten()
    if w.outer is not None:
        scales = w.outer_table[w.scales.long().flatten()] * w.outer.repeat_interleave(w.outer_block)[: w.blocks] + w.offset
    return scales.double(), torch.zeros(w.blocks).double() if w.zeros is None else w.zeros.flatten().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*KINDS, *FORMATS])
def test_each_code_is_the_nearest_one(name, dtype):
    """With the scale that its block has, of all codes; and the error is the one of the result."""
    for shape in SHAPES:
        w = made(name, shape, dtype)
        a, b = adapter(*w.shape)
        found, error = requantised_weight(w, a, b, 0.7)
        assert type(found) is QuantisedWeight and found.fields()[2] == w.fields()[2]
        assert [t.shape for t in found.fields()[1]] == [t.shape for t in w.fields()[1]]
        merged = merged_weight(w.to(torch.float32), a, b, 0.7).double()
        scales, zeros = (t[blocks_of(w)] for t in scales_and_zeros(found))
        candidates = (values(w) - zeros[..., None]) * scales[..., None]
        least = (candidates - merged[..., None]).abs().amin(-1)
        lost = (found.dequantise(torch.float32).double() - merged).abs()
        # a nested scale is rounded after the codes are chosen, HQQ's differences are rounded
        slack = {"nested": 0.02, "hqq": 0.02 if dtype is torch.bfloat16 else 1e-5}.get(name, 1e-5)
        assert bool((lost <= least + slack * scales.abs() * values(w).abs().max()).all()), shape
        torch.testing.assert_close(error, float(lost.norm() / merged.norm()), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [*KINDS, *FORMATS])
def test_the_error_is_of_the_size_of_a_code(name):
    """Of normal numbers in 4 and 8 bits, rows of other sizes where a scale is for less than a
    row."""
    w = made(name, (66, 256))
    sizes = torch.logspace(-3, 3, 66) if name not in ("nested", "int8 tiles", "e4m3 tiles") else torch.ones(66)
    merged = torch.randn(66, 256, generator=torch.Generator().manual_seed(1)) * sizes[:, None]
    found = requantised(merged, w).dequantise(torch.float32)
    lost = (found - merged).norm(dim=1) / merged.norm(dim=1)
    assert float(lost.max()) < (0.015 if "int8" in name else 0.05 if "e4" in name or name == "float8" else 0.14), lost
    again = requantised(found, w).dequantise(torch.float32)
    assert float((again - found).norm()) <= 0.5 * float((found - merged).norm())


def test_codes_of_bitsandbytes():
    """Its own, double quantised or not, with a ragged last block; of its 8-bit scales
    it takes a neighbour at times."""
    library = pytest.importorskip("bitsandbytes")
    from lora_kernels.nn.quantised import quantised_weight

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for shape in ((64, 128), (40, 1024), (5, 96)):
                base = library.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind, compress_statistics=nested)
                dense = base.weight.data.clone()
                w = quantised_weight(base.to("cpu"), torch.float32)
                found = requantised(dense, w)
                # of two zeros fp4 may have either
                ours, theirs = (replace(each, scales=w.scales).dequantise() for each in (found, w))
                assert torch.equal(ours, theirs), (kind, nested, shape)
                parts = ("outer", "offset") if nested else ("scales",)
                assert all(torch.equal(getattr(found, part), getattr(w, part)) for part in parts), (kind, nested, shape)
                if nested:
                    largest = F.pad(dense.flatten(), (0, -dense.numel() % 64)).view(-1, 64).abs().amax(1).double()
                    ours, theirs = ((scales_and_zeros(each)[0] - largest).abs() for each in (found, w))
                    assert bool((ours <= theirs).all())


def test_dora_and_a_block_of_zeros():
    w = made("nibbles", (16, 128))
    a, b = adapter(16, 128)
    gain = torch.rand(16)
    gain[3] = 0
    found, error = requantised_weight(w, a, b, 0.5, gain)
    merged = merged_weight(w, a, b, 0.5, gain)
    assert not found.dequantise()[3].any() and float((found.dequantise() - merged).norm() / merged.norm()) == pytest.approx(
        error
    )
    assert requantised_weight(w, a, b, 0.5, torch.zeros(16))[1] == 0


def test_what_is_refused():
    w = made("int8", (16, 64))
    a, b = adapter(16, 64)
    with pytest.raises(TypeError, match="w must be a QuantisedWeight, found Tensor"):
        requantised_weight(w.dequantise(), a, b)
    with pytest.raises(ValueError, match="must be finite"):
        requantised_weight(w, a * float("inf"), b)
    with pytest.raises(ValueError, match="merged_weight: .*a"):
        requantised_weight(w, a[:, :5], b)
    with pytest.raises(ValueError, match=r"w must be \[16, 64\]"):
        requantised(torch.zeros(64, 16), w)
