"""CUDA C++: csrc/weight_norm/cuda.cu, for 16-bit W, A and B. It runs in the simulator; this version builds no binary of it."""

import torch

from lora_kernels.ops.launch import ceil, launch_cuda, power, refuse_cuda
from lora_kernels.ops.refusals import refuse_negated
from lora_kernels.ops.registry import implements

SOURCE = "weight_norm/cuda.cu"
KINDS = {torch.bfloat16: "bf16", torch.float16: "f16"}
MOST, ROWS, STAGES, THREADS = 128, 64, 3, 128  # ranks; of a block, as in the source


def refusal(w, a, b, scale, w_squared):
    if w.dtype not in KINDS or a.dtype is not w.dtype:
        return f"w is {w.dtype} and a {a.dtype}; the kernel reads bfloat16 or float16, the same for both"
    if a.shape[0] > MOST:
        return f"a has {a.shape[0]} rows; the kernel has room for {MOST}"
    if w.shape[1] % 8:
        return f"w has {w.shape[1]} columns; the kernel needs a multiple of 8"
    for name, t in (("w", w), ("a", a), ("b", b)):
        if not t.numel():
            continue
        if t.stride(1) != 1:
            return f"{name} has strides {list(t.stride())}; the kernel needs rows without gaps"
        if name != "b" and (t.data_ptr() % 16 or t.stride(0) % 8):
            return f"the rows of {name} do not begin at multiples of 16 bytes"
    return refuse_negated(w=w, a=a, b=b) or refuse_cuda(w, SOURCE)


@implements("weight_norm_forward", "cuda", refusal)
def forward(w, a, b, scale, w_squared):
    norm = w.new_empty(w.shape[0], dtype=torch.float32)
    ranks = power(a.shape[0], most=MOST)
    args = [w, a, b, norm, *w.shape, a.shape[0], w.stride(0), a.stride(0), b.stride(0), float(scale)]
    shared = STAGES * (ROWS + ranks) * 64 * 2
    grid = (ceil(w.shape[0], ROWS),)
    launch_cuda(SOURCE, f"weight_norm_{KINDS[w.dtype]}_{ranks}", grid, THREADS, args, [norm], shared)
    return norm
