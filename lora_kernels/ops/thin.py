"""Products of a big matrix with a thin one, in Triton: what lora_linear and weight_norm share.

Sums are float32 in a fixed order; there are no atomics. Offsets are 64 bits. Tiles are named as in DESIGN's formulas:
u is the big matrix, v or h the thin one of `r` rows or columns.
"""

import torch
import triton
import triton.language as tl

from lora_kernels.ops.dropout import threshold
from lora_kernels.ops.launch import ceil, launch, power

PART = 512  # rows that one program of `outer` sums
HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def product(u, v, sums, PRECISION: tl.constexpr):
    """sums + u v. "half": 16-bit tensor cores, where a float32 operand counts with its first 16 digits."""
    if PRECISION != "half":
        # step by step, so that errors add up over the steps and not over all of the depth; an addition would be folded back
        step = tl.dot(u.to(tl.float32), v.to(tl.float32), input_precision=PRECISION)
        return tl.fma(step, tl.full(step.shape, 1.0, tl.float32), sums)
    elif u.dtype == v.dtype and u.dtype != tl.float32:
        return tl.dot(u, v, sums)
    elif u.dtype == tl.bfloat16 and v.dtype == tl.float32:
        return tl.dot(u, rest(v), tl.dot(u, v.to(tl.bfloat16), sums))
    elif u.dtype == tl.float32 and v.dtype == tl.bfloat16:
        return tl.dot(rest(u), v, tl.dot(u.to(tl.bfloat16), v, sums))
    else:  # float16 has too few exponents for a rest
        return tl.dot(u.to(tl.float32), v.to(tl.float32), sums, input_precision="bf16x3")


@triton.jit
def rest(v):
    """What bfloat16 leaves of float32; nothing of an infinity."""
    high = v.to(tl.bfloat16).to(tl.float32)
    return tl.where(tl.abs(high) == float("inf"), 0.0, v - high).to(tl.bfloat16)


@triton.jit
def kept(seed, rows, first, limit, BM: tl.constexpr, BK: tl.constexpr):
    """Whether dropout keeps elements `first` and on of these rows, [BM, BK]: ops/dropout.py's Philox, a word an element."""
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    group = (first // 4 + tl.arange(0, BK // 4)).to(tl.uint32)[None, :] + tl.zeros((BM, 1), tl.uint32)
    low, high = rows.to(tl.uint32)[:, None] + 0 * group, (rows >> 32).to(tl.uint32)[:, None] + 0 * group
    w0, w1, w2, w3 = tl.philox(seed, group, low, high, 0 * group)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BM, BK))
    return words.to(tl.int64) >= limit


@triton.jit(do_not_specialize=["seed", "limit", "m"])
def shrink_kernel(
    u, v, gain, out, seed, limit, scale, m, k, r, u0, u1, v0, v1, o0, o1,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out [m, r] = scale · kept(u) (gain ⊙ v)ᵀ; u [m, k], v [r, k], gain [k]."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    sums = tl.zeros((BM, BR), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        inside = depth < k
        us = tl.load(u + rows[:, None] * u0 + depth[None, :] * u1, mask=(rows < m)[:, None] & inside[None, :], other=0.0)
        vs = tl.load(v + ranks[None, :] * v0 + depth[:, None] * v1, mask=(ranks < r)[None, :] & inside[:, None], other=0.0)
        if seed is not None:
            us = tl.where(kept(seed, rows, first, limit, BM, BK), us, 0.0)
        if gain is not None:  # on the thin side, where its digits cost little
            vs = vs.to(tl.float32) * tl.load(gain + depth, mask=inside, other=0.0).to(tl.float32)[:, None]
        sums = product(us, vs, sums, PRECISION)
    tl.store(out + rows[:, None] * o0 + ranks[None, :] * o1, scale * sums, mask=(rows < m)[:, None] & (ranks < r)[None, :])


@triton.jit(do_not_specialize=["seed", "limit", "m"])
def outer_kernel(
    u, h, v, part, columns_u, columns_uv, seed, limit, m, n, r, u0, u1, v0, v1, PART: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """part [p, n, r] = kept(u)ᵀ h over rows PART·p and on; beside it the sums of u and of u ⊙ v over them, [p, n]."""
    columns = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    p = tl.program_id(2).to(tl.int64)
    sums, of_u, of_uv = tl.zeros((BN, BR), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for first in range(0, PART, BM):
        rows = p * PART + first + tl.arange(0, BM)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        us = tl.load(u + rows[:, None] * u0 + columns[None, :] * u1, mask=inside, other=0.0)
        hs = tl.load(h + rows[:, None] * r + ranks[None, :], mask=(rows < m)[:, None] & (ranks < r)[None, :], other=0.0)
        if seed is not None:
            us = tl.where(kept(seed, rows, tl.program_id(0) * BN, limit, BM, BN), us, 0.0)
        if columns_u is not None:
            of_u += tl.sum(us.to(tl.float32), 0)
        if columns_uv is not None:
            vs = tl.load(v + rows[:, None] * v0 + columns[None, :] * v1, mask=inside, other=0.0)
            of_uv += tl.sum(us.to(tl.float32) * vs.to(tl.float32), 0)
        sums = product(tl.trans(us), hs, sums, PRECISION)
    kept_here = (columns < n)[:, None] & (ranks < r)[None, :]
    tl.store(part + (p * n + columns)[:, None] * r + ranks[None, :], sums, mask=kept_here)
    first_ranks = tl.program_id(1) == 0
    if columns_u is not None:
        tl.store(columns_u + p * n + columns, of_u, mask=(columns < n) & first_ranks)
    if columns_uv is not None:
        tl.store(columns_uv + p * n + columns, of_uv, mask=(columns < n) & first_ranks)


@triton.jit(do_not_specialize=["parts"])
def add_up_kernel(part, gain, out, factor, parts, n, r, o0, o1, BN: tl.constexpr, BR: tl.constexpr):
    """out [n, r] = factor · gain ⊙ Σ part [parts, n, r], in the order of the parts; gain [n]."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    inside = (rows < n)[:, None] & (ranks < r)[None, :]
    sums = tl.zeros((BN, BR), tl.float32)
    for p in range(parts):
        sums += tl.load(part + (p * tl.cast(n, tl.int64) + rows)[:, None] * r + ranks[None, :], mask=inside, other=0.0)
    if gain is not None:
        sums *= tl.load(gain + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    tl.store(out + rows[:, None] * o0 + ranks[None, :] * o1, (factor * sums).to(out.dtype.element_ty), mask=inside)


def precision(t):
    """How products with t are taken: the tensor cores' own for 16 bits; else float32 unless torch is told TF32 will do."""
    if t.dtype in HALVES:
        return "half"
    return "tf32" if t.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def drawn(dropout, seed):
    """The arguments `seed` and `limit` of a kernel. A seed on the CPU is passed by value: no copy to the device."""
    if seed is None or dropout <= 0:
        return {"seed": None, "limit": 0}
    return {"seed": int(seed) if seed.is_cpu else seed, "limit": threshold(dropout)}


def shrink(u, v, out, *, scale=1.0, gain=None, dropout=0.0, seed=None, exact=False):
    """out [m, r] = scale · drop(u) (gain ⊙ v)ᵀ with u [m, k], v [r, k], gain [k]; `exact`: never TF32."""
    (m, k), r = u.shape, v.shape[0]
    drop = drawn(dropout, seed)
    factor = scale / (1.0 - dropout) if drop["seed"] is not None else scale
    tile = {"BM": power(m, most=64), "BK": 32 if u.dtype is torch.float32 else 64, "BR": power(r)}
    stages = 2 if tile["BR"] == 32 else 3  # with 3, ptxas spills a few registers there to fit more blocks
    how = "ieee" if exact and u.dtype is torch.float32 else precision(u)
    args = {"u": u, "v": v, "gain": gain, "out": out, **drop, "scale": float(factor), "m": m, "k": k, "r": r}
    args |= dict(zip(("u0", "u1", "v0", "v1", "o0", "o1"), (*u.stride(), *v.stride(), *out.stride()), strict=True))
    grid = (ceil(m, tile["BM"]), ceil(r, tile["BR"]))
    launch(shrink_kernel, grid, args | tile | {"PRECISION": how}, [out], stages=stages)


def outer(u, h, out, *, factor=1.0, gain=None, dropout=0.0, seed=None, sums=None, times=None, v=None, exact=False):
    """out [n, r] = factor · gain ⊙ (drop(u)ᵀ h) with u [m, n], h [m, r] in float32 and by rows, gain [n].

    `sums` [n] gets the column sums of u, `times` [n] those of u ⊙ v.
    """
    (m, n), r = u.shape, h.shape[1]
    parts = ceil(m, PART)
    drop = drawn(dropout, seed)
    factor = factor / (1.0 - dropout) if drop["seed"] is not None else factor
    part = h.new_empty(parts, n, r)
    of_u, of_uv = (None if t is None else h.new_empty(parts, n, 1) for t in (sums, times))
    tile = {"BM": power(m, most=64 if r <= 32 else 32), "BN": 64, "BR": power(r), "PART": PART}
    v0, v1 = (0, 0) if v is None else v.stride()
    how = "ieee" if exact and u.dtype is torch.float32 else precision(u)
    args = {"u": u, "h": h, "v": v, "part": part, "columns_u": of_u, "columns_uv": of_uv, **drop, "m": m, "n": n, "r": r}
    args |= {"u0": u.stride(0), "u1": u.stride(1), "v0": v0, "v1": v1, "PRECISION": how}
    made = [t for t in (part, of_u, of_uv) if t is not None]
    launch(outer_kernel, (ceil(n, tile["BN"]), ceil(r, tile["BR"]), parts), args | tile, made)
    add_up(part, out, factor, gain)
    for each, into in ((of_u, sums), (of_uv, times)):
        if each is not None:
            add_up(each, into[:, None], 1.0, None)


def add_up(part, out, factor, gain):
    parts, n, r = part.shape
    tile = {"BN": 64, "BR": power(r, least=1)}
    args = {"part": part, "gain": gain, "out": out, "factor": float(factor), "parts": parts, "n": n, "r": r}
    args |= {"o0": out.stride(0), "o1": out.stride(1)}
    launch(add_up_kernel, (ceil(n, tile["BN"]), ceil(r, tile["BR"])), args | tile, [out])
