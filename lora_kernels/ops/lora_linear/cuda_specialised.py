"""CUDA C++ for sm_90a: y and dx of many rows by specialised warp groups,
csrc/lora_linear/cuda_specialised_sm90a.cu.

The adapter's product is taken on the base's float32 sums, with h or P as a number of bfloat16 and
what that leaves; B or A of another type than bfloat16 likewise. Which block makes a tile decides
nothing about its bits.
"""

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.cuda_shared_memory import shared_of_specialised
from lora_kernels.ops.dropout import inverse_keep_rate
from lora_kernels.ops.launch import (
    DTYPE_CODES,
    KERNEL_SUFFIX,
    Map,
    architecture,
    ceil_div,
    launch_cuda,
    multiprocessors,
    refuse_cuda,
    vector_fields,
)
from lora_kernels.ops.lora_linear.cuda_skinny import dropout_fields, in_pieces
from lora_kernels.ops.refusals import refuse_rows
from lora_kernels.ops.tables.tiles import compiled

SOURCE, GEMM = "lora_linear/cuda_specialised_sm90a.cu", "lora_linear_specialised.cu"
BOX = 64  # rows and columns of what is stored at a time, as in the source


def refusal(x, w, drop_base, left):
    """Why it cannot compute y or dx. `left`: by its name the factor of w, if it is read as it
    lies."""
    arch = architecture(x)
    if arch != 90:
        return f"its code is for sm_90a, found sm_{arch}"
    if len(x) <= cost.MEMORY_BOUND_ROWS and not torch.are_deterministic_algorithms_enabled():
        return f"x has {len(x)} rows; its tiles have {compiled(GEMM).rows}, and up to {cost.MEMORY_BOUND_ROWS} others read less"
    if x.dtype not in KERNEL_SUFFIX:
        return f"x is {x.dtype}; the kernel reads bfloat16 or float16"
    if drop_base:
        return "the base is dropped, too"
    if not w.numel() or w.shape[0] % 8 or w.shape[1] % 8:
        return f"w is {list(w.shape)}; the kernel needs multiples of 8, and some"
    reason = refuse_rows(**left, w=w)
    for name, t in {**left, "w": w}.items():
        if not _has_map(t):
            reason = reason or f"{name} has strides {list(t.stride())}; its map needs rows of 16 bytes that do not overlap"
    return reason or refuse_cuda(x, SOURCE)


def forward(call, h, y, z, whole):
    """Fills y = gain ⊙ (x wᵀ + h bᵀ) + bias, z without gain and bias, and the sum of h's parts; the
    last two may be None."""
    x, w, b = call.x, call.w, call.b
    (m, k), n = x.shape, len(w)
    hs = pairs(h, whole)
    split = _splits(b)
    bs = pairs(b[None]) if split else b
    _launch(
        f"lora_linear_specialised_{KERNEL_SUFFIX[x.dtype]}",
        x,
        w,
        hs,
        bs,
        (m, n, k, b.shape[1]),
        split,
        y,
        z,
        call.bias,
        call.gain,
    )


def input_gradient(dy, w, a, p, drop, dx):
    """Fills dx = dy w + drop(p a)."""
    (m, n), (r, k) = dy.shape, a.shape
    ps = pairs(p)
    split = _splits(a)
    as_ = pairs(a.T[None], across=True) if split else a
    kernel = f"lora_linear_specialised_dx_{'' if drop[1] is None else 'drop_'}{KERNEL_SUFFIX[dy.dtype]}"
    _launch(kernel, dy, w, ps, as_, (m, k, n, r), split, dx, drop=drop, across=True)


def _splits(t):
    """Whether a thin matrix is no bfloat16, or no map of it can be made."""
    return t.dtype is not torch.bfloat16 or not in_pieces(t) or not _has_map(t)


def _has_map(t):
    """Whether rows that begin at multiples of 16 bytes are as far apart as a map wants them, a
    single one too."""
    return t.stride(0) >= t.shape[1] and t.stride(0) % 8 == 0


def pairs(parts, whole=None, across=False):
    """The sum of parts [parts, rows, ranks] as numbers of bfloat16: of 32 ranks each the numbers,
    then what those leave, then those of the next. [rows, 64 chunks], or its transpose if `across`.
    `whole` gets the sum."""
    t, chunk = compiled("lora_linear_pairs.cu"), compiled(GEMM).ranks
    (count, rows, ranks), chunks = parts.shape, ceil_div(parts.shape[2], chunk)
    shape = rows, chunks * 2 * chunk
    out = parts.new_empty(shape[::-1] if across else shape, dtype=torch.bfloat16)
    row, rank = (1, rows) if across else (shape[1], 1)
    part, *steps = parts.stride()
    args = {
        "from.data": parts, "from.dtype": DTYPE_CODES[parts.dtype], "from.row": steps[0], "from.column": steps[1],
        "parts": count, "part": part, "out": out, "whole": whole, "rows": rows, "ranks": ranks, "row": row,
        "chunk": 2 * chunk * rank, "rest": chunk * rank, "rank": rank,
    }  # fmt: skip
    makes = [out] if whole is None else [out, whole]
    launch_cuda(SOURCE, "lora_linear_pairs", (ceil_div(rows * chunks * chunk, t.columns),), t.threads, args, makes, 0)
    return out


def _launch(kernel, x, w, h, b, sizes, split, y, z=None, bias=None, gain=None, drop=(0.0, None), across=False):
    (m, n, depth, r), t = sizes, compiled(GEMM)
    box = (t.depth, BOX) if across else (t.columns, t.depth)  # of W and B
    given = (h, b) if r else (x, w)  # nothing is copied then
    size = x.element_size()
    column_tiles, l2 = ceil_div(n, t.columns), nearest_chip(architecture(x)).l2
    group, slab = cost.tile_order(t.rows * depth * size, t.columns * depth * size, t.rows * t.columns * size, column_tiles, l2)
    args = {
        "x": Map(x, (t.rows, t.depth)), "w": Map(w, box), "h": Map(given[0], (t.rows, t.depth)), "b": Map(given[1], box),
        "y": Map(y, (BOX, BOX)), "z": Map(y if z is None else z, (BOX, BOX)), **vector_fields("bias", bias),
        **vector_fields("gain", gain), **dropout_fields(drop), "m": m, "n": n, "depth": depth, "r": r, "split": int(split),
        "keep_z": int(z is not None), "group": group, "slab": slab, "inverse": inverse_keep_rate(*drop),
    }  # fmt: skip
    makes = [y] if z is None else [y, z]
    blocks = min(ceil_div(m, t.rows) * column_tiles, resident(x))
    launch_cuda(SOURCE, kernel, (blocks,), t.threads, args, makes, shared_of_specialised(t))


def resident(x):
    """The blocks that run side by side, one on a multiprocessor."""
    return nearest_chip(architecture(x), multiprocessors(x)).multiprocessors
