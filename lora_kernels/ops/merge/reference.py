"""The formula in plain PyTorch, summed in float32 (float64 for float64). Every other backend is
tested against it."""

import torch

from lora_kernels.ops.derivatives import transformed
from lora_kernels.ops.registry import implements


@implements("merged_weight", "reference")
def merged_weight(call):
    merged = _merged(call).to(call.w.dtype)
    # no transform writes into a tensor that is not its own
    return merged if transformed() else torch.empty_like(call.w).copy_(merged)


@implements("merge_into", "reference")
def merge_into(call):
    call.out.copy_(_merged(call))


def _merged(call):
    wide = torch.promote_types(call.w.dtype, torch.float32)
    w, a, b = call.w.to(wide), call.a.to(wide), call.b.to(wide)
    merged = w + call.scale * (b @ a)                                      # [out, in]
    if call.gain is not None:
        merged = call.gain.to(wide)[:, None] * merged
    return merged
