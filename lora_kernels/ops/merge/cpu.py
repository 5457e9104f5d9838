"""CPU: torch's own product on a few rows at a time, which stay in the cache from the product to the
rounding."""

import torch

from lora_kernels.ops.merge.both_ops import implements_merge

BLOCK = 2**18  # elements of W that are widened at a time: 1 MiB of float32


@implements_merge("cpu")
def merge(call, out):
    w, wide = call.w, torch.promote_types(call.w.dtype, torch.float32)
    (n, k), a, b = w.shape, call.a.to(wide), call.b.to(wide)
    gain = None if call.gain is None else call.gain.to(wide)[:, None]
    rows = max(1, BLOCK // max(k, 1))
    sums = w.new_empty(min(rows, n), k, dtype=wide)
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        block = sums[: min(rows, n - first)]
        block.copy_(w[part]).addmm_(b[part], a, alpha=call.scale)               # [rows, in]
        if gain is not None:
            block.mul_(gain[part])
        out[part].copy_(block)
