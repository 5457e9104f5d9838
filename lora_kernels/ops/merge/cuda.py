"""CUDA C++: csrc/merge/cuda.cu, for 16-bit W, A and B."""

import torch

from lora_kernels.ops.chips import chip
from lora_kernels.ops.launch import KINDS, architecture, ceil, launch_cuda, multiprocessors, power, refuse_cuda, vector
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated, refuse_rows
from lora_kernels.ops.registry import implements

SOURCE = "merge/cuda.cu"
MOST, ROWS, COLUMNS, STAGES, THREADS = 128, 64, 64, 3, 128  # ranks; of a tile, as in the source


def refusal(w, a, b, scale, gain, out=None):
    if w.dtype not in KINDS or a.dtype is not w.dtype:
        return f"w is {w.dtype} and a {a.dtype}; the kernel reads bfloat16 or float16, the same for both"
    if a.shape[0] > MOST:
        return f"a has {a.shape[0]} rows; the kernel has room for {MOST}"
    if w.shape[1] % 8:
        return f"w has {w.shape[1]} columns; the kernel needs a multiple of 8"
    if b.numel() and b.stride(1) != 1:
        return f"b has strides {list(b.stride())}; the kernel needs rows without gaps"
    return (
        refuse_rows(w=w, a=a, **({} if out is None else {"out": out}))
        or refuse_dtypes(gain=gain)
        or refuse_negated(w=w, a=a, b=b, gain=gain, out=out)
        or refuse_cuda(w, SOURCE)
    )


@implements("merge_into", "cuda", refusal)
@implements("merged_weight", "cuda", refusal)
def merged_weight(w, a, b, scale, gain, out=None):
    in_place = out is not None and out.data_ptr() == w.data_ptr()
    out = torch.empty_like(w) if out is None else out
    (n, k), ranks = w.shape, power(a.shape[0], most=MOST)
    # so many columns a block that each multiprocessor has two, but enough to fill the pipeline
    slots = 2 * chip(architecture(w), multiprocessors(w)).multiprocessors
    part = COLUMNS * max(8, ceil(ceil(k, COLUMNS), max(1, slots // max(1, ceil(n, ROWS)))))
    args = (
        w, a, b, out, *vector(gain), n, k, a.shape[0], w.stride(0), a.stride(0), b.stride(0), out.stride(0), part,
        float(scale),
    )  # fmt: skip
    makes, changes = ([], [out]) if in_place else ([out], [])
    shared = STAGES * (ROWS + ranks) * COLUMNS * 2
    grid = (ceil(k, part), ceil(n, ROWS))
    launch_cuda(SOURCE, f"merge_{KINDS[w.dtype]}_{ranks}", grid, THREADS, args, makes, shared, changes=changes)
    return out
