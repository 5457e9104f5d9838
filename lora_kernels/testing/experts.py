"""expert_lora_linear against the exact results of its experts, each of which is one
`lora_linear`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.expert_lora_linear import expert_lora_linear
from lora_kernels.testing.check import assert_result
from lora_kernels.testing.exact import Problem, exact, make_problem

NAMES = ("x", "a", "b", "bias", "gain")


@dataclass
class ExpertProblem:
    """The arguments of one `expert_lora_linear` call, the gradient that comes back into it, and the
    problem of each expert."""

    x: Tensor
    offsets: Tensor
    w: Tensor
    a: Tensor | None
    b: Tensor | None
    scale: float
    bias: Tensor | None
    gain: Tensor | None
    transposed: bool
    dy: Tensor
    experts: list[Problem]

    def arguments(self) -> tuple[Any, ...]:
        """In the order of the parameters."""
        return self.x, self.offsets, self.w, self.a, self.b, self.scale, self.bias, self.gain, self.transposed

    def require_grad(self) -> dict[str, Tensor]:
        """Marks the tensors that may learn and returns them."""
        found = {name: t for name in NAMES if (t := getattr(self, name)) is not None}
        for t in found.values():
            t.requires_grad_()
        return found


def make_expert_problem(
    sizes: Sequence[int],
    n_in: int = 64,
    n_out: int = 48,
    rank: int = 8,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    scale: float = 1.5,
    left: int = 0,
    transposed: bool = False,
    peft: bool = False,
    index: torch.dtype = torch.int32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **flags: Any,
) -> ExpertProblem:
    """Experts with so many tokens each, and `left` tokens of none; `flags` are `bias` and `gain` of
    `make_problem`. Rank 0 has no adapter. With `peft` a and b lie as PEFT's parameters of all
    experts do."""
    experts = [
        make_problem(size, n_in, n_out, max(rank, 1), dtype, adapter_dtype, scale=scale, seed=seed + e, device=device, **flags)
        for e, size in enumerate(sizes)
    ]
    rest = make_problem(left, n_in, n_out, 1, dtype, seed=seed + len(experts), device=device)

    def stack(name: str) -> Tensor | None:
        return None if getattr(experts[0], name) is None else torch.stack([getattr(p, name) for p in experts])

    w, a, b = (torch.stack([getattr(p, name) for p in experts]) for name in ("w", "a", "b"))
    if peft:
        b = b.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # of [out, r · experts], the experts side by side
    return ExpertProblem(
        x=torch.cat([*(p.x for p in experts), rest.x]),
        offsets=torch.tensor(sizes).cumsum(0).to(device, index),
        w=w.mT.contiguous() if transposed else w,
        a=a if rank else None,
        b=b if rank else None,
        scale=scale,
        bias=stack("bias"),
        gain=stack("gain"),
        transposed=transposed,
        dy=torch.cat([*(p.dy for p in experts), rest.dy]),
        experts=experts,
    )


def run_experts(problem: ExpertProblem) -> dict[str, Tensor]:
    """y and the gradient of every input but w, by name."""
    leaves = problem.require_grad()
    y = expert_lora_linear(*problem.arguments())
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), problem.dy), strict=True))


def assert_expert_problem(problem: ExpertProblem) -> dict[str, Tensor]:
    """Runs the problem: y and all gradients of each expert are held to what `assert_problem` holds
    those of a layer to. Rows of no expert, and gradients of experts without tokens, are zero."""
    results = run_experts(problem)
    for name, t in results.items():
        like = problem.dy if name == "y" else getattr(problem, name)
        assert t.shape == like.shape, f"{name} is {list(t.shape)}, wanted {list(like.shape)}"
    ends = problem.offsets.tolist()
    for e, (expert, first, last) in enumerate(zip(problem.experts, [0, *ends], ends, strict=False)):
        if problem.a is None:
            expert.b = torch.zeros_like(expert.b)
        truth, terms = exact(expert), expert.terms()
        for name, t in results.items():
            actual = t[first:last] if name in ("y", "x") else t[e]
            if first == last:
                assert not actual.numel() or not actual.count_nonzero(), f"{name} of expert {e}, which has no tokens"
            else:
                assert_result(name, actual, expert, truth, terms[name])
    for name in ("y", "x"):
        assert not results[name][ends[-1] :].count_nonzero(), f"{name} of tokens that belong to no expert"
    return results
