"""weight_norm and its rivals: PEFT's norm of the same layer, and the factored norm in plain
PyTorch."""

import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer

from bench.lora_linear import DTYPES, RANKS, SHAPES, factored_norm
from bench.paired import interleaved_medians, measurement_row
from lora_kernels import weight_norm
from lora_kernels.ops import row_norm_squared


def contenders(n_in, n_out, r, dtype):
    """The calls to time, by name. W is frozen, so ours and torch have its own norm from before."""
    w, a, b = (torch.randn(shape, dtype=dtype) for shape in ((n_out, n_in), (r, n_in), (n_out, r)))
    squared, peft_norm = row_norm_squared(w), DoraLinearLayer(fan_in_fan_out=False)

    def norm_by_peft():
        # as peft/tuners/lora/dora.py does in each forward: B A by way of the identity, then the
        # sum, then its norm
        eye = torch.eye(n_in, dtype=dtype)
        return peft_norm.get_weight_norm(w, ((eye @ a.T) @ b.T).T, 0.5)

    return {
        "ours": lambda: weight_norm(w, a, b, 0.5, squared),
        "ours with W squared": lambda: weight_norm(w, a, b, 0.5),
        "peft": norm_by_peft,
        "torch": lambda: factored_norm(w, a, b, 0.5, squared),
    }


def measurements(quick=False, dtypes=DTYPES, slow_backward=False):
    """Every measurement."""
    for dtype in dtypes:
        for n_in, n_out in SHAPES[:2] if quick or slow_backward else SHAPES:
            for r in [16] if quick or slow_backward else RANKS:
                seconds = interleaved_medians(contenders(n_in, n_out, r, dtype))
                yield measurement_row("weight_norm", "dora", dtype, {"K": n_in, "N": n_out, "r": r}, seconds, what="norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ours", "ours with W squared", "peft", "torch"])
def test_weight_norm(benchmark, name, dtype):
    """`make bench-pytest`. pytest-benchmark does not interleave: for ratios use `python -m
    bench`."""
    benchmark.group = str(dtype)
    benchmark(contenders(1024, 1024, 16, dtype)[name])
