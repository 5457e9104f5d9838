"""One call that runs a problem forward and backward and holds every result to the figures of
`tolerances`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops import Member, lora_linear, lora_linear_group
from lora_kernels.testing.exact import Exact, Problem, exact
from lora_kernels.testing.tolerances import assert_componentwise, assert_within_rounding, rms, unit_roundoff


def run(problem: Problem) -> dict[str, Tensor]:
    """y and the gradient of every input but w, by name."""
    leaves = problem.require_grad()
    y = lora_linear(*problem.arguments())
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), problem.dy), strict=True))


def assert_problem(problem: Problem, w: Any = None) -> dict[str, Tensor]:
    """Runs the problem; y and all gradients must have the right dtype and be within rounding of the
    exact ones. On any device. `w` runs in the place of the problem's W, which has its numbers."""
    results = run(problem if w is None else replace(problem, w=w))
    truth, terms = exact(problem), problem.terms()
    for name, actual in results.items():
        assert_result(name, actual, problem, truth, terms[name])
    return results


def member(problem: Problem) -> Member:
    """The member of a group that computes what the problem says, but for x and dropout."""
    return Member(problem.w, problem.a, problem.b, problem.scale, problem.bias, problem.gain, problem.seed)


def run_group(problems: Sequence[Problem]) -> list[dict[str, Tensor]]:
    """What `run` gives of each problem, from one call of `lora_linear_group`. All x must be one
    tensor, and so is its gradient, the sum over the problems."""
    first = problems[0]
    assert all(p.x is first.x and p.dropout_semantics == first.dropout_semantics for p in problems)
    leaves = [p.require_grad() for p in problems]
    dropout = [p.dropout for p in problems]
    ys = lora_linear_group(first.x, [member(p) for p in problems], dropout, first.dropout_semantics)
    # by identity: problems may share more than x
    tensors = list({id(t): t for found in leaves for t in found.values()}.values())
    grads = torch.autograd.grad(ys, tensors, [p.dy for p in problems])
    of = {id(t): g for t, g in zip(tensors, grads, strict=True)}
    return [{"y": y} | {n: of[id(t)] for n, t in found.items()} for y, found in zip(ys, leaves, strict=True)]


def assert_group(problems: Sequence[Problem]) -> list[dict[str, Tensor]]:
    """Runs the group; every y and all gradients are held to what `assert_problem` holds them to.
    The gradient of x must be within rounding of the exact sum: one rounding, however many
    members."""
    results, truths = run_group(problems), [exact(p) for p in problems]
    for result, problem, truth in zip(results, problems, truths, strict=True):
        terms = problem.terms()
        for name, actual in result.items():
            if name != "x":
                assert_result(name, actual, problem, truth, terms[name])
    total = Exact(
        values={"x": torch.stack([t.values["x"] for t in truths]).sum(0)},
        magnitudes={"x": torch.stack([t.magnitudes["x"] for t in truths]).sum(0)},
    )
    assert_result("x", results[0]["x"], problems[0], total, sum(p.terms()["x"] for p in problems))
    return results


def assert_result(name: str, actual: Tensor, problem: Problem, truth: Exact, terms: int) -> None:
    """One result, y or the gradient of an input, is of the right dtype and within rounding of the
    exact one."""
    wanted = (problem.x if name == "y" else getattr(problem, name)).dtype
    assert actual.dtype is wanted, f"{name} is {actual.dtype}, wanted {wanted}"
    actual = actual.cpu()  # where the exact values are
    lowest = max(problem.x.dtype, wanted, key=unit_roundoff)
    inherited = 0.0
    if name == "gain":
        # its gradient is a sum over y as it was rounded; ulp/√12 is at most 2u/√12 of a value
        assert truth.dgain_terms is not None
        inherited = rms(truth.dgain_terms) * unit_roundoff(lowest) / 3**0.5
    # a few numbers have no rms to speak of: the bound on each of them below is the test there
    if unit_roundoff(lowest) > unit_roundoff(torch.float32) and actual.numel() >= 8:
        assert_within_rounding(actual, truth.values[name], lowest, inherited=inherited, name=name)
    sums = torch.promote_types(problem.x.dtype, torch.float32)
    roundings = 1 if lowest.itemsize > 2 else 3
    assert_componentwise(actual, truth.values[name], truth.magnitudes[name], terms, lowest, roundings, sums, name)
