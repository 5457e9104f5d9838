"""Triton: norms of the rows of a quantised W, whose codes are read once."""

import torch
import triton
import triton.language as tl

from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_quantised import groups_of_tile, load_scales, load_table, load_values, rounded
from lora_kernels.ops.triton_skinny import dot_accumulate, load_tile


@triton.jit
def quantised_norm_kernel(
    layer, weight, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, OUTER_SHIFT: tl.constexpr,
    DTYPE: tl.constexpr, MORE: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """norm [n] = ‖w + scale · b a‖ of a `NormLayer` whose w is a `Parts`; without a it is ‖w‖².
    MORE: there are more ranks than BR."""
    n, k, r = layer.n, layer.k, layer.r
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks, table = tl.arange(0, BR).to(tl.int64), load_table(weight, KIND)
    squares = tl.zeros((BN, BK), tl.float32)
    for first in range(0, k, BK):
        groups, inside = groups_of_tile(rows, first, n, k, GROUP, BK)
        scales = load_scales(weight, groups, inside, GROUP, SHIFT, OUTER_SHIFT)
        numbers = load_values(weight, table, groups, inside, KIND, GROUP) * scales[:, None]
        adapted = tl.reshape(rounded(numbers, DTYPE), (BN, BK))
        if layer.a is not None:
            depth = first + tl.arange(0, BK).to(tl.int64)
            bs = load_tile(layer.b, rows, ranks, layer.b0, layer.b1, n, r)  # [BN, BR]
            as_ = load_tile(layer.a, ranks, depth, layer.a0, layer.a1, r, k)  # [BR, BK]
            update = dot_accumulate(bs, as_, tl.zeros((BN, BK), tl.float32), PRECISION)
            if MORE:
                for rank in range(BR, r, BR):
                    more_b = load_tile(layer.b, rows, rank + ranks, layer.b0, layer.b1, n, r)  # [BN, BR]
                    more_a = load_tile(layer.a, rank + ranks, depth, layer.a0, layer.a1, r, k)  # [BR, BK]
                    update = dot_accumulate(more_b, more_a, update, PRECISION)
            adapted += layer.scale * update
        squares += adapted * adapted
    found = tl.sum(squares, 1)
    tl.store(layer.norm + rows, found if layer.a is None else tl.sqrt_rn(found), mask=rows < n)


def norms(w, layer, precision=None):
    """Of a `Quantised` and a `NormLayer`, which has no w and gets its norm here."""
    (n, k), t = w.shape, tile("quantised_norm", w.codes)
    norm = w.codes.new_empty(n, dtype=torch.float32)
    args = {
        "layer": layer._replace(norm=norm, n=n, k=k), **w.arguments(t.depth), "DTYPE": w.layout[3], "PRECISION": precision,
        "MORE": layer.r is not None and layer.r > t.ranks,
        "BN": t.rows, "BK": t.depth, "BR": power_of_two(layer.r or 1, most=t.ranks),
    }  # fmt: skip
    launch_triton(quantised_norm_kernel, (ceil_div(n, t.rows),), args, [norm], warps=t.warps, stages=t.stages)
    return norm
