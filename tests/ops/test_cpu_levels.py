"""Every instruction set that the CPU kernels are compiled for, not only the one that this processor
would choose."""

import os
import subprocess
import sys

import pytest
import torch

from lora_kernels import use_backend, weight_norm
from lora_kernels.ops import row_norm_squared
from lora_kernels.ops.dropout import mask
from lora_kernels.ops.multi_lora import multi_lora
from lora_kernels.testing import assert_expert_problem, assert_problem, make_expert_problem, make_problem, run
from tests.ops.cpu import at_level
from tests.ops.test_multi_lora import CASES, assert_exact, draw, planned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def levels():
    try:
        from lora_kernels import _cpu
    except ImportError as error:  # one failing test that says why, rather than none
        return [f"not built: {error}"]
    return _cpu.levels()


@pytest.fixture(params=levels())
def level(request):
    with at_level(request.param), use_backend("cpu"):
        yield request.param


@pytest.mark.parametrize("width", [1, 4, 31, 32, 33, 63, 64, 65, 96, 129, 200])
def test_the_mask_of_any_width(level, width):
    """Blocks of 32 and 64 columns, and what is left of them."""
    from lora_kernels.ops.cpu_tensors import add_adapter, dropout_args

    for number in (3, -(2**62) + 5):
        seed, found = torch.tensor(number), torch.full((7, width), torch.nan)
        drop = dropout_args(0.3, seed)
        add_adapter(torch.ones(7, width), found, None, torch.empty(7, 1), mask=drop, mask_from=True)
        assert torch.equal(found, mask(seed, 0.3, 7, width, torch.float32, seed.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear(level, dtype):
    for tokens in (0, 1, 2, 5, 6, 7, 13, 33, 70, 130):
        for n_in, n_out, rank in ((1, 1, 1), (33, 65, 3), (130, 31, 17), (64, 96, 8)):
            assert_problem(make_problem(tokens, n_in, n_out, rank, dtype, gain=True, bias=True))
            assert_problem(make_problem(tokens, n_in, n_out, rank, dtype, torch.float32, dropout=0.3))
    assert_problem(make_problem(3, 5000, 40, 5, dtype, gain=True, bias=True, dropout=0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_expert_lora_linear(level, dtype, transposed):
    for sizes, n_in, n_out, rank in (([1, 0, 7, 40, 2], 33, 65, 3), ([13, 130, 0], 130, 31, 17)):
        flags = {"left": 2, "peft": rank == 3, "gain": rank == 3, "bias": True, "transposed": transposed}
        assert_expert_problem(make_expert_problem(sizes, n_in, n_out, rank, dtype, **flags))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_norm(level, dtype):
    for n_out, n_in, rank in ((1, 1, 1), (33, 65, 3), (130, 31, 17), (64, 96, 8), (5, 3000, 70)):
        p = make_problem(1, n_in, n_out, rank, dtype)
        truth = (p.w.double() + 1.5 * (p.b.double() @ p.a.double())).norm(dim=1)
        torch.testing.assert_close(weight_norm(p.w, p.a, p.b, 1.5).double(), truth, rtol=2e-6, atol=0)
        torch.testing.assert_close(row_norm_squared(p.w).double(), p.w.double().square().sum(1), rtol=1e-6, atol=0)
        w = (-1.5 * (p.b.double() @ p.a.double()) + 0.01).to(dtype)
        truth = (w.double() + 1.5 * (p.b.double() @ p.a.double())).norm(dim=1)
        torch.testing.assert_close(weight_norm(w, p.a, p.b, 1.5).double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multi_lora(level, dtype):
    for case in CASES:
        x, w, slots, slot, weights, bias = draw(*case, dtype)
        assert_exact(multi_lora(x, w, slots, planned(slots, slot, weights), bias), (x, w, slots, slot, weights, bias))


def test_every_level_draws_the_same_mask(level):
    from lora_kernels import _cpu

    for tokens in (3, 70):
        here = run(make_problem(tokens, 61, 50, 4, dropout=0.4))["y"]
        _cpu.set_level("portable")
        torch.testing.assert_close(here, run(make_problem(tokens, 61, 50, 4, dropout=0.4))["y"], rtol=1e-5, atol=1e-5)
        _cpu.set_level(level)


def test_an_unknown_level_is_refused():
    from lora_kernels import _cpu

    with pytest.raises(ValueError, match="this processor has no level sse9"):
        _cpu.set_level("sse9")


SCRATCH = """
import torch
from lora_kernels import _cpu, use_backend, weight_norm
from lora_kernels.testing import assert_problem, make_problem, poisoned
with use_backend("cpu"), poisoned():
    for level in _cpu.levels():
        _cpu.set_level(level)
        for tokens in (1, 5, 40, 70):
            for dtype in (torch.float32, torch.bfloat16):
                assert_problem(make_problem(tokens, 33, 41, 3, dtype, gain=True, bias=True))
                p = make_problem(tokens, 33, 41, 3, dtype, gain=True, bias=True, dropout=0.3)
                assert_problem(p)
                n = weight_norm(p.w, p.a, p.b, 1.5).double()
                assert ((p.w.double() + 1.5 * (p.b.double() @ p.a.double())).norm(dim=1) / n - 1).abs().max() < 1e-5
print("clean")
"""


def test_scratch_memory_is_written_before_it_is_read():
    # glibc fills what malloc returns with bytes 0x7f, 3.4e38 as a float
    environment = os.environ | {"MALLOC_PERTURB_": "128"}
    done = subprocess.run([sys.executable, "-c", SCRATCH], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "clean\n", done.stderr
