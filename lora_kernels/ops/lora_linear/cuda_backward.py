"""CUDA C++: the backward of lora_linear in bfloat16, from csrc/lora_linear/cuda_sides.cu, _outer.cu, _dx.cu or, with W in int8,
_dx_small.cu, and _sums.cu.

B1 reads dy once, for P = s·(dy ⊙ gain) B, dB and the sums of dy; B3 reads x once for dA; then dx, and what is left to add up.
No atomics: what several blocks add to is kept in parts, whose sum is taken in their order.
"""

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.chips import chip
from lora_kernels.ops.dropout import threshold
from lora_kernels.ops.gradients import empty_like
from lora_kernels.ops.launch import NUMBERS, architecture, ceil, launch_cuda, tickets, vector
from lora_kernels.ops.parts import shared_part

SIDES, OUTER, DX, DX_SMALL, SUMS = (f"lora_linear/cuda_{name}.cu" for name in ("sides", "outer", "dx", "dx_small", "sums"))
# as in the sources: rows of a step, numbers of a tile of 64 by 64, in bytes; rows and columns of a tile of dx
STEP, TILE_BYTES, TILE = 64, 8192, 128


def backward(dy, x, w, a, b, scale, bias, gain, dropout, seed, h, y, z, needs, w_scale=None):
    """dx, da, db, dbias, dgain, as far as they are wanted."""
    needs_dx, needs_da, needs_db, needs_dbias, needs_dgain = needs
    times = (y if z is None else z) if needs_dgain else None
    p, of_h, of_u, of_uv = sides(
        dy, b if needs_dx or needs_da else None, h if needs_db else None, times, gain, scale, needs_dbias, len(b.T)
    )
    drop = (dropout, seed if dropout > 0 else None)
    jobs, dx, of_x = [], None, None
    if needs_da:
        of_x, whole = outer(x, p, drop, needs_dx and len(p) > 1)
        p = p if whole is None else whole[None]
    if needs_dx:
        dx = input_gradient(dy, w, a, p, gain, drop) if w_scale is None else input_gradient_small(dy, w, a, p, gain, w_scale)
    da, db, dbias, dgain = (
        empty_like(t, wanted) if wanted else None for t, wanted in zip((a, b, bias, gain), needs[1:], strict=True)
    )
    if da is not None:
        jobs.append((of_x, da, None, None, *a.shape, inverse(drop)))
    if db is not None:
        jobs.append((of_h, db, gain, None, *b.shape, 1.0))
    if dbias is not None:
        jobs.append((of_u, dbias, None, None, len(b), 1, 1.0))
    if dgain is not None:
        jobs.append((of_uv, dgain, None, gain if z is None else None, len(b), 1, 1.0))
    sums(jobs)
    if dgain is not None and z is None:
        zero_gain(dy, x, w, b, h, gain, w_scale, dgain)
    return dx, da, db, dbias, dgain


def inverse(drop):
    return 1.0 / (1.0 - drop[0]) if drop[1] is not None else 1.0


def drawn(drop):
    """The fields of a `Dropout`: where the seed is, or its number, and the threshold."""
    rate, seed = drop
    if seed is None:
        return None, 0, 0
    return (None, int(seed), threshold(rate)) if seed.is_cpu else (seed, 0, threshold(rate))


def rows_of(m, blocks):
    """How many rows one block sums: as many as leave a block for most multiprocessors, since each part is written."""
    rows = 2048
    while rows > STEP and blocks * ceil(m, rows) < 96:
        rows //= 2
    return rows


def sides(u, v, h, times, gain, scale, sums_u, r):
    """p [blocks, m, r] of v, part [parts, n, r] of h, and the sums of u's columns and of u ⊙ times [parts, n]."""
    m, n = u.shape
    ranks, chunks = (16, 8) if r <= 16 else (32, 4)
    blocks = ceil(n, chunks * STEP)
    rows = rows_of(m, blocks)
    new = lambda *shape: u.new_empty(shape, dtype=torch.float32)  # noqa: E731
    p = None if v is None else new(blocks, m, r)
    part = None if h is None else new(ceil(m, rows), n, r)
    of_u = new(ceil(m, rows), n) if sums_u else None
    of_uv = None if times is None else new(ceil(m, rows), n)
    makes = [t for t in (p, part, of_u, of_uv) if t is not None]
    if makes:
        args = (
            u, v, times, h, p, part, of_u, of_uv, *vector(gain), m, n, r, u.stride(0), 0 if v is None else v.stride(0),
            0 if times is None else times.stride(0), rows, float(scale),
        )  # fmt: skip
        shared = (4 + 2) * TILE_BYTES + 2 * chunks * ranks * STEP * 2
        kernel = f"lora_linear_sides_{'' if times is None else 'times_'}{ranks}"
        launch_cuda(SIDES, kernel, (blocks, ceil(r, ranks), ceil(m, rows)), 128, args, makes, shared)
    return p, part, of_u, of_uv


def outer(u, p, drop, keep):
    """The parts of (Σ p)ᵀ drop(u) [parts, r, n] without drop's factor, and with `keep` Σ p."""
    (m, n), r = u.shape, p.shape[2]
    ranks = 16 if r <= 16 else 64
    rows = rows_of(m, ceil(n, 256))
    part, whole = u.new_empty(ceil(m, rows), r, n, dtype=torch.float32), p.new_empty(p.shape[1:]) if keep else None
    args = (u, p, part, whole, *drawn(drop), m, n, r, len(p), u.stride(0), rows)
    kernel = f"lora_linear_outer_{'' if drop[1] is None else 'drop_'}{ranks}"
    makes = [t for t in (part, whole) if t is not None]
    launch_cuda(OUTER, kernel, (ceil(n, 256), ceil(r, ranks), len(part)), 128, args, makes, (2 * 4 + 2) * TILE_BYTES)
    return part, whole


def input_gradient(dy, w, a, p, gain, drop):
    """(dy ⊙ gain) w + drop(p a)."""
    (m, n), k, r = dy.shape, w.shape[1], len(a)
    dx = dy.new_empty(m, k)
    panel = TILE * max(n, 1) * 2
    order = cost.order(panel, panel, TILE * TILE * 2, ceil(k, TILE), chip(architecture(dy)).l2)
    args = (
        dy, w, a, p, dx, *vector(gain), *drawn(drop), m, n, k, r, len(p), dy.stride(0), w.stride(0), a.stride(0), *order,
        inverse(drop),
    )  # fmt: skip
    kernel = f"lora_linear_dx{'' if gain is None else '_gain'}{'' if drop[1] is None else '_drop'}"
    launch_cuda(DX, kernel, (ceil(m, TILE) * ceil(k, TILE),), 256, args, [dx], 3 * 4 * TILE_BYTES)
    return dx


def input_gradient_small(dy, w, a, p, gain, w_scale):
    """(dy ⊙ gain ⊙ w_scale) w + p a for up to 64 rows and w of int8."""
    (m, n), k, r = dy.shape, w.shape[1], len(a)
    tokens, stages = (16, 5) if m <= 16 else (64, 3)
    tiles = ceil(k, TILE)
    part = shared_part(dy, n, STEP, tiles, 0, 16 * tokens)
    blocks = tiles, ceil(n, part)
    dx, scratch = dy.new_empty(m, k), dy.new_empty(tiles * blocks[1] * TILE * tokens, dtype=torch.float32)
    ticket = tickets(dy.device, tiles)
    args = (
        dy, w, a, p, dx, scratch, ticket, *vector(gain), *vector(w_scale), m, n, k, r, len(p), dy.stride(0), w.stride(0),
        a.stride(0), part,
    )  # fmt: skip
    shared = (stages * (STEP + tokens) + 2 * tokens) * 128
    launch_cuda(DX_SMALL, f"lora_linear_dx_small_{tokens}", blocks, 128, args, [dx, scratch], shared, changes=[ticket])
    return dx


def sums(jobs):
    """Each out [n, r] = factor · gain ⊙ Σ part [parts, n, r] / divisor, up to four of them."""
    if not jobs:
        return
    fields, factors = [], []
    for part, out, gain, divisor, n, r, factor in jobs:
        fields += [part, out, NUMBERS[out.dtype], *vector(gain), *vector(divisor), len(part), n, r]
        factors.append(float(factor))
    empty = 4 - len(jobs)
    args = (*fields, *(None, None, 0, None, 0, None, 0, 0, 0, 0) * empty, *factors, *[0.0] * empty)
    blocks = sum(ceil(n * r, 256) for *_, n, r, _ in jobs)
    launch_cuda(SUMS, "lora_linear_sums", (blocks,), 256, args, [job[1] for job in jobs], 0)


def zero_gain(dy, x, w, b, h, gain, w_scale, dgain):
    """The gradients of gains of zero: Σ dy ⊙ z, which y, a product with them, does not tell."""
    args = (
        dy, x, w, b, h, dgain, NUMBERS[dgain.dtype], *vector(gain), *vector(w_scale), len(x), x.shape[1], b.shape[1],
        dy.stride(0), x.stride(0), w.stride(0), b.stride(0),
    )  # fmt: skip
    launch_cuda(SUMS, "lora_linear_zero_gain", (len(w),), 256, args, [], 0, changes=[dgain])
