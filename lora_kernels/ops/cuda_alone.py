"""Whether CUDA C++ is the only backend with kernels for a GPU that can run."""

from lora_kernels.ops.registry import forced_backend, missing_backends


def stands_alone() -> bool:
    """Whether Triton's kernels are no choice: CUDA C++ is forced, or Triton is not there. What it
    may not run, it refuses for its device, and then so does CUDA C++."""
    return forced_backend() == "cuda" or "triton" in missing_backends()


def refuse_beside_triton(why: str) -> str | None:
    """What CUDA C++ says where Triton's kernels are the better choice."""
    return None if stands_alone() else f"Triton's kernels are there: {why}"
