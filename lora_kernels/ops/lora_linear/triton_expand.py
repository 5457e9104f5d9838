"""Triton: what stands beside the library's GEMM (ops/lora_linear/library.py), one pass over a big
tensor, bound by its bytes:

    out = Σ inverse · mask ⊙ (gain ⊙ (z + h bᵀ) - less · z) + bias
"""

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.dropout import inverse_keep_rate
from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two
from lora_kernels.ops.lora_linear.library import Term
from lora_kernels.ops.lora_linear.triton_forward import add_adapter
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import rank_stages
from lora_kernels.ops.triton_dropout import dropout_args, dropout_mask
from lora_kernels.ops.triton_skinny import precision, strides


@triton.jit(do_not_specialize=["m"])
def expand_kernel(
    out, z_out, hs, bs, zs, gains, bias, lows, highs, limits, inverses, parts, m, n, rs, b0s, b1s,
    LESS: tl.constexpr, RANK_STAGES: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """out [m, n] = Σ_g inverse · mask ⊙ (gain ⊙ (z + h bᵀ) - LESS · z) + bias, h [parts, m, r], b
    [n, r]; z_out = z + h bᵀ. One tensor may be z, out and z_out: a program reads its own tile
    before it writes it."""
    across = tl.cdiv(n, BN)
    row, column = tl.program_id(0) // across, tl.program_id(0) % across
    rows, columns = row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BN + tl.arange(0, BN)
    at, inside = rows[:, None] * n + columns[None, :], (rows < m)[:, None] & (columns < n)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for g in tl.static_range(len(hs)):
        sums = tl.zeros((BM, BN), tl.float32)
        if zs[g] is not None:
            base = tl.load(zs[g] + at, mask=inside, other=0.0).to(tl.float32)
            sums += base
        sums = add_adapter(
            hs[g], bs[g], sums, rows, columns, m, n, rs[g], parts[g], b0s[g], b1s[g], PRECISION, BR, RANK_STAGES,
        )  # fmt: skip
        if z_out is not None:
            tl.store(z_out + at, sums.to(z_out.dtype.element_ty), mask=inside)
        if gains[g] is not None:
            sums *= tl.load(gains[g] + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        if LESS:
            sums -= base
        if lows[g] is not None:
            sums = tl.where(dropout_mask(lows[g], highs[g], rows, column * BN, limits[g], BM, BN), inverses[g] * sums, 0.0)
        total += sums
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def expand(
    out: Tensor, terms: list[Term], *, less: int = 0, bias: Tensor | None = None, z_out: Tensor | None = None
) -> None:
    """Fills out and z_out, which have rows without gaps as every z has."""
    m, n = out.shape
    ranks = tuple(term.b.shape[1] for term in terms)
    drops = [term.drop for term in terms]
    t = tile("expand", out, dtype=out.dtype, m=m, n=n, r=max(ranks), layers=len(terms))
    bm, bn = power_of_two(m, most=t.rows), power_of_two(n, most=t.columns)
    args = {
        "out": out, "z_out": z_out, "hs": tuple(t.h for t in terms), "bs": tuple(t.b for t in terms),
        "zs": tuple(t.z for t in terms), "gains": tuple(t.gain for t in terms), "bias": bias, **dropout_args(drops),
        "inverses": tuple(inverse_keep_rate(*drop) for drop in drops), "parts": tuple(len(t.h) for t in terms), "m": m, "n": n,
        "rs": ranks, **strides("b", [t.b for t in terms]), "LESS": less,
        "RANK_STAGES": rank_stages(out, precision(out), bm, t.warps), "PRECISION": precision(out), "BM": bm, "BN": bn,
        "BR": t.ranks,
    }  # fmt: skip
    read = {t.z.data_ptr() for t in terms if t.z is not None}
    written = [out] if z_out is None else [out, z_out]
    makes = [t for t in written if t.data_ptr() not in read]
    changes = [t for t in written if t.data_ptr() in read]
    grid = (ceil_div(m, bm) * ceil_div(n, bn),)
    launch_triton(expand_kernel, grid, args, makes, changes=changes, warps=t.warps, stages=t.stages, registers=t.registers)
