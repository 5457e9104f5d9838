"""Offsets of the Triton kernels are 64 bits: tensors whose elements lie further apart than 2^31, of
which few are touched."""

from dataclasses import replace

import pytest
import torch

from lora_kernels import lora_linear, merged_weight, use_backend, weight_norm
from lora_kernels.ops import missing_backends
from lora_kernels.testing import make_problem, run

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

import triton
import triton.language as tl

from lora_kernels.ops import triton_skinny
from lora_kernels.ptxsim import SimulationError
from lora_kernels.testing.triton_interpreter import InterpreterViolation
from tests.ops.far import far
from tests.ops.interpreted import interpreted

NAMES = ("x", "w", "a", "b", "dy")


def where(tool):
    return interpreted() if tool == "interpreter" else use_backend("triton", simulate=True)


tools = pytest.mark.parametrize("tool", ["interpreter", "simulator"])


@tools
@pytest.mark.parametrize("name", NAMES)
def test_linear(tool, name):
    problem = make_problem(3, 20, 3, 3, torch.bfloat16, gain=True)
    with where(tool):
        wanted, found = run(problem), run(replace(problem, **{name: far(getattr(problem, name))}))
    assert all(found[key].equal(wanted[key]) for key in wanted)


@tools
@pytest.mark.parametrize("name", ["w", "a", "b"])
def test_norm_and_merge(tool, name):
    p = make_problem(3, 20, 3, 3, torch.bfloat16)
    near = {n: getattr(p, n) for n in ("w", "a", "b")}
    results = []
    with where(tool):
        for given in (near, near | {name: far(near[name])}):
            w, a, b = given["w"], given["a"].requires_grad_(), given["b"].requires_grad_()
            norm = weight_norm(w, a, b, 0.5)
            grads = torch.autograd.grad(norm.sum(), (a, b))
            results.append([norm, *grads, merged_weight(w, a, b, 0.5)])
            if not w.is_contiguous():
                results[-1].append(merged_weight(w, a, b, 0.5, out=w))  # written beyond 2^31, too
                results[0].append(results[0][-1])
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


@triton.jit
def narrow_tile(u, rows, columns, u0, u1, m, n):
    """A bug: offsets of 32 bits."""
    at = rows.to(tl.int32)[:, None] * tl.cast(u0, tl.int32) + columns.to(tl.int32)[None, :] * tl.cast(u1, tl.int32)
    return tl.load(u + at, mask=(rows < m)[:, None] & (columns < n)[None, :], other=0.0)


@tools
def test_a_planted_offset_of_32_bits_is_found(tool, monkeypatch):
    """The interpreter reports the overflow of the arithmetic, the simulator the access."""
    problem = make_problem(3, 20, 3, 3, torch.bfloat16)
    x = far(problem.x)
    # that has not been compiled: Triton keeps what it found in the globals
    fresh = triton.jit(triton_skinny.shrink_kernel.fn)
    monkeypatch.setattr(triton_skinny, "shrink_kernel", fresh)
    monkeypatch.setattr(triton_skinny, "load_tile", narrow_tile)
    with where(tool), pytest.raises((InterpreterViolation, SimulationError), match="overflow|out of bounds"):
        lora_linear(x, *problem.arguments()[1:])


@pytest.fixture
def untouched():
    """Memory that is not filled, or all of it would be touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False


def test_an_output_beyond_32_bits(untouched):
    """y of more than 2^31 elements; only the last program of each launch runs."""
    m, n, k = 2**20 + 5, 2064, 16
    p = make_problem(3, k, n, 2, torch.bfloat16)
    x = p.x[:1].expand(m, k)
    with interpreted(last=1, poison=False), torch.no_grad():
        y = lora_linear(x, *p.arguments()[1:])
    with interpreted():
        wanted = lora_linear(p.x[:1], *p.arguments()[1:])
    assert y.numel() > 2**31
    columns = (n - 1) // 64 * 64
    assert y[-1, columns:].equal(wanted[0, columns:])


def test_a_gradient_beyond_32_bits(untouched):
    """dx, likewise."""
    m, n, k = 2**20 + 5, 16, 2064
    p = make_problem(3, k, n, 2, torch.bfloat16)
    results = []
    for rows, last in ((m, 1), (1, None)):
        x, dy = p.x[:1].expand(rows, k).requires_grad_(), p.dy[:1].expand(rows, n)
        with interpreted(last=last, poison=last is None):
            (dx,) = torch.autograd.grad(lora_linear(x, *p.arguments()[1:]), x, dy)
        results.append(dx)
    dx, wanted = results
    assert dx.numel() > 2**31
    columns = (k - 1) // 64 * 64
    assert dx[-1, columns:].equal(wanted[0, columns:])
