"""Triton kernels of the kinds that this project needs, to try the simulator on what Triton makes of
them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def vector_add(x, z, y, n, B: tl.constexpr):
    """y = x + z."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    inside = at < n
    xs, zs = tl.load(x + at, mask=inside), tl.load(z + at, mask=inside)
    tl.store(y + at, xs + zs, mask=inside)


@triton.jit
def lora(x, w, a, b, y, m, n, k, r, scale, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y = x wᵀ + scale · x aᵀ bᵀ: the product with a in the same loop; the rank r is padded to
    R."""
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    depth, ranks = tl.arange(0, BK), tl.arange(0, R)
    sums = tl.zeros((BM, BN), tl.float32)
    h = tl.zeros((BM, R), tl.float32)
    for first in range(0, k, BK):
        inside = first + depth < k
        of_x, of_w = (rows < m)[:, None] & inside[None, :], (columns < n)[:, None] & inside[None, :]
        xs = tl.load(x + rows[:, None] * k + first + depth[None, :], mask=of_x, other=0.0)
        ws = tl.load(w + columns[:, None] * k + first + depth[None, :], mask=of_w, other=0.0)
        of_a = (ranks < r)[:, None] & inside[None, :]
        as_ = tl.load(a + ranks[:, None] * k + first + depth[None, :], mask=of_a, other=0.0)
        sums = tl.dot(xs, tl.trans(ws), sums)
        h = tl.dot(xs, tl.trans(as_), h)
    of_b = (columns < n)[:, None] & (ranks < r)[None, :]
    bs = tl.load(b + columns[:, None] * r + ranks[None, :], mask=of_b, other=0.0)
    sums = tl.dot((h * scale).to(bs.dtype), tl.trans(bs), sums)
    kept = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(y + rows[:, None] * n + columns[None, :], sums.to(y.dtype.element_ty), mask=kept)


@triton.jit
def row_norm(w, a, b, norm, n, k, scale, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """‖w + scale · b a‖ of each row."""
    rows, depth, ranks = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, R)
    squares = tl.zeros((BN,), tl.float32)
    bs = tl.load(b + rows[:, None] * R + ranks[None, :], mask=(rows < n)[:, None], other=0.0)
    for first in range(0, k, BK):
        inside = first + depth < k
        as_ = tl.load(a + ranks[:, None] * k + first + depth[None, :], mask=inside[None, :], other=0.0)
        ws = tl.load(w + rows[:, None] * k + first + depth[None, :], mask=(rows < n)[:, None] & inside[None, :], other=0.0)
        adapted = ws.to(tl.float32) + scale * tl.dot(bs, as_)
        squares += tl.sum(adapted * adapted, 1)
    tl.store(norm + rows, tl.sqrt(squares), mask=rows < n)


@triton.jit
def dot(x, w, y, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """y = x w with w [k, n]."""
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK)
        xs = tl.load(x + rows[:, None] * k + depth[None, :])
        ws = tl.load(w + depth[:, None] * n + columns[None, :])
        sums = tl.dot(xs, ws, sums, input_precision=PRECISION)
    tl.store(y + rows[:, None] * n + columns[None, :], sums)


@triton.jit
def split_k(x, w, y, m, n, k, ATOMIC: tl.constexpr, PARTS: tl.constexpr, B: tl.constexpr):
    """y += x wᵀ, the depth shared among programs."""
    rows, columns = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * B + tl.arange(0, B)
    sums = tl.zeros((B, B), tl.float32)
    for first in range(tl.program_id(2) * B, k, B * PARTS):
        depth = first + tl.arange(0, B)
        xs, ws = tl.load(x + rows[:, None] * k + depth[None, :]), tl.load(w + columns[None, :] * k + depth[:, None])
        sums = tl.dot(xs, ws, sums)
    at = y + rows[:, None] * n + columns[None, :]
    if ATOMIC:
        tl.atomic_add(at, sums, sem="relaxed")
    else:
        tl.store(at, tl.load(at) + sums)


@triton.jit
def split_k_ticket(x, w, y, parts, counter, m, n, k, PARTS: tl.constexpr, B: tl.constexpr):
    """y = x wᵀ: the last program of a tile to come adds the parts, always in one order; it leaves
    its counter at zero."""
    rows, columns, depth = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * B + tl.arange(0, B), tl.arange(0, B)
    part, sums = tl.program_id(2), tl.zeros((B, B), tl.float32)
    for first in range(part * B, k, B * PARTS):
        inside = first + depth < k
        of_x, of_w = (rows < m)[:, None] & inside[None, :], (columns < n)[:, None] & inside[None, :]
        xs = tl.load(x + rows[:, None] * k + first + depth[None, :], mask=of_x, other=0.0)
        ws = tl.load(w + columns[:, None] * k + first + depth[None, :], mask=of_w, other=0.0)
        sums = tl.dot(xs, tl.trans(ws), sums)
    at, kept = rows[:, None] * n + columns[None, :], (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(parts + part * m * n + at, sums, mask=kept)
    tile = counter + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if tl.atomic_add(tile, 1, sem="acq_rel") == PARTS - 1:
        total = tl.zeros((B, B), tl.float32)
        for other in range(PARTS):
            total += tl.load(parts + other * m * n + at, mask=kept)
        tl.store(y + at, total, mask=kept)
        tl.atomic_xchg(tile, 0, sem="relaxed")


@triton.jit
def gather(x, a, which, h, k, R: tl.constexpr, BK: tl.constexpr):
    """Each token's h = x a[which]ᵀ; nothing for which = -1."""
    token = tl.program_id(0)
    adapter = tl.load(which + token)
    ranks = tl.arange(0, R)
    sums = tl.zeros((R,), tl.float32)
    if adapter >= 0:
        for first in range(0, k, BK):
            depth = first + tl.arange(0, BK)
            xs = tl.load(x + token * k + depth, mask=depth < k, other=0.0).to(tl.float32)
            at = a + adapter * R * k + ranks[:, None] * k + depth[None, :]
            sums += tl.sum(tl.load(at, mask=(depth < k)[None, :], other=0.0).to(tl.float32) * xs[None, :], 1)
    tl.store(h + token * R + ranks, sums)


@triton.jit
def dropout(x, y, n, p, seed, B: tl.constexpr):
    """Philox, as tl.rand draws it."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    kept = tl.rand(seed, at) > p
    tl.store(y + at, tl.where(kept, tl.load(x + at, mask=at < n) / (1 - p), 0.0), mask=at < n)


@triton.jit
def dropout_rows(x, y, rows, columns, threshold, kept, seed, B: tl.constexpr):
    """y = x · mask, bit for bit the mask of lora_kernels.ops.dropout."""
    column, row = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1)
    at, inside, word = row * columns + column, column < columns, column % 4
    zero = (column * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, (column // 4).to(tl.uint32), zero + row.to(tl.uint32), zero, zero)
    drawn = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    xs = tl.load(x + at, mask=inside)
    tl.store(y + at, tl.where(drawn >= threshold, xs * kept, 0.0), mask=inside)


@triton.jit
def softmax(x, y, n, B: tl.constexpr):
    """One row a program: reductions, exp, division."""
    at = tl.arange(0, B)
    row = tl.load(x + tl.program_id(0) * n + at, mask=at < n, other=float("-inf")).to(tl.float32)
    powers = tl.exp(row - tl.max(row, 0))
    tl.store(y + tl.program_id(0) * n + at, (powers / tl.sum(powers, 0)).to(y.dtype.element_ty), mask=at < n)


@triton.jit
def through_memory(x, scratch, y, n, B: tl.constexpr, BARRIER: tl.constexpr):
    """Turned around by way of global memory inside one program, which needs a barrier."""
    at = tl.arange(0, B)
    tl.store(scratch + at, tl.load(x + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + at, tl.load(scratch + B - 1 - at))


@triton.jit
def descriptors(x, w, y, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y = x wᵀ, every access by a descriptor, which masks what is outside [m, k], [n, k] or [m,
    n]."""
    xs = tl.make_tensor_descriptor(x, [m, k], [k, 1], [BM, BK])
    ws = tl.make_tensor_descriptor(w, [n, k], [k, 1], [BN, BK])
    ys = tl.make_tensor_descriptor(y, [m, n], [n, 1], [BM, BN])
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for first in range(0, k, BK):
        sums = tl.dot(xs.load([row, first]), tl.trans(ws.load([column, first])), sums)
    ys.store([row, column], sums.to(y.dtype.element_ty))


@triton.jit
def cast_dot(x, w, y, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """y = x w with w [k, n] in 16 bits, to which x is rounded: on sm_90 that operand of wgmma is in
    registers."""
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for first in tl.range(0, k, BK, num_stages=STAGES):
        depth = first + tl.arange(0, BK)
        xs = tl.load(x + rows[:, None] * k + depth[None, :])
        ws = tl.load(w + depth[:, None] * n + columns[None, :])
        sums = tl.dot(xs.to(ws.dtype), ws, sums)
    tl.store(y + rows[:, None] * n + columns[None, :], sums)


@triton.jit
def handed_on(x, held, y, n, B: tl.constexpr):
    """y = x + held, which each launch sets to zero for the next; that begins meanwhile, and waits
    (from sm_90)."""
    tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * B + tl.arange(0, B)
    inside = at < n
    xs = tl.load(x + at, mask=inside)
    tl.extra.cuda.gdc_wait()
    tl.store(y + at, xs + tl.load(held + at, mask=inside), mask=inside)
    tl.store(held + at, tl.zeros((B,), tl.float32), mask=inside)


class Bounds(NamedTuple):
    least: Any
    most: Any


class Row(NamedTuple):
    at: Any
    bounds: Any
    n: Any
    stride: Any
    factor: Any


@triton.jit
def clamped(row, columns):
    values = tl.load(row.at + columns * row.stride, mask=columns < row.n, other=0.0)
    if row.bounds is not None:
        values = tl.minimum(tl.maximum(values, row.bounds.least), tl.load(row.bounds.most))
    return values


@triton.jit
def sum_of_rows(y, rows, ROWS: tl.constexpr, N: tl.constexpr):
    columns = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for i in tl.static_range(ROWS):
        row = rows[i]
        total += row.factor * clamped(row, columns)
    tl.store(y + columns, total)
