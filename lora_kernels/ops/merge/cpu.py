"""CPU: torch's own product on a few rows at a time, which stay in the cache from the product to the rounding."""

import torch

from lora_kernels.ops.registry import implements

BLOCK = 2**18  # elements of W that are widened at a time: 1 MiB of float32


@implements("merge_into", "cpu")
@implements("merged_weight", "cpu")
def merged_weight(w, a, b, scale, gain, out=None):
    out = torch.empty_like(w) if out is None else out
    wide = torch.promote_types(w.dtype, torch.float32)
    (n, k), a, b = w.shape, a.to(wide), b.to(wide)
    gain = None if gain is None else gain.to(wide)[:, None]
    rows = max(1, BLOCK // max(k, 1))
    sums = w.new_empty(min(rows, n), k, dtype=wide)
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        block = sums[: min(rows, n - first)]
        block.copy_(w[part]).addmm_(b[part], a, alpha=scale)               # [rows, in]
        if gain is not None:
            block.mul_(gain[part])
        out[part].copy_(block)
    return out
