"""CUDA C++: csrc/weight_norm/cuda.cu, for 16-bit W, A and B."""

import torch

from lora_kernels.ops.launch import KINDS, ceil, launch_cuda, power, refuse_cuda
from lora_kernels.ops.refusals import refuse_factors, refuse_negated
from lora_kernels.ops.registry import implements

SOURCE = "weight_norm/cuda.cu"
MOST, ROWS, STAGES, THREADS = 128, 64, 3, 128  # ranks; of a block, as in the source


def refusal(w, a, b, scale, w_squared):
    return refuse_factors(w, a, b, MOST) or refuse_negated(w=w, a=a, b=b) or refuse_cuda(w, SOURCE)


@implements("weight_norm_forward", "cuda", refusal)
def forward(w, a, b, scale, w_squared):
    norm = w.new_empty(w.shape[0], dtype=torch.float32)
    ranks = power(a.shape[0], most=MOST)
    args = (w, a, b, norm, *w.shape, a.shape[0], w.stride(0), a.stride(0), b.stride(0), float(scale))
    shared = STAGES * (ROWS + ranks) * 64 * 2
    grid = (ceil(w.shape[0], ROWS),)
    launch_cuda(SOURCE, f"weight_norm_{KINDS[w.dtype]}_{ranks}", grid, THREADS, args, [norm], shared)
    return norm
