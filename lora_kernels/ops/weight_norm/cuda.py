"""CUDA C++: csrc/weight_norm/cuda.cu, for 16-bit W, A and B."""

import torch

from lora_kernels.ops.launch import KINDS, ceil, launch_cuda, power, refuse_cuda
from lora_kernels.ops.refusals import refuse_negated, refuse_rows
from lora_kernels.ops.registry import implements

SOURCE = "weight_norm/cuda.cu"
MOST, ROWS, STAGES, THREADS = 128, 64, 3, 128  # ranks; of a block, as in the source


def refusal(w, a, b, scale, w_squared):
    if w.dtype not in KINDS or a.dtype is not w.dtype:
        return f"w is {w.dtype} and a {a.dtype}; the kernel reads bfloat16 or float16, the same for both"
    if a.shape[0] > MOST:
        return f"a has {a.shape[0]} rows; the kernel has room for {MOST}"
    if w.shape[1] % 8:
        return f"w has {w.shape[1]} columns; the kernel needs a multiple of 8"
    if b.numel() and b.stride(1) != 1:
        return f"b has strides {list(b.stride())}; the kernel needs rows without gaps"
    return refuse_rows(w=w, a=a) or refuse_negated(w=w, a=a, b=b) or refuse_cuda(w, SOURCE)


@implements("weight_norm_forward", "cuda", refusal)
def forward(w, a, b, scale, w_squared):
    norm = w.new_empty(w.shape[0], dtype=torch.float32)
    ranks = power(a.shape[0], most=MOST)
    args = (w, a, b, norm, *w.shape, a.shape[0], w.stride(0), a.stride(0), b.stride(0), float(scale))
    shared = STAGES * (ROWS + ranks) * 64 * 2
    grid = (ceil(w.shape[0], ROWS),)
    launch_cuda(SOURCE, f"weight_norm_{KINDS[w.dtype]}_{ranks}", grid, THREADS, args, [norm], shared)
    return norm
