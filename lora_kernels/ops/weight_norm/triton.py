"""Triton: W is read once and B A made tile by tile in registers, so nothing cancels and ‖W‖² is of no use.

A GPU has the arithmetic to spare beside the memory: W + s·BA takes as many products as W Aᵀ of the factored form.
"""

import torch
import triton
import triton.language as tl

from lora_kernels.ops.launch import ceil, launch, power, refuse_device
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.thin import HALVES, outer, product, shrink


@triton.jit
def norm_kernel(
    w, a, b, norm, scale, n, k, r, w0, w1, a0, a1, b0, b1,
    MORE: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """norm [n] = ‖w + scale · b a‖. MORE: there are more ranks than BR, and b does not stay in registers."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR).to(tl.int64)
    squares = tl.zeros((BN, BK), tl.float32)
    at_b = b + rows[:, None] * b0 + ranks[None, :] * b1
    bs = tl.load(at_b, mask=(rows < n)[:, None] & (ranks < r)[None, :], other=0.0)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        inside = depth < k
        ws = tl.load(w + rows[:, None] * w0 + depth[None, :] * w1, mask=(rows < n)[:, None] & inside[None, :], other=0.0)
        at_a = a + ranks[:, None] * a0 + depth[None, :] * a1
        as_ = tl.load(at_a, mask=(ranks < r)[:, None] & inside[None, :], other=0.0)
        update = product(bs, as_, tl.zeros((BN, BK), tl.float32), PRECISION)
        if MORE:
            for rank in range(BR, r, BR):
                more_b = tl.load(at_b + rank * b1, mask=(rows < n)[:, None] & (rank + ranks < r)[None, :], other=0.0)
                at = at_a + tl.cast(rank, tl.int64) * a0
                more_a = tl.load(at, mask=(rank + ranks < r)[:, None] & inside[None, :], other=0.0)
                update = product(more_b, more_a, update, PRECISION)
        adapted = ws.to(tl.float32) + scale * update
        squares += adapted * adapted
    # one sum over lanes at the end: in the loop the compiler would fuse its first addition with the product, in each lane
    # its own, and the lanes would hold different sums
    tl.store(norm + rows, tl.sqrt_rn(tl.sum(squares, 1)), mask=rows < n)


@triton.jit
def row_norm_squared_kernel(w, squared, n, k, w0, w1, BN: tl.constexpr, BK: tl.constexpr):
    """squared [n] = ‖w‖² of each row."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    squares = tl.zeros((BN, BK), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        inside = (rows < n)[:, None] & (depth < k)[None, :]
        ws = tl.load(w + rows[:, None] * w0 + depth[None, :] * w1, mask=inside, other=0.0).to(tl.float32)
        squares += ws * ws
    tl.store(squared + rows, tl.sum(squares, 1), mask=rows < n)


def refusal(w, a=None, b=None, scale=None, w_squared=None):
    return refuse_dtypes(w=w, a=a, b=b) or refuse_negated(w=w, a=a, b=b) or refuse_device(w)


def backward_refusal(dn, n, w, a, b, scale, needs):
    return refusal(w, a, b)


def tile(w):
    return {"BN": 64, "BK": 32 if w.dtype is torch.float32 else 64}


@implements("weight_norm_forward", "triton", refusal)
def forward(w, a, b, scale, w_squared):
    (n, k), r = w.shape, a.shape[0]
    norm = w.new_empty(n, dtype=torch.float32)
    most = 64 if a.dtype in HALVES else 16  # ranks of b that fit the registers
    args = {
        "w": w, "a": a, "b": b, "norm": norm, "scale": float(scale), "n": n, "k": k, "r": r, "w0": w.stride(0),
        "w1": w.stride(1), "a0": a.stride(0), "a1": a.stride(1), "b0": b.stride(0), "b1": b.stride(1),
        "MORE": r > most, "PRECISION": _precision(a), "BR": power(r, most=most), **tile(w),
    }  # fmt: skip
    launch(norm_kernel, (ceil(n, args["BN"]),), args, [norm])
    return norm


@implements("weight_norm_backward", "triton", backward_refusal)
def backward(dn, n, w, a, b, scale, needs):
    """With c = dn / n: dB = s·c ⊙ (W Aᵀ + s·B A Aᵀ), dA = s·((c ⊙ B)ᵀ W + s·(c ⊙ B)ᵀ B A); BA is not formed."""
    c = torch.where(n > 0, dn / n, 0.0)[:, None]
    da = db = None
    if needs[1]:
        of_w, of_b = (w.new_empty(b.shape, dtype=torch.float32) for _ in range(2))
        gram = w.new_empty(len(a), len(a), dtype=torch.float32)
        shrink(a, a, gram, exact=True)
        shrink(w, a, of_w, exact=True)
        shrink(b, gram, of_b, exact=True)
        db = ((scale * c) * (of_w + scale * of_b)).to(b.dtype)
    if needs[0]:
        weighted = (c * b.float()).contiguous()
        of_w, of_a = (w.new_empty(a.shape, dtype=torch.float32) for _ in range(2))
        small = w.new_empty(len(a), len(a), dtype=torch.float32)
        outer(w, weighted, of_w.T, exact=True)
        outer(b, weighted, small, exact=True)
        outer(a, small, of_a.T, exact=True)
        da = (scale * (of_w + scale * of_a)).to(a.dtype)
    return da, db


@implements("row_norm_squared", "triton", refusal)
def row_norm_squared(w):
    n, k = w.shape
    squared = w.new_empty(n, dtype=torch.float32)
    args = {"w": w, "squared": squared, "n": n, "k": k, "w0": w.stride(0), "w1": w.stride(1), **tile(w)}
    launch(row_norm_squared_kernel, (ceil(n, args["BN"]),), args, [squared])
    return squared


def _precision(a):
    """Of B A: 16-bit factors are exact on tensor cores; float32 ones as six products of 16 bits, which is as good."""
    return "half" if a.dtype in HALVES else "bf16x6"
