"""The backward of lora_linear in CUDA C++ in the deterministic mode, where dx is made by a kernel
of ours, in the simulator: gradients, bits, what it reads, and that its waits are needed.
test_cuda_library.py has what the library's GEMM does."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from lora_kernels import lora_linear, use_backend
from lora_kernels.ops import cuda_alone as choice
from lora_kernels.ops.lora_linear import cuda as backend
from lora_kernels.ops.lora_linear import cuda_backward as cuda
from lora_kernels.ops.lora_linear import cuda_skinny as skinny
from lora_kernels.ops.lora_linear.call import Backward
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc
from lora_kernels.testing import assert_problem, make_problem, run
from tests.ops.far import far
from tests.ops.interpreted import deterministic

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

BF16 = torch.bfloat16
FLAGS = {
    "lora": {}, "bias": {"bias": True}, "dora": {"gain": True}, "dora, bias": {"gain": True, "bias": True},
    "dropout": {"dropout": 0.3}, "dora, dropout": {"dropout": 0.3, "gain": True, "dropout_semantics": "lora_only"},
}  # fmt: skip
# tokens, in, out, r: edges of tiles and of parts, ranks of both widths and in several blocks of
# them, blocks of columns
SHAPES = [(64, 64, 64, 16), (130, 136, 200, 33), (5, 72, 600, 3), (300, 328, 72, 70), (0, 16, 16, 4), (1, 8, 8, 1)]


@pytest.fixture
def simulated():
    with use_backend("cuda", simulate=True), deterministic(True):
        yield


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(simulated, shape, flags):
    with device(seed=shape[0]) as sim:
        assert_problem(make_problem(*shape, BF16, **FLAGS[flags]))
    assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]


def test_launches(simulated):
    """B1, B3, dx and what is left to add up; one more for DoRA without a bias, which looks for
    gains of zero."""
    for flags, launches in (({}, 4), ({"gain": True}, 5), ({"gain": True, "bias": True}, 4), ({"dropout": 0.5}, 4)):
        p = make_problem(70, 64, 64, 16, BF16, dropout_semantics="lora_only", **flags)
        leaves = p.require_grad()
        y = lora_linear(*p.arguments())
        with device() as sim:
            torch.autograd.grad(y, list(leaves.values()), p.dy)
        assert sim.launches == launches


@pytest.mark.parametrize("wanted", [("x",), ("a",), ("b",), ("bias",), ("gain",), ("a", "gain"), ("x", "b", "bias")], ids=str)
def test_only_what_is_asked_for(simulated, wanted):
    p = make_problem(70, 64, 72, 5, BF16, gain=True, bias=True)
    full = run(p)
    leaves = p.require_grad(wanted)
    y = lora_linear(*p.arguments())
    for name, grad in zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True):
        assert grad.equal(full[name])


def test_gains_of_zero(simulated):
    """Their gradients, which y does not tell, in blocks that find several and none."""
    p = make_problem(70, 64, 136, 5, BF16, gain=True)
    with torch.no_grad():
        p.gain[[0, 7, 8, 130]] = 0
    assert_problem(p)
    assert (run(p)["gain"][[0, 7, 8, 130]] != 0).all()


def test_any_order_gives_the_same_bits(simulated):
    p = make_problem(300, 136, 200, 20, BF16, gain=True, dropout=0.2, dropout_semantics="lora_only")
    results = []
    for seed in range(3):
        with device(seed=seed, resident=1 + 7 * (seed % 2)):
            results.append(run(p))
    assert all(one[name].equal(results[0][name]) for one in results for name in one)


def test_gradients_in_float32(simulated):
    """Unrounded, where grad_dtype asks for it."""
    p = make_problem(70, 64, 72, 5, BF16, gain=True, bias=True)
    plain = run(p)
    for t in (p.a, p.b):
        t.grad_dtype = torch.float32
    leaves = p.require_grad()
    y = lora_linear(*p.arguments())
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))
    for name in ("a", "b"):
        assert grads[name].dtype is torch.float32 and grads[name].to(BF16).equal(plain[name])
        assert not grads[name].equal(plain[name].float())


def test_one_number_for_all_of_dy(simulated):
    """As of y.sum(), whose rows have no memory of their own."""
    p = make_problem(70, 64, 72, 5, BF16, gain=True)
    found = run(replace(p, dy=torch.ones((), dtype=BF16).expand(70, 72)))
    wanted = run(replace(p, dy=torch.ones(70, 72, dtype=BF16)))
    assert all(found[key].equal(wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["x", "w", "a", "b", "dy"])
def test_offsets_of_64_bits(simulated, name):
    p = make_problem(3, 24, 3 if name in ("w", "b") else 8, 3, BF16)
    if name in ("w", "b"):  # three rows are far apart, and the kernels want eight
        p = make_problem(3, 24, 8, 3, BF16)
        tall = torch.cat([far(getattr(p, name)[:3].clone())[:1], getattr(p, name)[1:]])
        found = run(replace(p, **{name: tall}))
    else:
        found = run(replace(p, **{name: far(getattr(p, name))}))
    wanted = run(p)
    assert all(found[key].equal(wanted[key]) for key in wanted)


def test_what_is_read(simulated):
    """dy twice and x once, W once; what is kept in parts is small beside them."""
    p = make_problem(256, 512, 1024, 16, BF16)
    leaves = p.require_grad(("x", "a", "b"))
    y = lora_linear(*p.arguments())
    with device(trace=True, shuffle=False) as sim:
        torch.autograd.grad(y, list(leaves.values()), p.dy)
    dy, x, w = p.dy.numel() * 2, p.x.numel() * 2, p.w.numel() * 2
    tiles = 512 // 128, 256 // 128  # of dx: dy once a column of them, W once a row
    least = dy + x + tiles[0] * dy + tiles[1] * w
    assert least <= sim.counters["load_bytes"] <= 1.25 * least
    with device(trace=True, shuffle=False) as sim:
        skinny.both_sides(p.dy, p.b, torch.randn(256, 16), None, None, 1.0, False, 16)
        skinny.outer_product(p.x, torch.randn(2, 256, 16), (0.0, None), True)
    read, _ = sim.dram()
    assert read <= 1.05 * (dy + x + 2 * 1024 * 16 * 2 + 3 * 256 * 16 * 4)


@pytest.mark.parametrize("arch", [90, 120])
def test_other_architectures(simulated, arch):
    with device(arch=arch):
        assert_problem(make_problem(70, 72, 136, 20, BF16, gain=True, dropout=0.2, dropout_semantics="lora_only"))


MORE_BUGS = [
    (skinny.OUTER, "if (r >= p.r || n >= p.n) return;", "if (n >= p.n) return;"),
    (cuda.DX, "uint64_t(m + i * 16 + odd * 8)", "uint64_t(m + i * 16)"),
    (skinny.SIDES, "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    (skinny.SIDES, "(step + STAGES - 1, steps", "(step + STAGES, steps"),
    (skinny.SIDES, "min(p.r, rank + RANK), RANK / 16);\n        __syncthreads();", "min(p.r, rank + RANK), RANK / 16);"),
    (skinny.SIDES, "of_uv += __shfl_xor_sync(0xffffffffu, of_uv, step);", ""),
    (skinny.OUTER, "cp_async_wait<1>();\n    __syncthreads();", "cp_async_wait<1>();"),
    (skinny.OUTER, "cp_async_wait<1>()", "cp_async_wait<2>()"),
    (skinny.OUTER, "uint64_t(row + r));", "uint64_t(r));"),
    (cuda.DX, "  __syncthreads();  // all copies", "  __syncwarp();  //"),
    (cuda.DX, "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    (cuda.DX, "    cp_async_wait<0>();\n    __syncthreads();", "    __syncthreads();"),
    (cuda.DX, "    __syncthreads();  // the tiles have been read\n", ""),
    (cuda.DX, "odd ? words.x : words.z", "odd ? words.z : words.x"),
    (skinny.SUMS, "part < job.parts", "part < 1"),
    (skinny.SUMS, "  __syncthreads();\n  float total", "  float total"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "old", "new"), [
    (skinny.SIDES, "  __syncthreads();  // all copies", "  __syncwarp();  //"),
    (skinny.SIDES, "if (m < end && r < p.r)", "if (r < p.r)"),
    (skinny.OUTER, "    __syncthreads();  // the tiles of the step before have been read\n", ""),
    (cuda.DX, "load_rows(f, p_rest, i);", ""),
    (skinny.SUMS, "if (p.gain[n] != 0) return;", "return;"),
    (cuda.DX, "", ""),
    *(pytest.param(*bug, marks=pytest.mark.slow) for bug in MORE_BUGS),
])  # fmt: skip
def test_planted_bugs(planted, monkeypatch, simulated, source, old, new):
    keep = {skinny.SIDES: "sides_times_bf16_16", skinny.OUTER: "outer_drop_bf16_16", cuda.DX: "dx_gain_drop"}
    planted(source, old, new, keep=f"lora_linear_{keep.get(source, 'none')}")
    # several steps of a block, and two parts
    monkeypatch.setattr(skinny, "part_of_rows", lambda *_: 128)
    p = make_problem(200, 136, 200, 13, BF16, gain=True, bias=None, dropout=0.3, dropout_semantics="lora_only")
    with torch.no_grad():
        p.gain[[3, 150]] = 0
    leaves = p.require_grad()
    with use_backend("reference"):
        y = lora_linear(*p.arguments())
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for seed in range(2):
            with device(seed=seed):
                found = torch.autograd.grad(y, list(leaves.values()), p.dy, retain_graph=True)
            with use_backend("reference"):
                wanted = torch.autograd.grad(y, list(leaves.values()), p.dy, retain_graph=True)
            for one, other in zip(found, wanted, strict=True):
                assert (one.float() - other.float()).norm() <= 5e-3 * other.float().norm()


def test_triton_comes_first_where_it_is_there(monkeypatch):
    p = make_problem(4, 16, 16, 2, BF16)
    h, needs = torch.randn(4, 2), [1, 1, 1, 0, 0]
    call = Backward(p.dy, p.x, p.w, p.a, p.b, 1.0, None, None, 0.0, None, False, h, None, None, needs)
    monkeypatch.setattr(backend, "refuse_cuda", lambda *_: None)
    monkeypatch.setattr(choice, "missing_backends", dict)
    assert backend.backward_refusal(call) == "Triton's kernels are there: they take three launches"
    monkeypatch.setattr(choice, "missing_backends", lambda: {"triton": "not installed"})
    assert backend.backward_refusal(call) is None
