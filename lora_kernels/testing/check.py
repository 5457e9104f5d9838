"""One call that runs a problem forward and backward and holds every result to the figures of `tolerances`."""

import torch
from torch import Tensor

from lora_kernels.ops import lora_linear
from lora_kernels.testing.exact import Problem, exact
from lora_kernels.testing.tolerances import assert_componentwise, assert_within_rounding, rms, unit_roundoff


def run(problem: Problem) -> dict[str, Tensor]:
    """y and the gradient of every input but w, by name."""
    leaves = problem.require_grad()
    y = lora_linear(*problem.arguments())
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), problem.dy), strict=True))


def assert_problem(problem: Problem) -> dict[str, Tensor]:
    """Runs the problem; y and all gradients must have the right dtype and be within rounding of the exact ones."""
    results, truth, terms = run(problem), exact(problem), problem.terms()
    for name, actual in results.items():
        wanted = (problem.x if name == "y" else getattr(problem, name)).dtype
        assert actual.dtype is wanted, f"{name} is {actual.dtype}, wanted {wanted}"
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
        assert_componentwise(
            actual, truth.values[name], truth.magnitudes[name], terms[name], lowest, roundings, sums, name
        )
    return results
