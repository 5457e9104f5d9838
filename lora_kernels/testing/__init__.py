"""What the tests of this package are made of, public so that a new backend can be held to the same
figures."""

from lora_kernels.testing.check import assert_group, assert_problem, member, run, run_group
from lora_kernels.testing.exact import Problem, exact, make_group, make_problem
from lora_kernels.testing.experts import ExpertProblem, assert_expert_problem, make_expert_problem, run_experts
from lora_kernels.testing.grid import LAYOUTS, RANKS, SHAPES, TOKENS, as_layout
from lora_kernels.testing.poison import poisoned
from lora_kernels.testing.tolerances import (
    assert_componentwise,
    assert_no_worse_than_torch,
    assert_within_rounding,
    rms,
    unit_roundoff,
)

__all__ = [
    "LAYOUTS",
    "RANKS",
    "SHAPES",
    "TOKENS",
    "ExpertProblem",
    "Problem",
    "as_layout",
    "assert_componentwise",
    "assert_expert_problem",
    "assert_group",
    "assert_no_worse_than_torch",
    "assert_problem",
    "assert_within_rounding",
    "exact",
    "make_expert_problem",
    "make_group",
    "make_problem",
    "member",
    "poisoned",
    "rms",
    "run",
    "run_experts",
    "run_group",
    "unit_roundoff",
]
