"""Triton: F1 h = s·drop(x) Aᵀ, F2 y = gain ⊙ (x Wᵀ + h Bᵀ) + bias; and back: P, dX in one GEMM, dA, dB with the sums.

The adapter's product is taken after the loop over the depth, on the same float32 sums, so y is rounded once. In bfloat16
dy ⊙ gain is rounded before its product with W, which makes the error of dx 1.4 times that of rounding it alone.
"""

import torch
import triton
import triton.language as tl

from lora_kernels.ops.launch import ceil, launch, power, refuse_device
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.thin import drawn, kept, outer, precision, product, shrink

GROUP = 8  # blocks of rows that take their turns side by side, so that they share W in the cache


@triton.jit
def place(m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The rows and columns of this program's tile, as 64-bit indices."""
    down, across = tl.cdiv(m, BM), tl.cdiv(n, BN)
    group, inside = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    row, column = group * GROUP + inside % height, inside // height
    return row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BN + tl.arange(0, BN)


@triton.jit
def adapter(h, b, sums, rows, columns, m, n, r, b0, b1, PRECISION: tl.constexpr, BR: tl.constexpr):
    """sums + h bᵀ, h [m, r] in float32, b [n, r]."""
    for first in range(0, r, BR):
        ranks = first + tl.arange(0, BR).to(tl.int64)
        hs = tl.load(h + rows[:, None] * r + ranks[None, :], mask=(rows < m)[:, None] & (ranks < r)[None, :], other=0.0)
        at = b + columns[None, :] * b0 + ranks[:, None] * b1
        sums = product(hs, tl.load(at, mask=(columns < n)[None, :] & (ranks < r)[:, None], other=0.0), sums, PRECISION)
    return sums


@triton.jit(do_not_specialize=["seed", "limit", "m"])
def forward_kernel(
    x, w, h, b, bias, gain, y, z, seed, limit, inverse, m, n, k, r, x0, x1, w0, w1, b0, b1,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = gain ⊙ z + bias, z = x wᵀ + h bᵀ. With a seed the base is dropped, too: gain ⊙ z + (x - drop(x)) wᵀ + bias."""
    rows, columns = place(m, n, BM, BN, GROUP)
    sums, dropped = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        inside = depth < k
        xs = tl.load(x + rows[:, None] * x0 + depth[None, :] * x1, mask=(rows < m)[:, None] & inside[None, :], other=0.0)
        ws = tl.load(w + columns[None, :] * w0 + depth[:, None] * w1, mask=(columns < n)[None, :] & inside[:, None], other=0.0)
        if seed is None:
            sums = product(xs, ws, sums, PRECISION)
        else:
            keep = kept(seed, rows, first, limit, BM, BK)
            sums = product(tl.where(keep, xs, 0.0), ws, sums, PRECISION)
            dropped = product(tl.where(keep, 0.0, xs), ws, dropped, PRECISION)
    if seed is not None:  # what is kept counts `inverse` times in drop(x)
        dropped += (1.0 - inverse) * sums
        sums *= inverse
    sums = adapter(h, b, sums, rows, columns, m, n, r, b0, b1, PRECISION, BR)
    at, inside = rows[:, None] * n + columns[None, :], (rows < m)[:, None] & (columns < n)[None, :]
    if z is not None:
        tl.store(z + at, sums.to(z.dtype.element_ty), mask=inside)
    if gain is not None:
        sums *= tl.load(gain + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if seed is not None:
        sums += dropped
    if bias is not None:
        sums += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "limit", "m"])
def input_gradient_kernel(
    dy, w, p, a, gain, dx, seed, limit, inverse, m, n, k, r, d0, d1, w0, w1, a0, a1, DROP_BASE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx = (dy ⊙ gain) w + drop(p a); DROP_BASE: dy w + drop((dy ⊙ (gain - 1)) w + p a)."""
    rows, columns = place(m, k, BM, BK, GROUP)
    sums, base = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BK), tl.float32)
    for first in range(0, n, BN):
        depth = first + tl.arange(0, BN).to(tl.int64)
        inside = depth < n
        ds = tl.load(dy + rows[:, None] * d0 + depth[None, :] * d1, mask=(rows < m)[:, None] & inside[None, :], other=0.0)
        ws = tl.load(w + depth[:, None] * w0 + columns[None, :] * w1, mask=inside[:, None] & (columns < k)[None, :], other=0.0)
        scaled = ds
        if gain is not None:
            gains = tl.load(gain + depth, mask=inside, other=0.0).to(tl.float32) - DROP_BASE
            scaled = ds.to(tl.float32) * gains[None, :]
            if ds.dtype == tl.bfloat16:  # one more rounding, for half the products; float16 has no exponents to spare
                scaled = scaled.to(tl.bfloat16)
        sums = product(scaled, ws, sums, PRECISION)
        if DROP_BASE:
            base = product(ds, ws, base, PRECISION)
    if seed is None:
        sums = adapter(p, a, sums, rows, columns, m, k, r, a0, a1, PRECISION, BR)
    else:
        term = sums if DROP_BASE else tl.zeros((BM, BK), tl.float32)
        term = adapter(p, a, term, rows, columns, m, k, r, a0, a1, PRECISION, BR)
        first = tl.min(columns, 0)
        term = tl.where(kept(seed, rows, first, limit, BM, BK), inverse * term, 0.0)
        sums = (base if DROP_BASE else sums) + term
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    tl.store(dx + rows[:, None] * k + columns[None, :], sums.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m"])
def zero_gain_kernel(
    dy, x, w, h, b, gain, dgain, m, k, r, d0, d1, x0, x1, w0, w1, b0, b1,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dgain = Σ dy ⊙ z where gain is zero, so that y says nothing of z. A program a column looks, so the host need not wait."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(gain + n).to(tl.float32) == 0.0:
        of_w, of_b = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BR), tl.float32)
        for row in range(0, m, BM):
            rows = row + tl.arange(0, BM).to(tl.int64)
            ds = tl.load(dy + rows * d0 + n * d1, mask=rows < m, other=0.0).to(tl.float32)[:, None]
            for first in range(0, k, BK):
                depth = first + tl.arange(0, BK).to(tl.int64)
                inside = (rows < m)[:, None] & (depth < k)[None, :]
                xs = tl.load(x + rows[:, None] * x0 + depth[None, :] * x1, mask=inside, other=0.0).to(tl.float32)
                of_w += ds * xs * tl.load(w + n * w0 + depth * w1, mask=depth < k, other=0.0).to(tl.float32)[None, :]
            for first in range(0, r, BR):
                ranks = first + tl.arange(0, BR).to(tl.int64)
                hs = tl.load(h + rows[:, None] * r + ranks[None, :], mask=(rows < m)[:, None] & (ranks < r)[None, :], other=0.0)
                of_b += ds * hs * tl.load(b + n * b0 + ranks * b1, mask=ranks < r, other=0.0).to(tl.float32)[None, :]
        tl.store(dgain + n, tl.sum(tl.sum(of_w, 1), 0) + tl.sum(tl.sum(of_b, 1), 0))


def refusal(x, w, a, b, scale, bias, gain, *_):
    tensors = {"x": x, "w": w, "a": a, "b": b, "bias": bias, "gain": gain}
    return refuse_dtypes(**tensors) or refuse_negated(**tensors) or refuse_device(x)


def backward_refusal(dy, *args):
    return refusal(*args) or refuse_dtypes(dy=dy) or refuse_negated(dy=dy)


def tiles(m, dtype, two_sums):
    """Of a GEMM over m rows: the tile, warps and stages. The depth of a step does not depend on m, so that a row's bits do
    not where one matrix instruction serves all m; sm_90 has another one for less than 64 rows."""
    if dtype is torch.float32:
        return power(m, most=64), 64, 16, 4 if m <= 32 else 8, 2
    stages = 2 if torch.version.hip else 3  # AMD's have less shared memory
    return (power(m, most=64), 64, 64, 4, stages) if two_sums or m <= 64 else (128, 128, 64, 8, stages)


@implements("lora_linear_forward", "triton", refusal)
def forward(x, w, a, b, scale, bias, gain, dropout, seed, drop_base, keep, keep_z):
    (m, k), (n, r) = x.shape, b.shape
    h = x.new_empty(m, r, dtype=torch.float32)
    shrink(x, a, h, scale=scale, dropout=dropout, seed=seed)
    y = x.new_empty(m, n)
    z = torch.empty_like(y) if keep_z else None
    drop = drawn(dropout, seed if drop_base else None)
    bm, bn, bk, warps, stages = tiles(m, x.dtype, drop_base)
    args = {
        "x": x, "w": w, "h": h, "b": b, "bias": _flat(bias), "gain": _flat(gain), "y": y, "z": z, **drop,
        "inverse": 1.0 / (1.0 - dropout), "m": m, "n": n, "k": k, "r": r, "x0": x.stride(0), "x1": x.stride(1),
        "w0": w.stride(0), "w1": w.stride(1), "b0": b.stride(0), "b1": b.stride(1), "PRECISION": precision(x),
        "BM": bm, "BN": bn, "BK": bk, "BR": power(r, most=16), "GROUP": GROUP,
    }  # fmt: skip
    made = [y] if z is None else [y, z]
    launch(forward_kernel, (ceil(m, bm) * ceil(n, bn),), args, made, warps=warps, stages=stages)
    return y, h if keep else None, z


@implements("lora_linear_backward", "triton", backward_refusal)
def backward(dy, x, w, a, b, scale, bias, gain, dropout, seed, drop_base, h, y, z, needs):
    needs_dx, needs_da, needs_db, needs_dbias, needs_dgain = needs
    (m, k), (n, r) = x.shape, b.shape
    bias, flat_gain = _flat(bias), _flat(gain)
    dx = da = dgain = None
    if needs_dx or needs_da:
        p = x.new_empty(m, r, dtype=torch.float32)
        shrink(dy, b.T, p, scale=scale, gain=flat_gain)
    if needs_dx:
        dx = x.new_empty(m, k)
        _input_gradient(dy, w, p, a, flat_gain, dx, dropout, seed, drop_base)
    if needs_da:
        da = a.new_empty(r, k)
        outer(x, p, da.T, dropout=dropout, seed=seed)
    db, dbias = b.new_empty(n, r), x.new_empty(n, dtype=torch.float32)
    if needs_dgain:
        dgain = torch.empty_like(dbias)
    if needs_db or needs_dbias or needs_dgain:
        v = None if not needs_dgain else y if z is None else z
        outer(dy, h, db, gain=flat_gain, sums=dbias if needs_dbias else None, times=dgain, v=v)
    if needs_dgain and z is None:
        dgain /= gain
        _zero_gain(dy, x, w, h, b, flat_gain, dgain)
    return (
        dx, da, db if needs_db else None, dbias.to(bias.dtype) if needs_dbias else None,
        dgain.to(gain.dtype) if needs_dgain else None,
    )  # fmt: skip


def _input_gradient(dy, w, p, a, gain, dx, dropout, seed, drop_base):
    (m, k), (n, r) = dx.shape, (w.shape[0], a.shape[0])
    bm, bk, bn, warps, stages = tiles(m, dy.dtype, drop_base)
    if dy.dtype is torch.float16 and gain is not None:  # three products a step: their operands need the registers
        bm = power(m, most=32 if drop_base else 64)
        bk, bn, warps, stages = 64, 32, 8 if bm == 64 else 4, 2
    args = {
        "dy": dy, "w": w, "p": p, "a": a.T, "gain": gain, "dx": dx, **drawn(dropout, seed), "inverse": 1.0 / (1.0 - dropout),
        "m": m, "n": n, "k": k, "r": r, "d0": dy.stride(0), "d1": dy.stride(1), "w0": w.stride(0), "w1": w.stride(1),
        "a0": a.stride(1), "a1": a.stride(0), "DROP_BASE": int(drop_base), "PRECISION": precision(dy),
        "BM": bm, "BN": bn, "BK": bk, "BR": power(r, most=16), "GROUP": GROUP,
    }  # fmt: skip
    launch(input_gradient_kernel, (ceil(m, bm) * ceil(k, bk),), args, [dx], warps=warps, stages=stages)


def _zero_gain(dy, x, w, h, b, gain, dgain):
    names = ("d0", "d1", "x0", "x1", "w0", "w1", "b0", "b1")
    strides = dict(zip(names, (*dy.stride(), *x.stride(), *w.stride(), *b.stride()), strict=True))
    args = {"dy": dy, "x": x, "w": w, "h": h, "b": b, "gain": gain, "dgain": dgain, "m": x.shape[0], "k": x.shape[1]}
    launch(zero_gain_kernel, (len(gain),), args | strides | {"r": b.shape[1], "BM": 32, "BK": 64, "BR": 16}, [dgain])


def _flat(vector):
    return None if vector is None else vector.contiguous()
