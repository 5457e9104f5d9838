"""The formula in plain PyTorch, summed in float32 (float64 for float64). Every other backend is tested against it."""

import torch

from lora_kernels.ops.registry import implements


@implements("merge_into", "reference")
@implements("merged_weight", "reference")
def merged_weight(w, a, b, scale, gain, out=None):
    wide = torch.promote_types(w.dtype, torch.float32)
    merged = w.to(wide) + scale * (b.to(wide) @ a.to(wide))                # [out, in]
    if gain is not None:
        merged = gain.to(wide)[:, None] * merged
    return (torch.empty_like(w) if out is None else out).copy_(merged)
