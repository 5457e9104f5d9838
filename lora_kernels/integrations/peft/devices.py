"""Where a fused layer would gain nothing: the reference sums in float32 and is slower than PEFT's
own forward."""

from functools import cache

import torch
from torch import Tensor

from lora_kernels.ops.launch import refuse_device
from lora_kernels.ops.registry import PREFERENCE, forced_backend, missing_backends

NO_CPU_KERNELS = "cpu" in missing_backends()
"""Kept, for most calls ask nothing else."""


def device_refusal(t: Tensor) -> str | None:
    """Why no kernel runs where a tensor is, whatever the op; None where one may, where a backend is
    forced, and on the meta device, where nothing is computed."""
    if forced_backend() or t.is_meta:
        return None
    reason = _refusal(t.device.type)
    return refuse_device(t) if reason is None and t.is_cuda else reason


@cache
def _refusal(kind: str) -> str | None:
    # a build of CUDA C++ may be there beside torch for AMD, where it cannot run
    absent = {"reference", *(["cuda"] if torch.version.hip else [])}
    kernels = [backend for backend in PREFERENCE.get(kind, ()) if backend not in absent]
    if not kernels:
        return f"there are no kernels for {kind}"
    missing = missing_backends()
    if set(kernels) - set(missing):
        return None
    return f"there are no kernels for {kind}: " + "; ".join(f"{backend}: {missing[backend]}" for backend in kernels)
