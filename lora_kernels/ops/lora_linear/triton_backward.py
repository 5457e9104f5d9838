"""Triton: dx = Σ_g (dy_g ⊙ gain_g) W_g + drop(p_g A_g) of layers that share x, in one product, and
in its last programs the sums of what the launches before left in parts, so that they need no launch
of their own."""

import triton
import triton.language as tl

from lora_kernels.ops.lora_linear.triton_forward import add_adapter, swizzled_tile
from lora_kernels.ops.triton_dropout import dropout_mask
from lora_kernels.ops.triton_partials import reduce_partials
from lora_kernels.ops.triton_skinny import dot_accumulate, load_tile


@triton.jit
def mainloop_over_outputs(
    dy, w, gain, map_d, map_w, row, column, sums, base, rows, columns, m, n, k, d0, d1, w0, w1, DROP_BASE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """sums + (dy ⊙ gain) w, and base; DROP_BASE: sums + (dy ⊙ (gain - 1)) w, and base + dy w."""
    for first in range(0, n, BN):
        depth = first + tl.arange(0, BN).to(tl.int64)
        if map_d is not None:
            ds = map_d.load([row * BM, first])  # [BM, BN]
            ws = map_w.load([first, column * BK])  # [BN, BK]
        else:
            ds = load_tile(dy, rows, depth, d0, d1, m, n)  # [BM, BN]
            ws = load_tile(w, depth, columns, w0, w1, n, k)  # [BN, BK]
        scaled = ds
        if gain is not None:
            gains = tl.load(gain + depth, mask=depth < n, other=0.0).to(tl.float32) - DROP_BASE
            scaled = ds.to(tl.float32) * gains[None, :]
            # one more rounding, for half the products; float16 has no exponents to spare
            if ds.dtype == tl.bfloat16:
                scaled = scaled.to(tl.bfloat16)
        sums = dot_accumulate(scaled, ws, sums, PRECISION)
        if DROP_BASE:
            base = dot_accumulate(ds, ws, base, PRECISION)
    return sums, base


@triton.jit
def gradient_of_zero_gain(
    n, dy, x, w, h, b, dgain, m, k, r, d0, d1, x0, x1, w0, w1, b0, b1, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr
):
    """dgain[n] = Σ dy ⊙ z, which y cannot tell where the gain is zero."""
    of_w, of_b = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BR), tl.float32)
    for row in range(0, m, BM):
        rows = row + tl.arange(0, BM).to(tl.int64)
        ds = tl.load(dy + rows * d0 + n * d1, mask=rows < m, other=0.0).to(tl.float32)[:, None]
        for first in range(0, k, BK):
            depth = first + tl.arange(0, BK).to(tl.int64)
            xs = load_tile(x, rows, depth, x0, x1, m, k).to(tl.float32)  # [BM, BK]
            of_w += ds * xs * tl.load(w + n * w0 + depth * w1, mask=depth < k, other=0.0).to(tl.float32)[None, :]
        for first in range(0, r, BR):
            ranks = first + tl.arange(0, BR).to(tl.int64)
            hs = load_tile(h, rows, ranks, r, 1, m, r)  # [BM, BR]
            of_b += ds * hs * tl.load(b + n * b0 + ranks * b1, mask=ranks < r, other=0.0).to(tl.float32)[None, :]
    tl.store(dgain + n, (tl.sum(tl.sum(of_w, 1), 0) + tl.sum(tl.sum(of_b, 1), 0)).to(dgain.dtype.element_ty))


@triton.jit
def rest_of_gradients(
    block, parts, gains, divisors, outs, factors, counts, sizes, ranks, dys, x, ws, hs, bs, dy_gains, dgains, m, ns, k, rs,
    d0s, d1s, x0, x1, w0s, w1s, b0s, b1s, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up `parts`; then looks for gains of zero, COLUMNS a block, so that the host need not
    wait for an answer."""
    block = reduce_partials(block, parts, gains, divisors, outs, factors, counts, sizes, ranks, BLOCK)
    for g in tl.static_range(len(ns)):
        if dgains[g] is not None:
            blocks = tl.cdiv(ns[g], COLUMNS)
            if block >= 0 and block < blocks:
                columns = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
                zero = (tl.load(dy_gains[g] + columns, mask=columns < ns[g], other=1.0).to(tl.float32) == 0.0).to(tl.int32)
                if tl.max(zero, 0) > 0:
                    for i in range(COLUMNS):
                        if tl.sum(tl.where(tl.arange(0, COLUMNS) == i, zero, 0), 0) > 0:
                            gradient_of_zero_gain(
                                block.to(tl.int64) * COLUMNS + i, dys[g], x, ws[g], hs[g], bs[g], dgains[g], m, k, rs[g],
                                d0s[g], d1s[g], x0, x1, w0s[g], w1s[g], b0s[g], b1s[g], 16, 64, 16,
                            )  # fmt: skip
            block -= blocks


@triton.jit(do_not_specialize=["m"])
def rest_of_gradients_kernel(
    parts, gains, divisors, outs, factors, counts, sizes, ranks, dys, x, ws, hs, bs, dy_gains, dgains, m, ns, k, rs,
    d0s, d1s, x0, x1, w0s, w1s, b0s, b1s, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rest_of_gradients(
        tl.program_id(0), parts, gains, divisors, outs, factors, counts, sizes, ranks, dys, x, ws, hs, bs, dy_gains, dgains, m,
        ns, k, rs, d0s, d1s, x0, x1, w0s, w1s, b0s, b1s, BLOCK, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def input_gradient_kernel(
    ps, as_, dx, map_d0, map_d1, map_d2, map_w0, map_w1, map_w2, lows, highs, limits, inverses, counts_p, a0s, a1s,
    parts, gains, divisors, outs, factors, counts, sizes, ranks, dys, x, ws, hs, bs, dy_gains, dgains, m, ns, k, rs,
    d0s, d1s, x0, x1, w0s, w1s, b0s, b1s,
    DROP_BASES: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    SLAB: tl.constexpr, RANK_STAGES: tl.constexpr,
):  # fmt: skip
    """dx = Σ (dy ⊙ gain) w + drop(p a); with DROP_BASES[g]: dy w + drop((dy ⊙ (gain - 1)) w + p a).
    The programs after those of the tiles do `rest_of_gradients`. The maps: of each dy and w
    (ops/triton_tma.py)."""
    maps_d, maps_w = (map_d0, map_d1, map_d2), (map_w0, map_w1, map_w2)
    down, across = tl.cdiv(m, BM), tl.cdiv(k, BK)
    if tl.program_id(0) >= down * across:
        rest_of_gradients(
            tl.program_id(0) - down * across, parts, gains, divisors, outs, factors, counts, sizes, ranks, dys, x, ws, hs, bs,
            dy_gains, dgains, m, ns, k, rs, d0s, d1s, x0, x1, w0s, w1s, b0s, b1s, BLOCK, COLUMNS,
        )  # fmt: skip
    else:
        row, column = swizzled_tile(tl.program_id(0), down, across, GROUP, SLAB)
        rows, columns = row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BK + tl.arange(0, BK)
        at, inside = dx + rows[:, None] * k + columns[None, :], (rows < m)[:, None] & (columns < k)[None, :]
        sums = tl.zeros((BM, BK), tl.float32)
        for g in tl.static_range(len(dys)):
            term = tl.zeros((BM, BK), tl.float32)
            map_d, map_w = None if map_d0 is None else maps_d[g], None if map_d0 is None else maps_w[g]
            if DROP_BASES[g]:
                term, sums = mainloop_over_outputs(
                    dys[g], ws[g], dy_gains[g], map_d, map_w, row, column, term, sums, rows, columns, m, ns[g], k, d0s[g],
                    d1s[g], w0s[g], w1s[g], 1, PRECISION, BM, BN, BK,
                )  # fmt: skip
            else:
                sums, term = mainloop_over_outputs(
                    dys[g], ws[g], dy_gains[g], map_d, map_w, row, column, sums, term, rows, columns, m, ns[g], k, d0s[g],
                    d1s[g], w0s[g], w1s[g], 0, PRECISION, BM, BN, BK,
                )  # fmt: skip
            if lows[g] is None:
                sums = add_adapter(
                    ps[g], as_[g], sums, rows, columns, m, k, rs[g], counts_p[g], a1s[g], a0s[g], PRECISION, BR, RANK_STAGES
                )
            else:
                term = add_adapter(
                    ps[g], as_[g], term, rows, columns, m, k, rs[g], counts_p[g], a1s[g], a0s[g], PRECISION, BR, RANK_STAGES
                )
                keep = dropout_mask(lows[g], highs[g], rows, column * BK, limits[g], BM, BK)
                sums += tl.where(keep, inverses[g] * term, 0.0)
        tl.store(at, sums.to(dx.dtype.element_ty), mask=inside)
