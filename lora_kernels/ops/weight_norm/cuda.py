"""CUDA C++ for 16-bit W: csrc/weight_norm/cuda.cu where A and B have the type of W, few ranks, and
rows in pieces of 16 bytes; else, where Triton does not run, csrc/weight_norm/cuda_any.cu. The
gradients are products of W with thin matrices, as dy's."""

import torch

from lora_kernels.ops.cuda_alone import refuse_beside_triton
from lora_kernels.ops.cuda_shared_memory import shared_of_update, shared_of_update_any
from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.launch import KERNEL_SUFFIX, ceil_div, launch_cuda, power_of_two, refuse_cuda
from lora_kernels.ops.lora_linear.cuda_skinny import both_sides, factors, sum_partials
from lora_kernels.ops.refusals import refuse_dtypes, refuse_factors, refuse_negated, refuse_quantised
from lora_kernels.ops.registry import implements
from lora_kernels.ops.tables.tiles import compiled

SOURCE, ANY = "weight_norm/cuda.cu", "weight_norm/cuda_any.cu"
MOST = 128  # ranks, as in the source


def refuse_operands(w, a=None, b=None):
    if w.dtype not in KERNEL_SUFFIX:
        return f"w is {w.dtype}; the kernels read bfloat16 or float16"
    return refuse_dtypes(a=a, b=b) or refuse_negated(w=w, a=a, b=b) or refuse_cuda(w, ANY)


def refusal(call):
    if call.layout:
        return refuse_quantised(call)
    reason = refuse_factors(call.w, call.a, call.b, MOST)
    return refuse_operands(call.w, call.a, call.b) or (reason and refuse_beside_triton(reason))


def backward_refusal(call):
    reason = refuse_quantised(call) or refuse_operands(call.w, call.a, call.b)
    return reason or refuse_beside_triton("they read W once for both gradients, too")


def squared_refusal(call):
    return refuse_quantised(call) or refuse_operands(call.w) or refuse_beside_triton("they read W in pieces of 16 bytes")


@implements("weight_norm_forward", "cuda", refusal)
def forward(call):
    w, a, b, scale = call.w, call.a, call.b, call.scale
    norm = w.new_empty(w.shape[0], dtype=torch.float32)
    if refuse_factors(w, a, b, MOST):
        return _launch_any_layout(w, factors(a, b, scale), norm, False)
    t = compiled("weight_norm.cu")
    ranks = power_of_two(a.shape[0], most=t.ranks)
    args = {
        "w": w, "a": a, "b": b, "norm": norm, "rows": w.shape[0], "columns": w.shape[1], "rank": a.shape[0],
        "w_row": w.stride(0), "a_row": a.stride(0), "b_row": b.stride(0), "scale": float(scale),
    }  # fmt: skip
    grid, shared = (ceil_div(w.shape[0], t.rows),), shared_of_update(t, ranks)
    launch_cuda(SOURCE, f"weight_norm_{KERNEL_SUFFIX[w.dtype]}_{ranks}", grid, t.threads, args, [norm], shared)
    return norm


def _launch_any_layout(w, given, norm, squared):
    args = {
        "w": w, **given, "norm": norm, "rows": w.shape[0], "columns": w.shape[1], "w_row": w.stride(0),
        "w_column": w.stride(1), "squared": int(squared),
    }  # fmt: skip
    t = compiled("weight_norm_any.cu")
    kernel, grid = f"weight_norm_any_{KERNEL_SUFFIX[w.dtype]}", (ceil_div(len(w), t.rows),)
    launch_cuda(ANY, kernel, grid, t.threads, args, [norm], shared_of_update_any(t))
    return norm


@implements("row_norm_squared", "cuda", squared_refusal)
def row_norm_squared(call):
    w, (n, k) = call.w, call.w.shape
    zero = w.new_zeros(1, 1)
    given = factors(zero.expand(1, k), zero.expand(n, 1), 0.0)
    return _launch_any_layout(w, given, w.new_empty(n, dtype=torch.float32), True)


@implements("weight_norm_backward", "cuda", backward_refusal)
def backward(call):
    """With c = dn / n: dB = s·c ⊙ (W Aᵀ + s·B A Aᵀ), dA = s·((c ⊙ B)ᵀ W + s·(c ⊙ B)ᵀ B A); BA is
    not formed. What has neither side of W is taken in float64: torch may take float32 products as
    TF32."""
    w, a, b, scale, needs = call.w, call.a, call.b, call.scale, call.needs
    c = torch.where(call.n > 0, call.dn / call.n, 0.0)[:, None]
    weighted = (c * b.float()).contiguous()
    p, part, *_ = both_sides(w, a.T if needs[1] else None, weighted if needs[0] else None, None, None, 1.0, False, len(a))
    wide_a, wide_b, da, db = a.double(), b.double(), None, None
    if needs[1]:
        of_b = wide_b @ (wide_a @ wide_a.T)
        db = (scale * c * (sum_partials(p) + scale * of_b)).to(gradient_dtype(b, needs[1]))
    if needs[0]:
        of_a = (weighted.double().T @ wide_b) @ wide_a
        da = (scale * (sum_partials(part).T + scale * of_a)).to(gradient_dtype(a, needs[0])).contiguous()
    return da, db
