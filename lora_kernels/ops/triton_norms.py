"""Triton: DoRA's norms of the rows of W + scale · BA, of a layer or of all experts of one, over
numbers or codes.

W is read once and BA made tile by tile in registers, so nothing cancels and ‖W‖² is of no use. A
GPU has the arithmetic to spare beside the memory: W + s·BA takes as many products as W Aᵀ of the
factored form.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import sound_schedule
from lora_kernels.ops.triton_quantised import Quantised, load_numbers_of_tile, load_scales_of_tile, load_table, rounded
from lora_kernels.ops.triton_skinny import HALVES, dot_accumulate, load_tile


class NormLayer(NamedTuple):
    """The layer of the kernels below."""

    w: Any
    """[n, k], None where it is codes."""
    a: Any
    """[r, k], or None for ‖w‖² alone."""
    b: Any
    """[n, r]."""
    norm: Any
    """[n], or [experts, n], float32."""
    scale: Any
    n: Any
    k: Any
    r: Any
    w0: Any = None
    w1: Any = None
    a0: Any = None
    a1: Any = None
    b0: Any = None
    b1: Any = None
    of_expert: Any = None
    """The strides from an expert's a, b and w to the next one's; None of one layer."""


@triton.jit
def norm_kernel(
    layer, MORE: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr
):
    """norm [n] = ‖w + scale · b a‖. MORE: there are more ranks than BR, and b does not stay in
    registers."""
    n, k, r = layer.n, layer.k, layer.r
    w, a, b, norm = layer.w, layer.a, layer.b, layer.norm
    if layer.of_expert is not None:
        expert = tl.program_id(1).to(tl.int64)
        w += expert * layer.of_expert[2]
        a += expert * layer.of_expert[0]
        b += expert * layer.of_expert[1]
        norm += expert * n
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR).to(tl.int64)
    squares = tl.zeros((BN, BK), tl.float32)
    bs = load_tile(b, rows, ranks, layer.b0, layer.b1, n, r)  # [BN, BR]
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        ws = load_tile(w, rows, depth, layer.w0, layer.w1, n, k)  # [BN, BK]
        as_ = load_tile(a, ranks, depth, layer.a0, layer.a1, r, k)  # [BR, BK]
        update = dot_accumulate(bs, as_, tl.zeros((BN, BK), tl.float32), PRECISION)
        if MORE:
            for rank in range(BR, r, BR):
                more_b = load_tile(b, rows, rank + ranks, layer.b0, layer.b1, n, r)  # [BN, BR]
                more_a = load_tile(a, rank + ranks, depth, layer.a0, layer.a1, r, k)  # [BR, BK]
                update = dot_accumulate(more_b, more_a, update, PRECISION)
        adapted = ws.to(tl.float32) + layer.scale * update
        squares += adapted * adapted
    # one sum over lanes at the end: in the loop the compiler would fuse its first addition with the
    # product, in each lane its own, and the lanes would hold different sums
    tl.store(norm + rows, tl.sqrt_rn(tl.sum(squares, 1)), mask=rows < n)


@triton.jit
def quantised_norm_kernel(
    layer, weight, KIND: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, OUTER_SHIFT: tl.constexpr,
    DTYPE: tl.constexpr, MORE: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """norm [n] = ‖w + scale · b a‖ of a layer whose w is a `Parts`; without a it is ‖w‖². The rows
    of an expert follow those of the one before. MORE: there are more ranks than BR."""
    n, k, r = layer.n, layer.k, layer.r
    a, b, norm = layer.a, layer.b, layer.norm
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    code_rows, end = rows, n
    if layer.of_expert is not None:
        expert = tl.program_id(1).to(tl.int64)
        a += expert * layer.of_expert[0]
        b += expert * layer.of_expert[1]
        norm += expert * n
        code_rows, end = expert * n + rows, expert * n + n
    ranks, table = tl.arange(0, BR).to(tl.int64), load_table(weight, KIND)
    squares = tl.zeros((BN, BK), tl.float32)
    for first in range(0, k, BK):
        scales = load_scales_of_tile(weight, code_rows, first, end, k, KIND, GROUP, SHIFT, OUTER_SHIFT, BK)
        numbers = load_numbers_of_tile(weight, table, scales, code_rows, first, end, k, KIND, GROUP, BK)
        adapted = tl.reshape(rounded(numbers, DTYPE), (BN, BK))
        if layer.a is not None:
            depth = first + tl.arange(0, BK).to(tl.int64)
            bs = load_tile(b, rows, ranks, layer.b0, layer.b1, n, r)  # [BN, BR]
            as_ = load_tile(a, ranks, depth, layer.a0, layer.a1, r, k)  # [BR, BK]
            update = dot_accumulate(bs, as_, tl.zeros((BN, BK), tl.float32), PRECISION)
            if MORE:
                for rank in range(BR, r, BR):
                    more_b = load_tile(b, rows, rank + ranks, layer.b0, layer.b1, n, r)  # [BN, BR]
                    more_a = load_tile(a, rank + ranks, depth, layer.a0, layer.a1, r, k)  # [BR, BK]
                    update = dot_accumulate(more_b, more_a, update, PRECISION)
            adapted += layer.scale * update
        squares += adapted * adapted
    found = tl.sum(squares, 1)
    tl.store(norm + rows, found if layer.a is None else tl.sqrt_rn(found), mask=rows < n)


def norms(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + scale · BA‖ [n] of w [n, k], a [r, k] and b [n, r]; of experts, which all have one
    dimension more, [experts, n]. One launch."""
    (n, k), r = w.shape[-2:], a.shape[-2]
    norm = w.new_empty(w.shape[:-1], dtype=torch.float32)
    t = tile("norm", w, dtype=w.dtype, factors=a.dtype, r=r)
    rows, precision = t.rows, _precision(a)
    layer = NormLayer(w, a, b, norm, float(scale), n, k, r, **_strides(w=w, a=a, b=b))
    if sound_schedule(b, [a], precision, rows, t.warps, t.stages) != (t.warps, t.stages):
        # rows, whose products are mma.sync; of two warps b and w would not fit the registers
        rows = 32
    args = {
        "layer": layer, "MORE": r > t.ranks, "PRECISION": precision, "BR": power_of_two(r, most=t.ranks), "BN": rows,
        "BK": t.depth,
    }  # fmt: skip
    launch_triton(norm_kernel, _grid(norm, rows), args, [norm], warps=t.warps, stages=t.stages, registers=t.registers)
    return norm


def norms_of_codes(w: Quantised, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same over codes, w [n, k] or [experts · n, k], which are read once."""
    norm = a.new_empty(b.shape[:-1], dtype=torch.float32)
    (n, r), k = b.shape[-2:], w.shape[1]
    layer = NormLayer(None, a, b, norm, float(scale), n, k, r, **_strides(a=a, b=b))
    return _launch_over_codes(w, layer, _precision(a))


def squares_of_codes(w: Quantised) -> Tensor:
    """‖W‖² of each row."""
    n, k = w.shape
    return _launch_over_codes(w, NormLayer(None, None, None, w.codes.new_empty(n, dtype=torch.float32), None, n, k, None), None)


def _launch_over_codes(w: Quantised, layer: NormLayer, precision: str | None) -> Tensor:
    t = tile("quantised_norm", w.codes)
    args = {
        "layer": layer, **w.arguments(t.depth), "DTYPE": w.layout[3], "PRECISION": precision,
        "MORE": layer.r is not None and layer.r > t.ranks,
        "BN": t.rows, "BK": t.depth, "BR": power_of_two(layer.r or 1, most=t.ranks),
    }  # fmt: skip
    grid = _grid(layer.norm, t.rows)
    launch_triton(quantised_norm_kernel, grid, args, [layer.norm], warps=t.warps, stages=t.stages)
    norm: Tensor = layer.norm
    return norm


def _strides(**tensors: Tensor) -> dict[str, Any]:
    """Of a, b and maybe w: those of rows and columns, and from one expert to the next."""
    found: dict[str, Any] = {f"{name}{i}": t.stride(i - 2) for name, t in tensors.items() for i in (0, 1)}
    if tensors["a"].dim() == 3:
        found["of_expert"] = tuple([tensors[name].stride(0) for name in "abw" if name in tensors])
    return found


def _grid(norm: Tensor, rows: int) -> tuple[int, ...]:
    return ceil_div(norm.shape[-1], rows), *norm.shape[:-1]


def _precision(a: Tensor) -> str:
    """Of B A: 16-bit factors are exact on tensor cores; float32 ones as six products of 16 bits,
    which is as good."""
    return "half" if a.dtype in HALVES else "bf16x6"
