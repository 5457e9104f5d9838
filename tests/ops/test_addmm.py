"""The library's GEMM with thin kernels around it ("addmm"), in the simulator: values, gradients,
bytes, launches, bits."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import explain, lora_linear, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.dropout import mask
from lora_kernels.ptxsim import device
from lora_kernels.testing import assert_problem, exact, make_group, make_problem, rms, run, run_group

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from tests.ops.interpreted import deterministic

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FLAGS = {
    "lora": {}, "bias": {"bias": True}, "dropout": {"dropout": 0.3}, "dora": {"gain": True},
    "dora_bias": {"gain": True, "bias": True},
    "dropped_base": {"gain": True, "dropout": 0.3}, "dropped_base_bias": {"gain": True, "bias": True, "dropout": 0.3},
    "lora_only": {"gain": True, "bias": True, "dropout": 0.3, "dropout_semantics": "lora_only"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def by_library():
    with use_backend("triton", simulate=True), forced_candidate("addmm"), deterministic(False):
        yield


def peft(problem):
    """What `run` gives, by PEFT's formula in plain PyTorch, each step in the dtypes that PEFT
    has."""
    p = dataclasses.replace(problem)
    leaves = p.require_grad()
    dropped = p.x if not p.dropout else p.x * mask(p.seed, p.dropout, *p.x.shape, p.x.dtype, p.x.device)
    y, term = F.linear(p.x, p.w, p.bias), p.scale * F.linear(F.linear(dropped.to(p.a.dtype), p.a), p.b)
    if p.gain is not None:
        base = F.linear(dropped if p.dropout_semantics == "peft" else p.x, p.w)
        term = (p.gain - 1) * base + p.gain * term
    y = (y + term).to(p.x.dtype)
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))


def error(found, problem):
    truth = exact(problem).values
    return {name: rms(t.double() - truth[name]) for name, t in found.items()}


@pytest.mark.parametrize(("dtype", "flags"), [
    *((BF16, flags) for flags in FLAGS), (F16, "dropped_base_bias"), (F32, "dropped_base"), (F32, "dropout"),
])  # fmt: skip
def test_values_and_gradients(dtype, flags):
    """Within one and a half roundings: what is added to the library's sums was rounded, too."""
    assert_problem(make_problem(70, 136, 140, 20, dtype, **FLAGS[flags]))


@pytest.mark.parametrize(("dtype", "flags"), [(BF16, "dropped_base_bias"), (F16, "dropout")])
def test_float32_adapters(dtype, flags):
    assert_problem(make_problem(20, 1100, 24, 10, dtype, F32, **FLAGS[flags]))  # h comes in parts


@pytest.mark.parametrize(("dtype", "kind", "flags"), [
    (BF16, BF16, "lora"), (BF16, BF16, "dora_bias"), (BF16, BF16, "dropped_base"), (BF16, F32, "lora"),
    (BF16, F32, "dropped_base"), (F16, F16, "dropped_base"),
])  # fmt: skip
def test_no_worse_than_peft(dtype, kind, flags):
    """y and dx, which this form makes, for an adapter as training leaves it, a tenth of the base; 2
    % are chance."""
    p = make_problem(128, 128, 160, 16, dtype, kind, **FLAGS[flags])
    p.b, p.gain = p.b * 0.15, None if p.gain is None else 1 + (p.gain - 1) * 0.1
    ours, theirs = error(run(p), p), error(peft(p), p)
    assert all(ours[name] <= 1.02 * theirs[name] for name in "yx"), (ours, theirs)


def test_an_adapter_that_dominates():
    """It is rounded before it is added, so that two roundings of y's size are the most: √2 of
    one."""
    p = make_problem(128, 128, 160, 16, BF16)
    p.b = p.b * 40
    found, truth = error(run(p), p), exact(p).values
    for name in "yx":
        ideal = rms(truth[name].to(BF16).double() - truth[name])
        assert 1.2 * ideal < found[name] <= 1.5 * ideal, "a single rounding would be another form"


@pytest.mark.parametrize(("gain", "flags"), [(False, {}), (True, {}), (True, {"dropout": 0.3})])
def test_group(gain, flags):
    """Three layers that share x; dx is rounded after each GEMM, but the widest comes last. dy ⊙
    gain is rounded, too."""
    members = [{"n_out": 96, "gain": gain}, {"n_out": 40, "rank": 20}, {"n_out": 72, "gain": gain, "bias": True}]
    problems = [dataclasses.replace(p, b=0.15 * p.b) for p in make_group(members, 40, 72, BF16, **flags)]
    results = run_group(problems)
    truth = [exact(p).values for p in problems]
    for found, wanted, p in zip(results, truth, problems, strict=True):
        for name, value in found.items():
            if name != "x":
                ideal = wanted[name].to(BF16).double() - wanted[name]
                assert rms(value.double() - wanted[name]) <= 2 * rms(ideal), name
        assert found.keys() == wanted.keys() and p.x is problems[0].x
    wanted = sum(values["x"] for values in truth)
    theirs = sum(peft(p)["x"] for p in problems)
    off = rms(results[0]["x"].double() - wanted)
    assert gain or off <= 1.5 * rms(wanted.to(BF16).double() - wanted)
    assert off <= 1.02 * rms(theirs.double() - wanted)


@pytest.mark.parametrize("arch", [90, pytest.param(89, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.slow)])
def test_other_architectures(arch):
    with device(arch):
        assert_problem(make_problem(130, 128, 136, 16, BF16, **FLAGS["dropped_base_bias"]))


def test_what_is_kept_is_the_sum_of_h():
    p = make_problem(70, 2100, 24, 5, BF16)
    x, w, a, b = (t.requires_grad_() if t is not p.w else t for t in (p.x, p.w, p.a, p.b))
    y = lora_linear(x, w, a, b, 0.5)
    h = next(t for t in y.grad_fn.saved_tensors if t is not None and t.shape == (70, 5))
    assert (h - 0.5 * x.detach().float() @ a.detach().float().T).abs().max() < 1e-4


def test_bits():
    """Twice the same, with blocks and warps in another order."""
    problem = make_problem(70, 96, 80, 8, BF16, **FLAGS["dropped_base_bias"])
    results = []
    for seed in (0, 0, 5):
        with device(seed=seed):
            results.append(run(problem))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("flags", ["lora", "dora_bias", "dropped_base"])
def test_bytes_and_launches(flags):
    """What is written and read beside the library's GEMMs: each big tensor once where it must be,
    nothing twice."""
    m, k, n, r = 256, 256, 256, 16
    p = make_problem(m, k, n, r, BF16, **FLAGS[flags])
    x, dy, h = 2 * m * k, 2 * m * n, 4 * m * r
    p.require_grad()
    with device(trace=True) as sim:
        y = lora_linear(*p.arguments())
        made, written = sim.launches, sim.counters["store_bytes"]
        y.backward(p.dy)
    drops, gain = flags == "dropped_base", p.gain is not None
    assert made == 2 and sim.launches == 2 + 4
    assert written == h + drops * x + dy * (1 + gain)
    parts = sim.counters["store_bytes"] - written - (gain * dy + x)
    assert 0 < parts < 1.5 * x, "P, its sum, what the gradients leave in parts and they themselves"


def test_explain_names_it():
    p = make_problem(130, 128, 64, 4, BF16)
    decision = explain(lora_linear, *p.arguments()).decisions[0]
    assert decision.plan.winner == "addmm" and decision.plan.why == "forced"
