"""CUDA C++: csrc/merge/cuda.cu, for 16-bit W, A and B."""

import torch

from lora_kernels.ops.chips import chip
from lora_kernels.ops.launch import KINDS, architecture, ceil, launch_cuda, multiprocessors, power, refuse_cuda, vector
from lora_kernels.ops.refusals import refuse_dtypes, refuse_factors, refuse_negated, refuse_rows
from lora_kernels.ops.registry import implements

SOURCE = "merge/cuda.cu"
MOST, ROWS, COLUMNS, STAGES, THREADS = 128, 64, 64, 3, 128  # ranks; of a tile, as in the source


def refusal(w, a, b, scale, gain, out=None):
    return (
        refuse_factors(w, a, b, MOST)
        or (None if out is None else refuse_rows(out=out))
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
