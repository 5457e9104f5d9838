"""CUDA C++: products of a big matrix with thin ones, and what is elementwise beside a GEMM of the library. x, dy and W are in
16 bits, A and B in those or in float32, each with any strides; rows that are not in pieces of 16 bytes take slower kernels.

No atomics: what several blocks add to is kept in parts, whose sum is taken in their order.
"""

import torch

from lora_kernels.ops.dropout import threshold
from lora_kernels.ops.launch import KINDS, NUMBERS, ceil, launch_cuda, vector
from lora_kernels.ops.refusals import refuse_rows

THIN, EXPAND, SIDES, OUTER, SUMS = (f"lora_linear/cuda_{name}.cu" for name in ("thin", "expand", "sides", "outer", "sums"))
# as in the sources: rows of a step, numbers of a tile of 64 by 64, in bytes; bytes of a row of a tile
STEP, TILE_BYTES, WIDTH = 64, 8192, 128
COLUMNS = 128  # of a block of `expand`
JOBS = 4  # of a launch of `sums`


def in_pieces(*tensors):
    """Whether the rows of all consist of whole pieces of 16 bytes, eight numbers."""
    return all(t.shape[1] % 8 == 0 and refuse_rows(t=t) is None for t in tensors)


def matrix(t):
    """The fields of a `Matrix` of csrc/common/tiles.cuh."""
    return t, NUMBERS[t.dtype], *t.stride()


def inverse(drop):
    return 1.0 / (1.0 - drop[0]) if drop[1] is not None else 1.0


def drawn(drop):
    """The fields of a `Dropout`: where the seed is, or its number, and the threshold."""
    rate, seed = drop
    if seed is None:
        return None, 0, 0
    return (None, int(seed), threshold(rate)) if seed.is_cpu else (seed, 0, threshold(rate))


def rows_of(m, blocks, most=2048):
    """How many rows one block takes: as many as leave a block for most multiprocessors, since each part is written."""
    rows = most
    while rows > STEP and blocks * ceil(m, rows) < 96:
        rows //= 2
    return rows


def padded(t, m, n):
    """Memory for a matrix [m, n] like t in whole pieces of 16 bytes, and the matrix in it."""
    whole = t.new_empty(m, 8 * ceil(n, 8))
    return whole, whole[:, :n]


def pack(a):
    """a [r, k] in bfloat16, [2, r, k in whole pieces]: its numbers, and what those leave of them."""
    r, k = a.shape
    out = a.new_empty(2, r, 8 * ceil(k, 8), dtype=torch.bfloat16)
    args = (*matrix(a), out, r, k, out.shape[2])
    launch_cuda(THIN, "lora_linear_pack", (ceil(out[0].numel(), 256),), 256, args, [out], 0)
    return out


def shrink(x, a, scale, drop=(0.0, None), *, fixed=True, keep=False):
    """The parts of scale · drop(x) aᵀ, [parts, m, r] in float32, and with `keep` x where the mask keeps it, else zeros.

    `fixed`: how k is split depends on k and r alone, so that a row's sum does not depend on how many rows there are.
    """
    (m, k), r, drops, whole = x.shape, len(a), drop[1] is not None, in_pieces(x)
    split = a.dtype is not x.dtype or not whole
    factor = pack(a) if split else a if in_pieces(a) else a.clone(memory_format=torch.contiguous_format)
    ranks, part = 16 if r <= 16 or not whole else 64, part_of_a(r)
    while not fixed and part < k and ceil(m, STEP) * ceil(k, 2 * part) >= 96:
        part *= 2  # there are blocks enough, and each part is written and read
    h = x.new_empty(max(1, ceil(k, part)), m, r, dtype=torch.float32)
    everything, kept = padded(x, m, k) if keep and drops else (None, x if keep else None)
    args = (
        x, factor, h, everything, *drawn(drop), m, k, r, *x.stride(), factor.stride(-2), 8 * ceil(k, 8), part,
        float(scale) * inverse(drop),
    )  # fmt: skip
    kind = "drop_" * drops + "split_" * split
    kernel = f"{kind}{KINDS[x.dtype]}_{ranks}" if whole else f"any_{KINDS[x.dtype]}"
    shared = (3 if split else 4) * (STEP + (1 + split) * ranks) * WIDTH
    grid, makes = (ceil(m, STEP), ceil(r, ranks), len(h)), [t for t in (h, everything) if t is not None]
    launch_cuda(THIN, f"lora_linear_shrink_{kernel}", grid, 128, args, makes, shared)
    return h, kept


def part_of_a(r):
    """How many columns of A are summed at a time; as Triton's `shrink` does, for the same bits."""
    return 1024 if r <= 32 else 2048


def expand(out, terms, *, less=0, bias=None, z_out=None):
    """out [m, n] = Σ terms + bias, one launch a term; see `library.Expand`. out, z and z_out have rows without gaps."""
    m, n = out.shape
    rows = rows_of(m, ceil(n, COLUMNS), most=512)
    for i, (h, b, z, gain, drop) in enumerate(terms):
        args = (
            h, *matrix(b), z, out, z_out, *vector(gain), *vector(bias if i == 0 else None), *drawn(drop), m, n, len(b.T),
            len(h), rows, int(i > 0), float(less), inverse(drop),
        )  # fmt: skip
        read = [] if z is None else [z.data_ptr()]
        given = [t for t in (out, z_out) if t is not None]
        makes = [t for t in given if t.data_ptr() not in read and not (i > 0 and t is out)]
        changes = [t for t in given if not any(t is made for made in makes)]
        grid, shared = (ceil(n, COLUMNS), ceil(m, rows)), (COLUMNS + STEP) * WIDTH + STEP * (COLUMNS + 8) * 4
        launch_cuda(EXPAND, f"lora_linear_expand_{KINDS[out.dtype]}", grid, 256, args, makes, shared, changes=changes)


def sides(u, v, h, times, gain, scale, sums_u, r, less=None):
    """p [blocks, m, r] = scale · u (gain ⊙ v), part [parts, n, r] of uᵀ h, the sums of u's columns and of u ⊙ times
    [parts, n], and with `less` u ⊙ (gain - less)."""
    m, n = u.shape
    whole = in_pieces(u) and (times is None or in_pieces(times))
    ranks, chunks = (16, 8) if r <= 16 or not whole else (32, 4)
    blocks = ceil(n, chunks * STEP)
    rows = rows_of(m, blocks)
    new = lambda *shape: u.new_empty(shape, dtype=torch.float32)  # noqa: E731
    p = None if v is None else new(blocks, m, r)
    part = None if h is None else new(ceil(m, rows), n, r)
    of_u = new(ceil(m, rows), n) if sums_u else None
    of_uv = None if times is None else new(ceil(m, rows), n)
    everything, scaled = (None, None) if less is None else padded(u, m, n)
    makes = [t for t in (p, part, of_u, of_uv, everything) if t is not None]
    if makes:
        second = u if times is None else times  # which the kernel for any layout reads in any case
        args = (
            u, second, h, p, part, of_u, of_uv, everything, *(matrix(v) if v is not None else (None, 1, 0, 0)), *vector(gain),
            m, n, r, *u.stride(), *second.stride(), 8 * ceil(n, 8), rows, float(scale), float(less or 0),
        )  # fmt: skip
        shared = (4 + 2) * TILE_BYTES + 2 * chunks * ranks * STEP * 2
        kind = f"{'' if times is None else 'times_'}{KINDS[u.dtype]}_{ranks}" if whole else f"any_{KINDS[u.dtype]}"
        grid = (blocks, ceil(r, ranks), ceil(m, rows))
        launch_cuda(SIDES, f"lora_linear_sides_{kind}", grid, 128, args, makes, shared)
    if p is not None and not n:
        p = new(1, m, r).zero_()
    return p, part, of_u, of_uv, scaled


def outer(u, p, drop, keep):
    """The parts of (Σ p)ᵀ drop(u) [parts, r, n] without drop's factor, and with `keep` Σ p."""
    (m, n), r, whole = u.shape, p.shape[2], in_pieces(u)
    ranks = 16 if r <= 16 or not whole else 64 if u.dtype is torch.bfloat16 else 32
    rows = rows_of(m, ceil(n, 256))
    part, total = u.new_empty(ceil(m, rows), r, n, dtype=torch.float32), p.new_empty(p.shape[1:]) if keep else None
    args = (u, p, part, total, *drawn(drop), m, n, r, len(p), *u.stride(), rows)
    kind = f"{'' if drop[1] is None else 'drop_'}{KINDS[u.dtype]}_{ranks}" if whole else f"any_{KINDS[u.dtype]}"
    makes = [t for t in (part, total) if t is not None]
    grid = (ceil(n, 256), ceil(r, ranks), len(part))
    launch_cuda(OUTER, f"lora_linear_outer_{kind}", grid, 128, args, makes, (2 * 4 + 2) * TILE_BYTES)
    return part, total


def sums(jobs):
    """Each out [n, r] = factor · gain ⊙ Σ part [parts, n, r] / divisor, of jobs (part, out, gain, divisor, n, r, factor)."""
    for first in range(0, len(jobs), JOBS):
        some = jobs[first : first + JOBS]
        fields, factors = [], []
        for part, out, gain, divisor, n, r, factor in some:
            fields += [part, out, NUMBERS[out.dtype], *vector(gain), *vector(divisor), len(part), n, r]
            factors.append(float(factor))
        empty = JOBS - len(some)
        args = (*fields, *(None, None, 0, None, 0, None, 0, 0, 0, 0) * empty, *factors, *[0.0] * empty)
        blocks = sum(ceil(n * r, 256) for *_, n, r, _ in some)
        launch_cuda(SUMS, "lora_linear_sums", (blocks,), 256, args, [job[1] for job in some], 0)


def total(part):
    """Σ part [parts, n, r] in the order of the parts."""
    if len(part) == 1:
        return part[0]
    out = part.new_empty(part.shape[1:])
    sums([(part, out, None, None, *out.shape, 1.0)])
    return out


def zero_gain(dy, x, w, b, h, gain, w_scale, dgain):
    """The gradients of gains of zero: Σ dy ⊙ z, which y, a product with them, does not tell."""
    of_w = matrix(w) if w_scale is None else (w, 0, *w.stride())
    args = (
        *matrix(dy), *matrix(x), *of_w, *matrix(b), h, dgain, NUMBERS[dgain.dtype], *vector(gain), *vector(w_scale), len(x),
        x.shape[1], b.shape[1],
    )  # fmt: skip
    launch_cuda(SUMS, "lora_linear_zero_gain", (len(w),), 256, args, [], 0, changes=[dgain])
