"""The formula in plain PyTorch, summed in float32 (float64 for float64)."""

import torch

from lora_kernels.ops.registry import implements


@implements("dora_linear", "reference")
def forward(x, w, a, b, scale, bias, magnitude):
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, w_wide, a_wide, b_wide = (t.to(wide) for t in (x, w, a, b))
    adapted = w_wide + scale * (b_wide @ a_wide)                            # [out, in]
    norm = adapted.square().sum(1).sqrt()                                  # [out]
    gain = torch.where(norm == 0, 1.0, magnitude.to(wide) / torch.where(norm == 0, 1.0, norm))
    y = gain * (x_wide @ w_wide.T + scale * (x_wide @ a_wide.T) @ b_wide.T)  # [tokens, out]
    return (y if bias is None else y + bias.to(wide)).to(x.dtype), norm
