"""Triton: dx = (dy ⊙ gain) W + drop(p A) of few tokens, W as codes, which become numbers in
registers just before their product: W is read as bytes, once, and is nowhere in 16 bits. The last
programs add up what the launches before left in parts."""

import triton
import triton.language as tl

from lora_kernels.ops.lora_linear.triton_forward import add_adapter, reduce_split_k
from lora_kernels.ops.triton_dropout import dropout_mask
from lora_kernels.ops.triton_partials import reduce_partials
from lora_kernels.ops.triton_quantised import load_numbers_of_tile, load_scales_of_tile, load_table
from lora_kernels.ops.triton_skinny import dot_accumulate, load_tile


@triton.jit
def mainloop_of_codes_over_outputs(
    layer, weight, rows, column, begin, end, m, k, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    OUTER_SHIFT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(dy ⊙ gain) w [BM, BK] over outputs `begin` to `end`, for columns `column` and on of w [n,
    k]. It is summed as its transpose, as in the forward."""
    accumulator, table = tl.zeros((BK, BM), tl.float32), load_table(weight, KIND)
    outputs = begin + tl.arange(0, BN).to(tl.int64)
    next_scales = load_scales_of_tile(weight, outputs, column, layer.n, k, KIND, GROUP, SHIFT, OUTER_SHIFT, BK)
    for first in range(begin, end, BN):
        scales, outputs = next_scales, first + tl.arange(0, BN).to(tl.int64)
        # a step ahead, since a scale that is a code itself takes one load after another
        next_scales = load_scales_of_tile(weight, outputs + BN, column, layer.n, k, KIND, GROUP, SHIFT, OUTER_SHIFT, BK)
        ds = load_tile(layer.dy, outputs, rows, layer.d1, layer.d0, layer.n, m)  # [BN, BM]
        numbers = load_numbers_of_tile(weight, table, scales, outputs, column, layer.n, k, KIND, GROUP, BK)
        ws = tl.reshape(numbers.to(ds.dtype), (BN, BK))
        scaled = ds
        if layer.gain is not None:
            gains = tl.load(layer.gain + outputs, mask=outputs < layer.n, other=0.0).to(tl.float32)
            scaled = ds.to(tl.float32) * gains[:, None]
            # one more rounding, for half the products; float16 has no exponents to spare
            if ds.dtype == tl.bfloat16:
                scaled = scaled.to(tl.bfloat16)
        accumulator = dot_accumulate(tl.trans(ws), scaled, accumulator, PRECISION)
    return tl.trans(accumulator)


@triton.jit
def gradient_of_zero_gain_of_codes(
    n, shared, layer, weight, table, m, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    OUTER_SHIFT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dgain[n] = Σ dy ⊙ z, which y cannot tell where the gain is zero."""
    k, r = shared.k, layer.r
    of_w, of_b = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BR), tl.float32)
    for row in range(0, m, BM):
        rows = row + tl.arange(0, BM).to(tl.int64)
        ds = tl.load(layer.dy + rows * layer.d0 + n * layer.d1, mask=rows < m, other=0.0).to(tl.float32)[:, None]
        for first in range(0, k, BK):
            xs = load_tile(shared.x, rows, first + tl.arange(0, BK).to(tl.int64), shared.x0, shared.x1, m, k)  # [BM, BK]
            outputs = n + tl.arange(0, 1)
            scales = load_scales_of_tile(weight, outputs, first, layer.n, k, KIND, GROUP, SHIFT, OUTER_SHIFT, BK)
            numbers = load_numbers_of_tile(weight, table, scales, outputs, first, layer.n, k, KIND, GROUP, BK)
            ws = tl.reshape(numbers.to(xs.dtype), (1, BK))
            of_w += ds * xs.to(tl.float32) * ws.to(tl.float32)
        for first in range(0, r, BR):
            ranks = first + tl.arange(0, BR).to(tl.int64)
            hs = load_tile(layer.h, rows, ranks, r, 1, m, r)  # [BM, BR]
            bs = tl.load(layer.b + n * layer.b0 + ranks * layer.b1, mask=ranks < r, other=0.0)  # [BR]
            of_b += ds * hs * bs.to(tl.float32)[None, :]
    tl.store(layer.dgain + n, (tl.sum(tl.sum(of_w, 1), 0) + tl.sum(tl.sum(of_b, 1), 0)).to(layer.dgain.dtype.element_ty))


@triton.jit
def rest_of_gradients_of_codes(
    block, sums, shared, layer, weight, m, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    OUTER_SHIFT: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up `sums`; then looks for gains of zero, COLUMNS a block."""
    block = reduce_partials(block, sums, SUMS, BLOCK)
    if layer.dgain is not None:
        if block >= 0 and block < tl.cdiv(layer.n, COLUMNS):
            columns = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
            gains = tl.load(layer.gain + columns, mask=columns < layer.n, other=1.0)
            zero = (gains.to(tl.float32) == 0.0).to(tl.int32)
            if tl.max(zero, 0) > 0:
                table = load_table(weight, KIND)
                for i in range(COLUMNS):
                    if tl.sum(tl.where(tl.arange(0, COLUMNS) == i, zero, 0), 0) > 0:
                        gradient_of_zero_gain_of_codes(
                            block.to(tl.int64) * COLUMNS + i, shared, layer, weight, table, m, KIND, GROUP, SHIFT, OUTER_SHIFT,
                            16, 64, 16,
                        )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def quantised_rest_of_gradients_kernel(
    sums, shared, layer, weight, m, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    OUTER_SHIFT: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rest_of_gradients_of_codes(
        tl.program_id(0), sums, shared, layer, weight, m, KIND, GROUP, SHIFT, OUTER_SHIFT, SUMS, BLOCK, COLUMNS
    )


@triton.jit(do_not_specialize=["m"])
def quantised_input_gradient_kernel(
    dx, shared, layer, weight, sums, scratch, ticket, m, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    OUTER_SHIFT: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    RANK_STAGES: tl.constexpr,
):  # fmt: skip
    """dx = (dy ⊙ gain) w + drop(p a) of one `BackwardLayer`, whose w is a `Parts`. SPLITS: as many
    programs share a tile's depth. Those after the tiles' do `rest_of_gradients_of_codes`."""
    k = shared.k
    down, tile = tl.cdiv(m, BM), tl.program_id(0)
    tiles = down * tl.cdiv(k, BK)
    if tile >= tiles:
        rest_of_gradients_of_codes(
            (tile - tiles) * SPLITS + tl.program_id(1), sums, shared, layer, weight, m, KIND, GROUP, SHIFT, OUTER_SHIFT,
            SUMS, BLOCK, COLUMNS,
        )  # fmt: skip
    else:
        # rows of tiles one after another: they read the same codes
        row, column = tile % down, tile // down
        rows, columns = row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BK + tl.arange(0, BK)
        last_block = True
        depth = tl.cdiv(tl.cdiv(layer.n, BN), SPLITS) * BN
        begin = tl.program_id(1) * depth
        accumulator = mainloop_of_codes_over_outputs(
            layer, weight, rows, column * BK, begin, min(layer.n, begin + depth), m, k, KIND, GROUP, SHIFT, OUTER_SHIFT,
            PRECISION, BM, BN, BK,
        )  # fmt: skip
        if SPLITS > 1:
            last_block, accumulator, _ = reduce_split_k(
                accumulator, tl.zeros((BM, BR), tl.float32), None, scratch, ticket, tile, SPLITS, BM, BK, BR
            )
        if last_block:
            term = accumulator if layer.drop is None else tl.zeros((BM, BK), tl.float32)
            term = add_adapter(
                layer.p, layer.a, term, rows, columns, m, k, layer.r, layer.parts, layer.a1, layer.a0, PRECISION, BR,
                RANK_STAGES,
            )  # fmt: skip
            if layer.drop is not None:
                keep = dropout_mask(layer.drop, rows, column * BK, BM, BK)
                term = accumulator + tl.where(keep, layer.drop.inverse * term, 0.0)
            offsets, mask = rows[:, None] * k + columns[None, :], (rows < m)[:, None] & (columns < k)[None, :]
            tl.store(dx + offsets, term.to(dx.dtype.element_ty), mask=mask)
