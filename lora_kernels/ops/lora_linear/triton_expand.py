"""Triton: what stands beside the library's GEMM (ops/lora_linear/library.py), one pass over a big
tensor, bound by its bytes:

    out = Σ inverse · mask ⊙ (gain ⊙ (z + h bᵀ) - less · z) + bias
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two
from lora_kernels.ops.lora_linear.library import Term
from lora_kernels.ops.lora_linear.triton_forward import add_adapter
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import rank_stages
from lora_kernels.ops.triton_dropout import dropout_fields, dropout_mask
from lora_kernels.ops.triton_skinny import precision


class ExpandTerm(NamedTuple):
    """One summand of `expand_kernel`, as `Term`."""

    h: Any
    b: Any
    z: Any
    gain: Any
    drop: Any
    """A `Dropout`, or None."""
    parts: Any
    r: Any
    b0: Any
    b1: Any


@triton.jit(do_not_specialize=["m"])
def expand_kernel(
    out, z_out, bias, terms, m, n, TERMS: tl.constexpr, LESS: tl.constexpr, RANK_STAGES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out [m, n] = Σ inverse · mask ⊙ (gain ⊙ (z + h bᵀ) - LESS · z) + bias of each `ExpandTerm`;
    z_out = z + h bᵀ. h [parts, m, r], b [n, r]. One tensor may be z, out and z_out: a program reads
    its own tile before it writes it."""
    across = tl.cdiv(n, BN)
    row, column = tl.program_id(0) // across, tl.program_id(0) % across
    rows, columns = row.to(tl.int64) * BM + tl.arange(0, BM), column.to(tl.int64) * BN + tl.arange(0, BN)
    offsets, mask = rows[:, None] * n + columns[None, :], (rows < m)[:, None] & (columns < n)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for g in tl.static_range(TERMS):
        term = terms[g]
        accumulator = tl.zeros((BM, BN), tl.float32)
        if term.z is not None:
            base = tl.load(term.z + offsets, mask=mask, other=0.0).to(tl.float32)
            accumulator += base
        accumulator = add_adapter(
            term.h, term.b, accumulator, rows, columns, m, n, term.r, term.parts, term.b0, term.b1, PRECISION, BR, RANK_STAGES
        )
        if z_out is not None:
            tl.store(z_out + offsets, accumulator.to(z_out.dtype.element_ty), mask=mask)
        if term.gain is not None:
            accumulator *= tl.load(term.gain + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        if LESS:
            accumulator -= base
        if term.drop is not None:
            keep = dropout_mask(term.drop, rows, column * BN, BM, BN)
            accumulator = tl.where(keep, term.drop.inverse * accumulator, 0.0)
        total += accumulator
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


def expand(
    out: Tensor, terms: list[Term], *, less: int = 0, bias: Tensor | None = None, z_out: Tensor | None = None
) -> None:
    """Fills out and z_out, which have rows without gaps as every z has."""
    m, n = out.shape
    t = tile("expand", out, dtype=out.dtype, m=m, n=n, r=max(term.b.shape[1] for term in terms), layers=len(terms))
    bm, bn = power_of_two(m, most=t.rows), power_of_two(n, most=t.columns)
    args = {
        "out": out, "z_out": z_out, "bias": bias, "terms": tuple(map(_kernel_term, terms)), "m": m, "n": n,
        "TERMS": len(terms), "LESS": less, "RANK_STAGES": rank_stages(out, precision(out), bm, t.warps),
        "PRECISION": precision(out), "BM": bm, "BN": bn, "BR": t.ranks,
    }  # fmt: skip
    read = {t.z.data_ptr() for t in terms if t.z is not None}
    written = [out] if z_out is None else [out, z_out]
    makes = [t for t in written if t.data_ptr() not in read]
    changes = [t for t in written if t.data_ptr() in read]
    grid = (ceil_div(m, bm) * ceil_div(n, bn),)
    launch_triton(expand_kernel, grid, args, makes, changes=changes, warps=t.warps, stages=t.stages, registers=t.registers)


def _kernel_term(term: Term) -> ExpandTerm:
    parts, _, r = term.h.shape
    return ExpandTerm(term.h, term.b, term.z, term.gain, dropout_fields(*term.drop), parts, r, *term.b.stride())
