"""lora_linear and autograd: gradcheck, who gets a gradient, saved tensors, threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear, use_backend
from lora_kernels.ops.registry import ON_GPU
from lora_kernels.testing import exact, make_problem, run
from tests.ops.interpreted import deterministic

NAMES = ("x", "a", "b", "bias", "gain")
SUBSETS = list(chain.from_iterable(combinations(NAMES, n) for n in range(len(NAMES) + 1)))
FLAGS = [
    {},
    {"bias": True},
    {"gain": True},
    {"gain": True, "bias": True},
    {"dropout": 0.4, "bias": True},
    {"gain": True, "bias": True, "dropout": 0.4},
    {"gain": True, "dropout": 0.4, "dropout_semantics": "lora_only"},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("tensor_scale", [False, True])
def test_gradcheck(flags, tensor_scale):
    scale = torch.tensor(0.7, dtype=torch.float64) if tensor_scale else 0.7
    p = make_problem(4, 5, 3, 2, torch.float64, scale=scale, **flags)
    names = list(p.require_grad())

    def call(*tensors):
        return lora_linear(*replace(p, **dict(zip(names, tensors, strict=True))).arguments())

    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, [getattr(p, n) for n in names], nondet_tol=0.0)


def test_cpu_refuses_float64_in_words():
    p = make_problem(4, 5, 3, 2, torch.float64)
    with (
        use_backend("cpu"),
        pytest.raises(NotImplementedError, match="lora_linear_forward cannot run on cpu: .*float64"),
    ):
        lora_linear(*p.arguments())


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("tokens", [3, 80])
def test_finite_differences(backend, flags, tokens):
    # the objective <y, dy> is linear in each tensor alone: a central difference has no error but
    # rounding
    p = make_problem(tokens, 40, 30, 4, **flags)
    grads = {k: v.double() for k, v in run(p).items() if k != "y"}
    generator = torch.Generator().manual_seed(3)
    for name, grad in grads.items():
        step = torch.randn(grad.shape, generator=generator)

        def objective(sign, name=name, step=step):
            with torch.no_grad():
                y = lora_linear(*replace(p, **{name: getattr(p, name).detach() + sign * step}).arguments())
            return (y.double() * p.dy.double()).sum()

        measured, wanted = (objective(1) - objective(-1)) / 2, (grad * step.double()).sum()
        assert abs(measured - wanted) < 1e-5 * (grad.norm() * step.norm() + p.dy.norm()), name


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(s) or "none")
def test_who_gets_a_gradient(backend, subset):
    for tokens, flags in ((3, {"dropout": 0.3}), (90, {})):
        complete = make_problem(tokens, 40, 30, 4, torch.bfloat16, gain=True, bias=True, **flags)
        some = make_problem(tokens, 40, 30, 4, torch.bfloat16, gain=True, bias=True, **flags)
        everything = run(complete)
        some.require_grad(subset)
        y = lora_linear(*some.arguments())
        assert y.requires_grad == bool(subset) and y.equal(everything["y"])
        if subset:
            y.backward(some.dy)
        for name in NAMES:
            grad = getattr(some, name).grad
            assert grad is None if name not in subset else grad.equal(everything[name]), name


def test_no_grad_mode_and_inference_mode(backend):
    p = make_problem(3, gain=True)
    wanted = run(p)["y"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = lora_linear(*p.arguments())
        assert not y.requires_grad and y.equal(wanted)


def test_first_derivatives_under_create_graph_are_the_same(backend):
    p = make_problem(3, gain=True, bias=True, dropout=0.2)
    plain = run(p)
    leaves = p.require_grad()
    grads = torch.autograd.grad(lora_linear(*p.arguments()), list(leaves.values()), p.dy, create_graph=True)
    assert all(g.equal(plain[name]) for name, g in zip(leaves, grads, strict=True))


@pytest.mark.parametrize("name", ["x", "w", "a", "b", "gain", "seed", "y"])
def test_a_saved_tensor_changed_in_place_raises(backend, name):
    for tokens in (3, 80):
        p = make_problem(tokens, gain=True, dropout=0.2, dropout_semantics="lora_only")
        p.require_grad()
        y = lora_linear(*p.arguments())
        with torch.no_grad():
            (y if name == "y" else getattr(p, name)).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(p.dy)


def test_backward_twice_over_one_graph(backend):
    p = make_problem(6, gain=True, bias=True, dropout=0.2)
    leaves = list(p.require_grad().values())
    y = lora_linear(*p.arguments())
    one = torch.autograd.grad(y, leaves, p.dy, retain_graph=True)
    assert all(g.equal(h) for g, h in zip(one, torch.autograd.grad(y, leaves, p.dy), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, p.dy)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(backend, reentrant):
    p = make_problem((2, 9), gain=True, bias=True, dropout=0.4)
    p.seed = None
    leaves = list(p.require_grad().values())

    def call(*_):
        return lora_linear(*p.arguments())

    results = []
    for wrap in (False, True):
        torch.manual_seed(5)
        for leaf in leaves:
            leaf.grad = None
        y = checkpoint(call, *leaves, use_reentrant=reentrant) if wrap else call()
        torch.rand(3)
        y.backward(p.dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


def test_accumulation_over_micro_batches(backend):
    p = make_problem(64, gain=True, bias=True)
    for leaf in p.require_grad(("a", "b", "gain", "bias")).values():
        leaf.grad = None
    for half in (slice(0, 32), slice(32, 64)):
        lora_linear(*replace(p, x=p.x[half]).arguments()).backward(p.dy[half])
    truth = exact(p).values
    for name in ("a", "b", "gain", "bias"):
        torch.testing.assert_close(getattr(p, name).grad.double(), truth[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    choice = pytest.importorskip("lora_kernels.ops.cpu_gemm").choice
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            # where the library multiplies with A and B, the mode is what keeps its bits out
            with use_backend("cpu"), deterministic(choice(dtype).thin > 0):
                results.append(
                    [
                        run(make_problem(tokens, 129, 101, 9, dtype, **flags))
                        for tokens in (1, 3, 5)
                        for flags in ({"gain": True}, {"bias": True}, {"dropout": 0.2})
                    ]
                )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            # the gradient of x is a vendor GEMM, whose blocking may follow the number of threads
            assert [n for n in one if not one[n].equal(two[n])] in ([], ["x"])


def test_python_threads_do_not_disturb_each_other(backend):
    barrier = threading.Barrier(2)

    def work(seed):
        results = []
        with use_backend(backend, simulate=backend in ON_GPU):
            barrier.wait(30)
            for i in range(30):
                p = make_problem((3, 70)[i % 2], 65, 50, 5, gain=True, dropout=0.2, seed=seed)
                results.append(run(p))
        return results

    with ThreadPoolExecutor(2) as pool:
        together = [f.result(60) for f in [pool.submit(work, seed) for seed in (1, 2)]]
    for seed, results in zip((1, 2), together, strict=True):
        alone = [run(make_problem(tokens, 65, 50, 5, gain=True, dropout=0.2, seed=seed)) for tokens in (3, 70)]
        for i, result in enumerate(results):
            assert all(result[name].equal(alone[i % 2][name]) for name in result)
