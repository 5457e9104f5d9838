"""The formula in plain PyTorch, summed in float32 (float64 for float64)."""

import torch

from lora_kernels.ops.registry import implements


@implements("dora_linear", "reference")
def forward(call):
    wide, bias = torch.promote_types(call.x.dtype, torch.float32), call.bias
    x, w, a, b, magnitude = (t.to(wide) for t in (call.x, call.w, call.a, call.b, call.magnitude))
    adapted = w + call.scale * (b @ a)                                      # [out, in]
    squared = adapted.square().sum(1)                                       # [out]
    zero = squared == 0
    norm = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
    gain = torch.where(zero, 1.0, magnitude / torch.where(zero, 1.0, norm))
    y = gain * (x @ w.T + call.scale * (x @ a.T) @ b.T)                      # [tokens, out]
    return (y if bias is None else y + bias.to(wide)).to(call.x.dtype), norm
