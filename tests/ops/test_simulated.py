"""Triton's kernels in the simulator, end to end: ops, gradients, layers, what they read and write. `make test-slow` runs all
tests of the ops on them."""

import dataclasses

import pytest
import torch

from lora_kernels import explain, lora_linear, use_backend, weight_norm
from lora_kernels.nn import DoRALinear
from lora_kernels.ops import dora_gain, missing_backends, row_norm_squared
from lora_kernels.testing import as_layout, assert_problem, make_problem, run
from lora_kernels.testing.ptxsim import SimulationError, device

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

FLAGS = {
    "lora": {}, "dora_bias": {"gain": True, "bias": True}, "dropout": {"dropout": 0.3},
    "dora_dropout_bias": {"gain": True, "bias": True, "dropout": 0.3},
    "dora_lora_only": {"gain": True, "dropout": 0.3, "dropout_semantics": "lora_only"},
}  # fmt: skip
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def simulated():
    with use_backend("triton", simulate=True):
        yield


@pytest.mark.parametrize(("dtype", "flags"), [
    *((BF16, flags) for flags in FLAGS), (F16, "lora"), (F16, "dora_dropout_bias"), (F32, "dora_bias"), (F32, "dropout"),
])  # fmt: skip
def test_values_and_gradients(dtype, flags):
    assert_problem(make_problem(70, 96, 80, 8, dtype, **FLAGS[flags]))


@pytest.mark.parametrize("shape", [(1, 17, 31, 3), (33, 130, 65, 17), (5, 3, 4, 200)], ids=str)
def test_odd_sizes(shape):
    assert_problem(make_problem(*shape, BF16, gain=True))


def test_layouts():
    problem = make_problem(9, 40, 24, 4, BF16, gain=True)
    for name, layout in {"x": "gapped_rows", "w": "transposed", "a": "offset", "b": "transposed", "dy": "every_other"}.items():
        problem = dataclasses.replace(problem, **{name: as_layout(getattr(problem, name), layout)})
    assert_problem(problem)


def test_half_a_base_and_float32_adapters():
    assert_problem(make_problem(20, 48, 40, 4, BF16, F32, gain=True))


@pytest.mark.parametrize(("n_out", "n_in", "rank", "dtype"), [(65, 129, 17, BF16), (31, 40, 3, F32), (9, 40, 100, F16)])
def test_norm(n_out, n_in, rank, dtype):
    check_norm(n_out, n_in, rank, dtype)


def check_norm(n_out, n_in, rank, dtype):
    torch.manual_seed(0)
    w, a, b = (torch.randn(s) for s in ((n_out, n_in), (rank, n_in), (n_out, rank)))
    w, a, b = w.to(dtype), a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
    with torch.no_grad():
        b[3] = 0
        b[5] = -torch.linalg.lstsq(a.float().T, 2 * w[5].float()[:, None]).solution[:, 0].to(dtype)  # cancels if it can
    norm = weight_norm(w, a, b, 0.5)
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    wanted = (w.double() + 0.5 * wide[1] @ wide[0]).square().sum(1).sqrt()
    size = (w.double().square().sum(1).sqrt() + 0.5 * (wide[1].abs() @ wide[0].abs()).norm(dim=1)).detach()
    assert ((norm - wanted).abs() <= (1e-5 if dtype is F32 else 1e-4) * size).all()
    assert torch.equal(weight_norm(w, a, b, 0.5, row_norm_squared(w)), norm)
    dn = torch.randn(n_out)
    for found, exact in zip(torch.autograd.grad(norm, (a, b), dn), torch.autograd.grad(wanted, wide, dn.double()), strict=True):
        assert (found - exact).norm() <= (1e-5 if dtype is F32 else 0.01) * exact.norm()


def test_a_layer_learns():
    """A DoRA layer, forward, backward and step, as on the reference."""
    losses = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        layer = DoRALinear(24, 20, r=4, lora_alpha=8)
        x, target = torch.randn(6, 24), torch.randn(6, 20)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.02)
        losses[backend] = []
        with use_backend(backend, simulate=backend == "triton"):
            for _ in range(3):
                loss = (layer(x) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-5)
    assert losses["triton"][-1] < losses["triton"][0]


@pytest.mark.parametrize("arch", [86, 89, 90, 120])
def test_other_architectures(arch):
    with device(arch) as sim:
        assert_problem(make_problem(130, 128, 128, 16, BF16, gain=True))
        check_norm(65, 128, 16, BF16)
    assert (sim.by_opcode["wgmma.mma_async"] > 0) == (arch == 90)


def test_bits():
    """Twice the same; with blocks and warps in another order; a row alone as among others."""
    problem = make_problem(70, 96, 80, 8, BF16, gain=True, bias=True, dropout=0.3)
    results = []
    for seed in (0, 0, 5):
        with device(seed=seed):
            results.append(run(problem))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in results[0])
    p = make_problem(70, 96, 80, 8, BF16, gain=True)
    whole = lora_linear(*p.arguments())
    for rows in (slice(0, 1), slice(33, 36), slice(3, 67)):
        assert torch.equal(lora_linear(p.x[rows], *p.arguments()[1:]), whole[rows])


def test_what_is_read_and_written():
    """Two launches forward; x twice, W, A and B for each block of rows, y once: as the tiles of 128 say."""
    m, k, n, r = 256, 256, 256, 16
    p = make_problem(m, k, n, r, BF16)
    with device(trace=True) as sim:
        lora_linear(*p.arguments())
    assert sim.launches == 2
    x, w, a, b, h, y = 2 * m * k, 2 * n * k, 2 * r * k, 2 * n * r, 4 * m * r, 2 * m * n
    blocks = m // 128
    assert sim.counters["load_bytes"] == x + m // 64 * a + blocks * (x + w) + blocks * (h + b)
    assert sim.counters["store_bytes"] == h + y
    read, written = sim.dram()
    assert read <= 1.01 * (x + w + a + b) and written == h + y
    assert sim.counters["shared_wavefronts"] <= 1.3 * sim.counters["shared_ideal"]


def test_explain():
    p = make_problem(3, 16, 16, 2)
    decision = explain(lora_linear, *p.arguments()).decisions[0]
    assert decision.chosen == "triton (simulated)" and decision.others["cpu"] == "triton (simulated) is forced"
    with use_backend("triton"), pytest.raises(NotImplementedError, match="cannot run on triton: its kernels run on a GPU"):
        lora_linear(*p.arguments())


def test_a_finding_is_raised(monkeypatch):
    """What the simulator finds in an op's kernel comes out of the op."""
    from lora_kernels.ops.lora_linear import triton as backend

    p = make_problem(16, 32, 32, 4, BF16)
    launch = backend.launch
    monkeypatch.setattr(backend, "launch", lambda kernel, grid, args, made, **how: launch(
        kernel, grid, args | {"n": 48} if "forward" in str(kernel.fn) else args, made, **how))  # fmt: skip
    with pytest.raises(SimulationError, match="out of bounds, forward_kernel_param_"):
        lora_linear(*p.arguments())


def test_gain_of_zero():
    p = make_problem(7, 32, 16, 4, F32, gain=True)
    p.gain[3] = 0
    results = run(p)
    with use_backend("reference"):
        wanted = run(dataclasses.replace(p))
    assert torch.allclose(results["gain"], wanted["gain"], rtol=1e-4, atol=1e-5)
    assert torch.equal(dora_gain(torch.ones(2), torch.tensor([0.0, 2.0])), torch.tensor([1.0, 0.5]))
