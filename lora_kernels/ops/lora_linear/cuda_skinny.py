"""CUDA C++: products of a big matrix with thin ones, and what is elementwise beside a GEMM of the
library. x, dy and W are in 16 bits, A and B in those or in float32, each with any strides; rows
that are not in pieces of 16 bytes take slower kernels.

No atomics: what several blocks add to is kept in parts, whose sum is taken in their order.
"""

from functools import lru_cache

import torch

from lora_kernels.ops.cuda_shared_memory import shared_of_expand, shared_of_outer, shared_of_shrink, shared_of_sides
from lora_kernels.ops.cuda_split_k import part_of_rows
from lora_kernels.ops.dropout import inverse_keep_rate, threshold
from lora_kernels.ops.launch import DTYPE_CODES, KERNEL_SUFFIX, architecture, ceil_div, launch_cuda, vector_fields
from lora_kernels.ops.refusals import refuse_rows
from lora_kernels.ops.tables.tiles import compiled, tile

THIN, EXPAND, SIDES, OUTER, SUMS = (f"lora_linear/cuda_{name}.cu" for name in ("thin", "expand", "sides", "outer", "sums"))
JOBS = 4  # of a launch of `reduce_partials`, as in the source


def in_pieces(*tensors):
    """Whether the rows of all consist of whole pieces of 16 bytes, eight numbers."""
    return all(t.shape[1] % 8 == 0 and refuse_rows(t=t) is None for t in tensors)


def matrix_fields(name, t, code=None):
    """The fields of a `Matrix` of csrc/common/tiles.cuh; `code` where its dtype has no number."""
    data, code, row, column = (None, 1, 0, 0) if t is None else (t, DTYPE_CODES[t.dtype] if code is None else code, *t.stride())
    return {f"{name}.data": data, f"{name}.dtype": code, f"{name}.row": row, f"{name}.column": column}


def dropout_fields(drop):
    """The fields of a `Dropout`: where the seed is, or its number, and the threshold."""
    rate, seed = drop
    by_value = seed is not None and seed.is_cpu
    return {
        "dropout.at": None if by_value else seed, "dropout.seed": int(seed) if by_value else 0,
        "dropout.threshold": 0 if seed is None else threshold(rate),
    }  # fmt: skip


def padded_matrix(t, m, n):
    """Memory for a matrix [m, n] like t in whole pieces of 16 bytes, and the matrix in it."""
    whole = t.new_empty(m, 8 * ceil_div(n, 8))
    return whole, whole[:, :n]


def split_bf16(a):
    """a [r, k] in bfloat16, [2, r, k in whole pieces]: its numbers, and what those leave of
    them."""
    r, k = a.shape
    out = a.new_empty(2, r, 8 * ceil_div(k, 8), dtype=torch.bfloat16)
    args = {**matrix_fields("a", a), "out": out, "r": r, "k": k, "out_row": out.shape[2]}
    t = compiled("lora_linear_pack.cu")
    launch_cuda(THIN, "lora_linear_pack", (ceil_div(out[0].numel(), t.columns),), t.threads, args, [out], 0)
    return out


def factors(a, b, scale):
    """The fields of a `Factors` of csrc/common/update_any.cuh."""
    of_a, of_b = split_bf16(a), split_bf16(b)
    return {
        "factors.a": of_a, "factors.b": of_b, "factors.a_row": of_a.shape[2], "factors.b_row": of_b.shape[2],
        "factors.rank": len(a), "factors.scale": float(scale),
    }  # fmt: skip


def shrink(x, a, scale, drop=(0.0, None), *, fixed=True, keep=False):
    """The parts of scale · drop(x) aᵀ, [parts, m, r] in float32, and with `keep` x where the mask
    keeps it, else zeros.

    `fixed`: how k is split depends on k and r alone, so that a row's sum does not depend on how
    many rows there are.
    """
    (m, k), r, drops, whole = x.shape, len(a), drop[1] is not None, in_pieces(x)
    split = a.dtype is not x.dtype or not whole
    factor = split_bf16(a) if split else a if in_pieces(a) else a.clone(memory_format=torch.contiguous_format)
    t, part = compiled("lora_linear_shrink.cu", r=r, split=split or not whole, pieces=whole), part_of_a(x, r)
    while not fixed and part < k and ceil_div(m, t.rows) * ceil_div(k, 2 * part) >= 96:
        part *= 2  # there are blocks enough, and each part is written and read
    h = x.new_empty(max(1, ceil_div(k, part)), m, r, dtype=torch.float32)
    everything, dropped_x = padded_matrix(x, m, k) if keep and drops else (None, x if keep else None)
    args = {
        "x": x, "a": factor, "h": h, "kept": everything, **dropout_fields(drop), "m": m, "k": k, "r": r, "x_row": x.stride(0),
        "x_column": x.stride(1), "a_row": factor.stride(-2), "kept_row": 8 * ceil_div(k, 8), "part": part,
        "scale": float(scale) * inverse_keep_rate(*drop),
    }  # fmt: skip
    variant = "drop_" * drops + "split_" * split
    kernel = f"{variant}{KERNEL_SUFFIX[x.dtype]}_{t.ranks}" if whole else f"any_{KERNEL_SUFFIX[x.dtype]}"
    grid, makes = (ceil_div(m, t.rows), ceil_div(r, t.ranks), len(h)), [out for out in (h, everything) if out is not None]
    launch_cuda(THIN, f"lora_linear_shrink_{kernel}", grid, t.threads, args, makes, shared_of_shrink(t, split))
    return h, dropped_x


def part_of_a(x, r):
    """How many columns of A are summed at a time; as Triton's `shrink` does, for the same bits."""
    return _part_of_a(architecture(x), x.dtype, r)


@lru_cache
def _part_of_a(arch, dtype, r):
    return tile("shrink", arch, dtype=dtype, m=1, k=1, r=r, layers=1, drawing=False, keeps=False).part


def expand(out, terms, *, less=0, bias=None, z_out=None):
    """out [m, n] = Σ terms + bias, one launch a term; see `library.Expand`. out, z and z_out have
    rows without gaps."""
    (m, n), t = out.shape, compiled("lora_linear_expand.cu")
    rows = part_of_rows(m, ceil_div(n, t.columns), t.part)
    for i, (h, b, z, gain, drop) in enumerate(terms):
        args = {
            "h": h, **matrix_fields("b", b), "z": z, "out": out, "z_out": z_out, **vector_fields("gain", gain),
            **vector_fields("bias", bias if i == 0 else None), **dropout_fields(drop), "m": m, "n": n, "r": len(b.T),
            "parts": len(h), "rows": rows, "adds": int(i > 0), "less": float(less), "inverse": inverse_keep_rate(*drop),
        }  # fmt: skip
        read = [] if z is None else [z.data_ptr()]
        given = [each for each in (out, z_out) if each is not None]
        makes = [each for each in given if each.data_ptr() not in read and not (i > 0 and each is out)]
        changes = [each for each in given if not any(each is made for made in makes)]
        grid, kernel = (ceil_div(n, t.columns), ceil_div(m, rows)), f"lora_linear_expand_{KERNEL_SUFFIX[out.dtype]}"
        launch_cuda(EXPAND, kernel, grid, t.threads, args, makes, shared_of_expand(t), changes=changes)


def both_sides(u, v, h, times, gain, scale, sums_u, r, less=None):
    """One read of u [m, n] gives p [blocks, m, r] = scale · u (gain ⊙ v) and part [parts, n, r] of
    uᵀ h. Beside them the sums of u's columns and of u ⊙ times, [parts, n]; and with `less` u ⊙
    (gain - less)."""
    m, n = u.shape
    whole = in_pieces(u) and (times is None or in_pieces(times))
    t = compiled("lora_linear_sides.cu", r=r, times=times is not None or not whole, pieces=whole)
    blocks = ceil_div(n, t.columns)
    rows = part_of_rows(m, blocks, t.part)
    new = lambda *shape: u.new_empty(shape, dtype=torch.float32)  # noqa: E731
    p = None if v is None else new(blocks, m, r)
    part = None if h is None else new(ceil_div(m, rows), n, r)
    of_u = new(ceil_div(m, rows), n) if sums_u else None
    of_uv = None if times is None else new(ceil_div(m, rows), n)
    everything, scaled = (None, None) if less is None else padded_matrix(u, m, n)
    makes = [out for out in (p, part, of_u, of_uv, everything) if out is not None]
    if makes:
        second = u if times is None else times  # which the kernel for any layout reads in any case
        args = {
            "u": u, "times": second, "h": h, "p": p, "part": part, "of_u": of_u, "of_uv": of_uv, "scaled": everything,
            **matrix_fields("v", v), **vector_fields("gain", gain), "m": m, "n": n, "r": r, "u_row": u.stride(0),
            "u_column": u.stride(1), "times_row": second.stride(0), "times_column": second.stride(1),
            "scaled_row": 8 * ceil_div(n, 8), "rows": rows, "scale": float(scale), "less": float(less or 0),
        }  # fmt: skip
        kind = (
            f"{'' if times is None else 'times_'}{KERNEL_SUFFIX[u.dtype]}_{t.ranks}"
            if whole
            else f"any_{KERNEL_SUFFIX[u.dtype]}"
        )
        grid = (blocks, ceil_div(r, t.ranks), ceil_div(m, rows))
        launch_cuda(SIDES, f"lora_linear_sides_{kind}", grid, t.threads, args, makes, shared_of_sides(t))
    if p is not None and not n:
        p = new(1, m, r).zero_()
    return p, part, of_u, of_uv, scaled


def outer_product(u, p, drop, keep):
    """The parts of (Σ p)ᵀ drop(u) [parts, r, n] without drop's factor, and with `keep` Σ p."""
    (m, n), r, whole = u.shape, p.shape[2], in_pieces(u)
    t = compiled("lora_linear_outer.cu", dtype=u.dtype, r=r, pieces=whole)
    rows = part_of_rows(m, ceil_div(n, t.columns), t.part)
    part, total = u.new_empty(ceil_div(m, rows), r, n, dtype=torch.float32), p.new_empty(p.shape[1:]) if keep else None
    args = {
        "u": u, "p": p, "part": part, "whole": total, **dropout_fields(drop), "m": m, "n": n, "r": r, "parts": len(p),
        "u_row": u.stride(0), "u_column": u.stride(1), "rows": rows,
    }  # fmt: skip
    variant = (
        f"{'' if drop[1] is None else 'drop_'}{KERNEL_SUFFIX[u.dtype]}_{t.ranks}" if whole else f"any_{KERNEL_SUFFIX[u.dtype]}"
    )
    makes = [out for out in (part, total) if out is not None]
    grid = (ceil_div(n, t.columns), ceil_div(r, t.ranks), len(part))
    launch_cuda(OUTER, f"lora_linear_outer_{variant}", grid, t.threads, args, makes, shared_of_outer(t))
    return part, total


def reduce_partials(jobs):
    """Each out [n, r] = factor · gain ⊙ Σ part [parts, n, r] / divisor, of jobs (part, out, gain,
    divisor, n, r, factor)."""
    t = compiled("lora_linear_sums.cu")
    for first in range(0, len(jobs), JOBS):
        some = jobs[first : first + JOBS]
        all_jobs = [*some, *[(None, None, None, None, 0, 0, 0.0)] * (JOBS - len(some))]
        args = {}
        for i, (part, out, gain, divisor, n, r, _) in enumerate(all_jobs):
            job = f"jobs[{i}]"
            args |= {f"{job}.part": part, f"{job}.out": out, f"{job}.dtype": 0 if out is None else DTYPE_CODES[out.dtype]}
            args |= {**vector_fields(f"{job}.gain", gain), **vector_fields(f"{job}.divisor", divisor)}
            args |= {f"{job}.parts": 0 if part is None else len(part), f"{job}.n": n, f"{job}.r": r}
        args |= {f"factors[{i}]": float(job[-1]) for i, job in enumerate(all_jobs)}
        blocks = sum(ceil_div(n * r, t.columns) for *_, n, r, _ in some)
        launch_cuda(SUMS, "lora_linear_sums", (blocks,), t.threads, args, [job[1] for job in some], 0)


def sum_partials(part):
    """Σ part [parts, n, r] in the order of the parts."""
    if len(part) == 1:
        return part[0]
    out = part.new_empty(part.shape[1:])
    reduce_partials([(part, out, None, None, *out.shape, 1.0)])
    return out


def gradient_of_zero_gain(dy, x, w, b, h, gain, w_scale, dgain):
    """The gradients of gains of zero: Σ dy ⊙ z, which y, a product with them, does not tell."""
    args = {
        **matrix_fields("dy", dy), **matrix_fields("x", x), **matrix_fields("w", w, None if w_scale is None else 0),
        **matrix_fields("b", b), "h": h, "dgain": dgain, "dtype": DTYPE_CODES[dgain.dtype], **vector_fields("gain", gain),
        **vector_fields("w_scale", w_scale), "m": len(x), "k": x.shape[1], "r": b.shape[1],
    }  # fmt: skip
    threads = compiled("lora_linear_sums.cu").threads
    launch_cuda(SUMS, "lora_linear_zero_gain", (len(w),), threads, args, [], 0, changes=[dgain])
