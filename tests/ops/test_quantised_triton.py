"""Quantised weights in Triton's kernels: numbers, products and norms in the simulator, what they
read, and planted bugs."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from lora_kernels import QuantisedWeight, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.ptxsim import SimulationError, device
from tests.ops.quantised import KINDS, NF4, make_quantised

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops import triton_quantised
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def simulated():
    with use_backend("triton", simulate=True):
        yield


def same_bits(found, wanted):
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_numbers_are_the_formulas(kind, dtype):
    """Bit for bit: blocks that end within rows, within bytes, and beyond the last number."""
    for n_out, n_in, block in ((33, 64, 64), (3, 33, 64), (17, 100, 32), (31, 66, 7), (3, 1100, 2048), (4, 64, 192)):
        w = make_quantised(kind, n_out, n_in, block, dtype)
        assert same_bits(w.dequantise(), dequantised(w)), (n_out, n_in, block)


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows(kind):
    for n_in in (128, 65):
        w = make_quantised(kind, 24, n_in, 64, BF16)
        wanted = dequantised(w)
        for first, rows in ((0, 8), (3, 20), (23, 1), (24, 0), (0, 24)):
            assert same_bits(dequantise_rows(Quantised(*w.fields()), first, rows), wanted[first : first + rows])


def test_every_code():
    """All bytes of each kind, NaN and zeros of both signs too."""
    codes, one, table = torch.arange(256).to(torch.uint8), torch.ones(1), torch.tensor(NF4)
    pairs = QuantisedWeight(codes, (1, 512), one, 512, F32, table).dequantise()[0]
    assert same_bits(pairs.view(256, 2), table[torch.stack((codes >> 4, codes & 15), 1).long()])
    for kind in (torch.int8, torch.float8_e4m3fn):
        found, wanted = QuantisedWeight(codes.view(kind), (1, 256), one, 256, F32).dequantise()[0], codes.view(kind).float()
        assert torch.equal(found.isnan(), wanted.isnan()) and same_bits(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0, 1e-39, 3e38])
def test_odd_scales(value):
    w = make_quantised("nibbles", 4, 64, 64, BF16)
    w.scales[2] = value
    found, wanted = w.dequantise(), dequantised(w)
    assert torch.equal(found.isnan(), wanted.isnan()) and same_bits(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantise_reads_and_writes_once(kind):
    w = make_quantised(kind, 96, 512, 64, BF16)
    with device(trace=True) as sim:
        w.dequantise()
    read, written = sim.dram()
    # of 256 values of scales those that there are
    least, unused = w.nbytes, 1024 if kind == "nested" else 0
    assert sim.launches == 1 and least - unused <= read <= 1.02 * least and written == 2 * w.numel()
    assert sim.counters["store_sectors"] * 32 == written
    assert sim.counters["shared_wavefronts"] == sim.counters["shared_ideal"]


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Kernels from a changed copy of their file in the place of their own."""

    def planted(module, old, new, names, where=None):
        text = Path(module.__file__).read_text()
        assert text.count(old) == 1, old
        copy = tmp_path / f"planted_{len(list(tmp_path.iterdir()))}.py"
        copy.write_text(text.replace(old, new))
        spec = importlib.util.spec_from_file_location(copy.stem, copy)
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        for name in names:
            monkeypatch.setattr(where or module, name, getattr(changed, name))

    return planted


BUGS = [
    ("tl.join(pairs >> 4, pairs & 15)", "tl.join(pairs & 15, pairs >> 4)"),
    ("groups[:, None] * (GROUP // 2) + tl.arange", "groups[:, None] * (GROUP // 2) + 1 + tl.arange"),
    ("quotient(groups * GROUP, weight.block", "quotient(groups * GROUP + 1, weight.block"),
    ("quotient(groups * GROUP, weight.block", "1 + quotient(groups * GROUP, weight.block"),
    (" + tl.load(weight.offset)", ""),
    ("tl.zeros(fine.shape, tl.float32)) + tl.load(weight.offset)", "tl.load(weight.offset) + 0.0 * fine)"),
    ("quotient(blocks, weight.outer_block", "quotient(groups, weight.outer_block"),
    ("tl.where(groups % 2 == 0, pairs >> 4, pairs & 15)", "tl.where(groups % 2 == 1, pairs >> 4, pairs & 15)"),
    ("places < count, first", "places < count - 1, first"),
    ("inside, groups = places < count", "inside, groups = places <= count"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), BUGS)
def test_planted_bugs(old, new, plant):
    """Numbers that are not the formula's, or an access out of bounds."""
    plant(triton_quantised, old, new, ["dequantise_kernel"])
    # the last block is short; an outer block ends inside; rows begin inside bytes
    for n_out, n_in, block in ((3, 64, 128), (3, 33, 8), (300, 128, 128)):
        w = make_quantised("nested", n_out, n_in, block, F32)
        try:
            if not same_bits(w.dequantise(), dequantised(w)):
                return
        except SimulationError as error:
            assert "out of bounds" in str(error)
            return
    pytest.fail("not found")
