"""Whether CUDA C++ is the only backend with kernels for a GPU that can run."""

import sys

from torch import Tensor

from lora_kernels.ops.launch import refuse_triton
from lora_kernels.ops.registry import forced_backend, missing_backends


def alone(t: Tensor) -> bool:
    """Whether Triton's kernels are no choice for this tensor: CUDA C++ is forced, or Triton is not there, or may not run."""
    if forced_backend() == "cuda" or "triton" not in sys.modules or "triton" in missing_backends():
        return True
    return refuse_triton(t) is not None


def refuse_beside_triton(t: Tensor, why: str) -> str | None:
    """What CUDA C++ says where Triton's kernels run and are the better choice."""
    return None if alone(t) else f"Triton's kernels are there: {why}"
