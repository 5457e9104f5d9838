"""Triton: dx = Σ_g (dy_g ⊙ gain_g) W_g + drop(p_g A_g) of layers that share x, in one product, and
in its last programs the sums of what the launches before left in parts, so that they need no launch
of their own."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_kernels.ops.lora_linear.triton_forward import add_adapter, swizzled_tile
from lora_kernels.ops.triton_dropout import dropout_mask
from lora_kernels.ops.triton_partials import reduce_partials
from lora_kernels.ops.triton_skinny import dot_accumulate, load_tile


class BackwardInput(NamedTuple):
    """What the layers of these kernels share; x and its strides are None where no gain is looked
    at."""

    x: Any
    """[m, k]."""
    k: Any
    x0: Any
    x1: Any


class BackwardLayer(NamedTuple):
    """One layer of these kernels; None for what there is not or is not needed."""

    dy: Any
    """[m, n]."""
    w: Any
    """[n, k]."""
    gain: Any
    p: Any
    """[parts, m, r], for dx alone, as a, [r, k], and drop, a `Dropout`."""
    a: Any
    drop: Any
    h: Any
    """[m, r], where gains of zero are looked for, as b, [n, r], and dgain, [n], which then gets
    what y cannot tell."""
    b: Any
    dgain: Any
    n: Any
    r: Any
    parts: Any
    d0: Any
    d1: Any
    w0: Any
    w1: Any
    a0: Any
    a1: Any
    b0: Any
    b1: Any


@triton.jit
def mainloop_over_outputs(
    layer, map_d, map_w, row, column, accumulator, base, rows, columns, m, k, DROP_BASE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """accumulator + (dy ⊙ gain) w, and base; DROP_BASE: accumulator + (dy ⊙ (gain - 1)) w, and base
    + dy w."""
    for first in range(0, layer.n, BN):
        depth = first + tl.arange(0, BN).to(tl.int64)
        if map_d is not None:
            ds = map_d.load([row * BM, first])  # [BM, BN]
            ws = map_w.load([first, column * BK])  # [BN, BK]
        else:
            ds = load_tile(layer.dy, rows, depth, layer.d0, layer.d1, m, layer.n)  # [BM, BN]
            ws = load_tile(layer.w, depth, columns, layer.w0, layer.w1, layer.n, k)  # [BN, BK]
        scaled = ds
        if layer.gain is not None:
            gains = tl.load(layer.gain + depth, mask=depth < layer.n, other=0.0).to(tl.float32) - DROP_BASE
            scaled = ds.to(tl.float32) * gains[None, :]
            # one more rounding, for half the products; float16 has no exponents to spare
            if ds.dtype == tl.bfloat16:
                scaled = scaled.to(tl.bfloat16)
        accumulator = dot_accumulate(scaled, ws, accumulator, PRECISION)
        if DROP_BASE:
            base = dot_accumulate(ds, ws, base, PRECISION)
    return accumulator, base


@triton.jit
def gradient_of_zero_gain(n, shared, layer, m, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """dgain[n] = Σ dy ⊙ z, which y cannot tell where the gain is zero."""
    k, r = shared.k, layer.r
    of_w, of_b = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BR), tl.float32)
    for row in range(0, m, BM):
        rows = row + tl.arange(0, BM).to(tl.int64)
        ds = tl.load(layer.dy + rows * layer.d0 + n * layer.d1, mask=rows < m, other=0.0).to(tl.float32)[:, None]
        for first in range(0, k, BK):
            depth = first + tl.arange(0, BK).to(tl.int64)
            xs = load_tile(shared.x, rows, depth, shared.x0, shared.x1, m, k).to(tl.float32)  # [BM, BK]
            ws = tl.load(layer.w + n * layer.w0 + depth * layer.w1, mask=depth < k, other=0.0)  # [BK]
            of_w += ds * xs * ws.to(tl.float32)[None, :]
        for first in range(0, r, BR):
            ranks = first + tl.arange(0, BR).to(tl.int64)
            hs = load_tile(layer.h, rows, ranks, r, 1, m, r)  # [BM, BR]
            bs = tl.load(layer.b + n * layer.b0 + ranks * layer.b1, mask=ranks < r, other=0.0)  # [BR]
            of_b += ds * hs * bs.to(tl.float32)[None, :]
    tl.store(layer.dgain + n, (tl.sum(tl.sum(of_w, 1), 0) + tl.sum(tl.sum(of_b, 1), 0)).to(layer.dgain.dtype.element_ty))


@triton.jit
def rest_of_gradients(
    block, sums, shared, layers, m, SUMS: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """Adds up `sums`; then looks for gains of zero, COLUMNS a block, so that the host need not wait
    for an answer."""
    block = reduce_partials(block, sums, SUMS, BLOCK)
    for g in tl.static_range(LAYERS):
        layer = layers[g]
        if layer.dgain is not None:
            blocks = tl.cdiv(layer.n, COLUMNS)
            if block >= 0 and block < blocks:
                columns = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
                gains = tl.load(layer.gain + columns, mask=columns < layer.n, other=1.0)
                zero = (gains.to(tl.float32) == 0.0).to(tl.int32)
                if tl.max(zero, 0) > 0:
                    for i in range(COLUMNS):
                        if tl.sum(tl.where(tl.arange(0, COLUMNS) == i, zero, 0), 0) > 0:
                            gradient_of_zero_gain(block.to(tl.int64) * COLUMNS + i, shared, layer, m, 16, 64, 16)
            block -= blocks


@triton.jit(do_not_specialize=["m"])
def rest_of_gradients_kernel(
    sums, shared, layers, m, SUMS: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    rest_of_gradients(tl.program_id(0), sums, shared, layers, m, SUMS, LAYERS, BLOCK, COLUMNS)


@triton.jit(do_not_specialize=["m"])
def input_gradient_kernel(
    dx, shared, layers, sums, map_d0, map_d1, map_d2, map_w0, map_w1, map_w2, m,
    DROP_BASES: tl.constexpr, SUMS: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    SLAB: tl.constexpr, RANK_STAGES: tl.constexpr,
):  # fmt: skip
    """dx = Σ (dy ⊙ gain) w + drop(p a); with DROP_BASES[g]: dy w + drop((dy ⊙ (gain - 1)) w + p a).
    The programs after those of the tiles do `rest_of_gradients`. The maps: of each dy and w
    (ops/triton_tma.py)."""
    maps_d, maps_w, k = (map_d0, map_d1, map_d2), (map_w0, map_w1, map_w2), shared.k
    down, across = tl.cdiv(m, BM), tl.cdiv(k, BK)
    if tl.program_id(0) >= down * across:
        rest_of_gradients(tl.program_id(0) - down * across, sums, shared, layers, m, SUMS, LAYERS, BLOCK, COLUMNS)
    else:
        row, column = swizzled_tile(tl.program_id(0), down, across, GROUP, SLAB)
        rows, columns = row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BK + tl.arange(0, BK)
        pointers, mask = dx + rows[:, None] * k + columns[None, :], (rows < m)[:, None] & (columns < k)[None, :]
        accumulator = tl.zeros((BM, BK), tl.float32)
        for g in tl.static_range(LAYERS):
            layer = layers[g]
            term = tl.zeros((BM, BK), tl.float32)
            map_d, map_w = None if map_d0 is None else maps_d[g], None if map_d0 is None else maps_w[g]
            if DROP_BASES[g]:
                term, accumulator = mainloop_over_outputs(
                    layer, map_d, map_w, row, column, term, accumulator, rows, columns, m, k, 1, PRECISION, BM, BN, BK
                )
            else:
                accumulator, term = mainloop_over_outputs(
                    layer, map_d, map_w, row, column, accumulator, term, rows, columns, m, k, 0, PRECISION, BM, BN, BK
                )
            if layer.drop is None:
                accumulator = add_adapter(
                    layer.p, layer.a, accumulator, rows, columns, m, k, layer.r, layer.parts, layer.a1, layer.a0, PRECISION, BR,
                    RANK_STAGES,
                )  # fmt: skip
            else:
                term = add_adapter(
                    layer.p, layer.a, term, rows, columns, m, k, layer.r, layer.parts, layer.a1, layer.a0, PRECISION, BR,
                    RANK_STAGES,
                )  # fmt: skip
                keep = dropout_mask(layer.drop, rows, column * BK, BM, BK)
                accumulator += tl.where(keep, layer.drop.inverse * term, 0.0)
        tl.store(pointers, accumulator.to(dx.dtype.element_ty), mask=mask)
