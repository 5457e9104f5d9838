"""Triton: y = gain ⊙ (x Wᵀ + scale · drop(x) Aᵀ Bᵀ) + bias of few tokens, W as codes. A tile of
codes becomes numbers in registers just before its product, so that W is read as bytes, once, in one
launch."""

import triton
import triton.language as tl

from lora_kernels.ops.lora_linear.triton_forward import epilogue, reduce_split_k
from lora_kernels.ops.triton_dropout import dropout_mask
from lora_kernels.ops.triton_quantised import load_numbers_of_tile, load_scales_of_tile, load_table
from lora_kernels.ops.triton_skinny import dot_accumulate, load_tile


@triton.jit
def mainloop_of_codes(
    shared, layer, weight, rows, columns, begin, end, m, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    OUTER_SHIFT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """x wᵀ [BM, BN] and drop(x) aᵀ [BM, BR] over columns `begin` to `end` of x [m, k].

    Both are summed as their transposes: warps that share a product share its rows, and so none
    reads the w of another.
    """
    accumulator, h = tl.zeros((BN, BM), tl.float32), tl.zeros((BR, BM), tl.float32)
    ranks, table = tl.arange(0, BR).to(tl.int64), load_table(weight, KIND)
    next_scales = load_scales_of_tile(weight, columns, begin, layer.n, shared.k, KIND, GROUP, SHIFT, OUTER_SHIFT, BK)
    for first in range(begin, end, BK):
        scales = next_scales
        # a step ahead, since a scale that is a code itself takes one load after another
        next_scales = load_scales_of_tile(weight, columns, first + BK, layer.n, shared.k, KIND, GROUP, SHIFT, OUTER_SHIFT, BK)
        depth = first + tl.arange(0, BK).to(tl.int64)
        xs = load_tile(shared.x, depth, rows, shared.x1, shared.x0, shared.k, m)  # [BK, BM]
        as_ = load_tile(layer.a, ranks, depth, layer.a0, layer.a1, layer.r, shared.k)  # [BR, BK]
        numbers = load_numbers_of_tile(weight, table, scales, columns, first, layer.n, shared.k, KIND, GROUP, BK)
        ws = tl.reshape(numbers.to(xs.dtype), (BN, BK))
        accumulator = dot_accumulate(ws, xs, accumulator, PRECISION)
        dropped_xs = xs
        if layer.drop is not None:
            dropped_xs = tl.where(tl.trans(dropout_mask(layer.drop, rows, first, BM, BK)), xs, 0.0)
        h = dot_accumulate(as_, dropped_xs, h, PRECISION)
    return tl.trans(accumulator), tl.trans(h)


@triton.jit(do_not_specialize=["m"])
def quantised_forward_kernel(
    shared, layer, weight, m, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, OUTER_SHIFT: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    RANK_STAGES: tl.constexpr,
):  # fmt: skip
    """y = gain ⊙ (x wᵀ + scale · drop(x) aᵀ bᵀ) + bias of one `ForwardLayer`, whose w is a `Parts`.
    SPLITS: as many programs share a tile's depth."""
    down, tile = tl.cdiv(m, BM), tl.program_id(0)
    # rows of tiles one after another: they read the same codes
    row, column = tile % down, tile // down
    rows, columns = row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BN + tl.arange(0, BN)
    last_block = True
    depth = tl.cdiv(tl.cdiv(shared.k, BK), SPLITS) * BK
    begin = tl.program_id(1) * depth
    accumulator, h = mainloop_of_codes(
        shared, layer, weight, rows, columns, begin, min(shared.k, begin + depth), m, KIND, GROUP, SHIFT, OUTER_SHIFT,
        PRECISION, BM, BN, BK, BR,
    )  # fmt: skip
    if SPLITS > 1:
        last_block, accumulator, h = reduce_split_k(
            accumulator, h, layer.a, shared.scratch, shared.ticket, tile, SPLITS, BM, BN, BR
        )
    if last_block:
        epilogue(accumulator, accumulator, h, layer, shared.parts, rows, columns, column, m, PRECISION, BR, RANK_STAGES)
