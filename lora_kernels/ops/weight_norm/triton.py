"""Triton: W is read once for W Aᵀ and ‖W‖²; rows in which the factored form cancels are summed directly in the same kernel."""

import torch
import triton
import triton.language as tl

from lora_kernels.ops.launch import ceil, launch, power, refuse_device
from lora_kernels.ops.registry import implements
from lora_kernels.ops.thin import outer, precision, product, shrink
from lora_kernels.ops.weight_norm.op import MAX_CONDITION

READ = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def terms_of(
    w, a, b, gram, scale, rows, first_rank, n, k, r, w0, w1, a0, a1, b0, b1,
    WITH_W: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Of BR ranks: ‖w‖² if WITH_W, the sum of 2s (w aᵀ) ⊙ b and s² (b gram) ⊙ b, and the sum of their sizes; each [BN].

    What goes into a sum over lanes is no bare product: the compiler would fuse it with the first addition, in each lane its
    own, and the lanes would hold different sums.
    """
    ranks = first_rank + tl.arange(0, BR).to(tl.int64)
    squares, of_w, of_b = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BR), tl.float32), tl.zeros((BN, BR), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        inside = depth < k
        ws = tl.load(w + rows[:, None] * w0 + depth[None, :] * w1, mask=(rows < n)[:, None] & inside[None, :], other=0.0)
        as_ = tl.load(a + ranks[None, :] * a0 + depth[:, None] * a1, mask=(ranks < r)[None, :] & inside[:, None], other=0.0)
        if WITH_W:
            squares += ws.to(tl.float32) * ws.to(tl.float32)
        of_w = product(ws, as_, of_w, PRECISION)
    for first in range(0, r, 16):
        others = first + tl.arange(0, 16).to(tl.int64)
        at = b + rows[:, None] * b0 + others[None, :] * b1
        bs = tl.load(at, mask=(rows < n)[:, None] & (others < r)[None, :], other=0.0).to(tl.float32)
        at = gram + others[:, None] * r + ranks[None, :]  # which is symmetric
        grams = tl.load(at, mask=(others < r)[:, None] & (ranks < r)[None, :], other=0.0)
        of_b = tl.dot(bs, grams, of_b, input_precision="bf16x6")  # as good as float32
    mine = (rows < n)[:, None] & (ranks < r)[None, :]
    bs = tl.load(b + rows[:, None] * b0 + ranks[None, :] * b1, mask=mine, other=0.0).to(tl.float32)
    cross, update = tl.where(mine, 2.0 * scale * bs * of_w, 0.0), tl.where(mine, scale * scale * bs * of_b, 0.0)
    return tl.sum(squares, 1), tl.sum(cross + update, 1), tl.sum(tl.abs(cross) + tl.abs(update), 1)


@triton.jit
def squared_directly(
    w, a, b, scale, rows, n, k, r, w0, w1, a0, a1, b0, b1,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """‖w + s·b a‖² as it is written, [BN]."""
    squares = tl.zeros((BN, BK), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        inside = depth < k
        ws = tl.load(w + rows[:, None] * w0 + depth[None, :] * w1, mask=(rows < n)[:, None] & inside[None, :], other=0.0)
        update = tl.zeros((BN, BK), tl.float32)
        for rank in range(0, r, BR):
            ranks = rank + tl.arange(0, BR).to(tl.int64)
            at = b + rows[:, None] * b0 + ranks[None, :] * b1
            bs = tl.load(at, mask=(rows < n)[:, None] & (ranks < r)[None, :], other=0.0)
            at = a + ranks[:, None] * a0 + depth[None, :] * a1
            as_ = tl.load(at, mask=(ranks < r)[:, None] & inside[None, :], other=0.0)
            update = product(bs, as_, update, PRECISION)
        adapted = ws.to(tl.float32) + scale * update
        squares += adapted * adapted
    return tl.sum(squares, 1)


@triton.jit
def norm_kernel(
    w, a, b, gram, w_squared, norm, scale, limit, n, k, r, w0, w1, a0, a1, b0, b1, MORE: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """norm [n] = ‖w + s·b a‖; by the factored form, or directly where its terms are more than `limit` times their sum."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    squares, sums, sizes = terms_of(
        w, a, b, gram, scale, rows, 0, n, k, r, w0, w1, a0, a1, b0, b1, w_squared is None, PRECISION, BN, BK, BR
    )
    if w_squared is not None:
        squares = tl.load(w_squared + rows, mask=rows < n, other=0.0)
    if MORE:  # ranks than fit at once: w is read again for each BR
        for first in range(BR, r, BR):
            _, more, more_sizes = terms_of(
                w, a, b, gram, scale, rows, first, n, k, r, w0, w1, a0, a1, b0, b1, False, PRECISION, BN, BK, BR
            )
            sums, sizes = sums + more, sizes + more_sizes
    total, terms = squares + sums, squares + sizes
    # written so that a total of zero or below is summed again, and what is not finite stays
    lost = (terms > 0) & (terms < float("inf")) & ~(limit * total >= terms)
    if tl.sum(lost.to(tl.int32), 0) > 0:
        again = squared_directly(w, a, b, scale, rows, n, k, r, w0, w1, a0, a1, b0, b1, PRECISION, BN, 32, 16)
        total = tl.where(lost, again, total)
    tl.store(norm + rows, tl.sqrt_rn(total), mask=rows < n)


@triton.jit
def row_norm_squared_kernel(w, squared, n, k, w0, w1, BN: tl.constexpr, BK: tl.constexpr):
    """squared [n] = ‖w‖² of each row, in the order in which norm_kernel sums it."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    squares = tl.zeros((BN, BK), tl.float32)
    for first in range(0, k, BK):
        depth = first + tl.arange(0, BK).to(tl.int64)
        inside = (rows < n)[:, None] & (depth < k)[None, :]
        ws = tl.load(w + rows[:, None] * w0 + depth[None, :] * w1, mask=inside, other=0.0).to(tl.float32)
        squares += ws * ws
    tl.store(squared + rows, tl.sum(squares, 1), mask=rows < n)


def refusal(w, a=None, b=None, scale=None, w_squared=None):
    for name, t in (("w", w), ("a", a), ("b", b)):
        if t is not None and t.dtype not in READ:
            return f"{name} is {t.dtype}; the kernels read float32, bfloat16 and float16"
        if t is not None and t.is_neg():
            return f"{name} is a negated view; resolve_neg() makes it a plain tensor"
    return refuse_device(w)


def backward_refusal(dn, n, w, a, b, scale, needs):
    return refusal(w, a, b)


def tile(w):
    return {"BN": 64, "BK": 32 if w.dtype is torch.float32 else 64}


@implements("weight_norm_forward", "triton", refusal)
def forward(w, a, b, scale, w_squared):
    (n, k), r = w.shape, a.shape[0]
    norm = w.new_empty(n, dtype=torch.float32)
    gram = w.new_empty(r, r, dtype=torch.float32)
    shrink(a, a, gram, exact=True)
    args = {
        "w": w, "a": a, "b": b, "gram": gram, "norm": norm, "scale": float(scale), "limit": MAX_CONDITION[w.dtype],
        "w_squared": None if w_squared is None else w_squared.to(torch.float32).contiguous(),
        "n": n, "k": k, "r": r, "w0": w.stride(0), "w1": w.stride(1), "a0": a.stride(0), "a1": a.stride(1),
        "b0": b.stride(0), "b1": b.stride(1), "PRECISION": _exact(w), **tile(w),
        "BR": power(r), "MORE": r > power(r),
    }  # fmt: skip
    warps = 8 if w.dtype is torch.float32 or r > 32 else 4  # so that what a warp holds fits its registers
    launch(norm_kernel, (ceil(n, args["BN"]),), args, [norm], warps=warps)
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


def _exact(w):
    """Never TF32: a norm is a small difference of large sums."""
    return "ieee" if w.dtype is torch.float32 else precision(w)
