"""The formula in plain PyTorch, summed in float32 (float64 for float64). Every other backend is
tested against it."""

import torch

from lora_kernels.ops.merge.both_ops import implements_merge


@implements_merge("reference")
def merge(call, out):
    wide = torch.promote_types(call.w.dtype, torch.float32)
    w, a, b = call.w.to(wide), call.a.to(wide), call.b.to(wide)
    merged = w + call.scale * (b @ a)                                      # [out, in]
    if call.gain is not None:
        merged = call.gain.to(wide)[:, None] * merged
    out.copy_(merged)
