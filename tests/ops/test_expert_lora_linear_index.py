"""expert_lora_linear that reads x through an index: the numbers of a gathered x, and of each row of
x the sum of its tokens' gradients."""

import re
from dataclasses import replace

import pytest
import torch

from lora_kernels import expert_lora_linear, use_backend
from lora_kernels.ops.registry import forced_backend
from lora_kernels.testing import make_expert_problem, run_experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 11
SIZES = [3, 0, 40, 1, 14]
FLAGS = [{}, {"gain": True, "bias": True}, {"rank": 0, "gain": True}]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def indexed(problem):
    """(x, index) of whose rows the tokens of the problem are made; the last row has none, and two
    tokens of one expert are the same row."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(ROWS - 1, (len(problem.x),), generator=generator)
    x = torch.randn(ROWS, problem.x.shape[1], generator=generator).to(problem.x.dtype)
    return x, index


def gradients(problem, x, index):
    """y and all gradients."""
    leaves = replace(problem, x=x.clone()).require_grad()
    p = replace(problem, **leaves)
    y = expert_lora_linear(*p.arguments(), index)
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))


def assert_as_gathered(problem):
    x, index = indexed(problem)
    found, wanted = gradients(problem, x, index), run_experts(replace(problem, x=x[index]))
    dx, of_tokens = found.pop("x"), wanted.pop("x").double()
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=0, atol=0)
    sums = torch.zeros(x.shape, dtype=torch.float64).index_add(0, index, of_tokens)
    sizes = torch.zeros(x.shape, dtype=torch.float64).index_add(0, index, of_tokens.abs())
    # rounded once, after a float32 sum; the reference's sums are of what is not rounded before
    more = 1e-6 if forced_backend() == "cpu" else torch.finfo(dx.dtype).eps
    error = (dx.double() - sums).abs() - torch.finfo(dx.dtype).eps * sums.abs() - more * sizes
    assert error.max() <= 1e-7 and not dx[ROWS - 1].any() and dx.dtype is x.dtype


@dtypes
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_the_numbers_are_those_of_a_gathered_x(backend, dtype, transposed):
    for flags in FLAGS:
        for peft in (False, True):
            values = {"left": 2, "transposed": transposed, "peft": peft} | flags
            assert_as_gathered(make_expert_problem(SIZES, 70, 50, dtype=dtype, **values))


@pytest.mark.parametrize("sizes", [[0, 41, 0], [1, 1], [0, 0], [2, 300, 5]], ids=str)
def test_sizes(backend, sizes):
    for dtype in DTYPES[:2]:
        assert_as_gathered(make_expert_problem(sizes, 33, 29, 3, dtype, bias=True))


def test_strides_of_x(backend):
    p = make_expert_problem(SIZES, 24, 20, 4, torch.bfloat16)
    x, index = indexed(p)
    apart = torch.full((ROWS, 48), torch.nan, dtype=x.dtype)[:, ::2].copy_(x)
    turned = x.T.contiguous().T
    wanted = gradients(p, x, index)
    for view in (apart, turned):
        y = expert_lora_linear(*replace(p, x=view).arguments(), torch.stack([index, index], 1)[:, 0])
        torch.testing.assert_close(y, wanted["y"], rtol=0, atol=0)


def test_who_gets_a_gradient(backend):
    p = make_expert_problem(SIZES, 24, 20, 4, bias=True, gain=True)
    x, index = indexed(p)
    everything = gradients(p, x, index)
    for name in ("x", "a", "b", "gain"):
        of = replace(p, **{each: getattr(p, each).detach() for each in ("a", "b", "bias", "gain")} | {"x": x.clone()})
        leaf = getattr(of, name).requires_grad_()
        (grad,) = torch.autograd.grad(expert_lora_linear(*of.arguments(), index), leaf, p.dy)
        assert grad.equal(everything[name]), name


def test_derivatives():
    p = make_expert_problem([2, 0, 3], 4, 3, 2, torch.float64, left=1, bias=True, gain=True)
    x, index = indexed(p)
    p = replace(p, x=x[:4])
    index %= 4
    leaves = p.require_grad()

    def call(*tensors):
        return expert_lora_linear(*replace(p, **dict(zip(leaves, tensors, strict=True))).arguments(), index)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, list(leaves.values()), nondet_tol=0.0, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, list(leaves.values()))


def test_opcheck_and_compiled_bits(backend):
    p = make_expert_problem(SIZES, 24, 20, 4, torch.bfloat16, left=1, bias=True)
    x, index = indexed(p)
    fields = (x, p.w, p.a, p.b, p.offsets, p.scale, p.bias, None, False)
    ops = torch.ops.lora_kernels
    torch.library.opcheck(ops.expert_lora_linear_forward.default, (*fields, True, False, index))
    _, h, _ = ops.expert_lora_linear_forward.default(*fields, True, False, index)
    given = (p.dy, *fields, h, None, None, [1, 1, 1, 1, 0], index)
    torch.library.opcheck(ops.expert_lora_linear_backward.default, given)
    compiled = torch.compile(expert_lora_linear, fullgraph=True, backend="aot_eager")
    of = replace(p, x=x)
    assert compiled(*of.arguments(), index).equal(expert_lora_linear(*of.arguments(), index))


def test_no_gathered_x_is_kept():
    p = make_expert_problem([30, 0, 34], 64, 8, 2)
    x, index = indexed(p)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expert_lora_linear(*replace(p, x=x.requires_grad_()).arguments(), index)
    assert not any(t.shape == (64, 64) for t in kept) and any(t is x or t._base is x for t in kept)


@pytest.mark.parametrize(
    "index, words",
    [
        (torch.zeros(4, dtype=torch.int32), "index must be int64 of one dimension, found torch.int32 [4]"),
        (torch.zeros(2, 2, dtype=torch.int64), "index must be int64 of one dimension, found torch.int64 [2, 2]"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "index must be on cpu (x), found meta"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(index, words):
    p = make_expert_problem([3, 1])
    with pytest.raises(ValueError, match=re.escape(f"expert_lora_linear: {words}")):
        expert_lora_linear(*p.arguments(), index)


@pytest.mark.parametrize("row", [-1, 4, 2**62])
def test_rows_beyond_x_are_refused(row):
    p = make_expert_problem([3, 1])
    words = f"expert_lora_linear: index must name the 4 rows of x, found {row} at token 2"
    with use_backend("cpu"), pytest.raises(ValueError, match=re.escape(words)):
        expert_lora_linear(*p.arguments(), torch.tensor([0, 1, row, 3]))


def test_sums_over_the_tokens_of_a_row_are_rounded_once():
    p = make_expert_problem([30, 0, 34], dtype=torch.bfloat16)
    x, index = p.x[:1].detach().requires_grad_(), torch.zeros(64, dtype=torch.int64)
    of_tokens = x.detach().expand(64, -1).clone().requires_grad_()
    with use_backend("cpu"):
        (found,) = torch.autograd.grad(expert_lora_linear(x, *p.arguments()[1:], index), x, p.dy)
        (each,) = torch.autograd.grad(expert_lora_linear(of_tokens, *p.arguments()[1:]), of_tokens, p.dy)
    torch.testing.assert_close(found[0].double(), each.double().sum(0), rtol=2**-8, atol=1e-4)
