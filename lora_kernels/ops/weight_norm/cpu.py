"""CPU: the factored norm in one C++ pass over W, with the rows that cancel summed directly in the
same pass."""

import torch

from lora_kernels import _cpu
from lora_kernels.ops.cpu_amx import on_tiles
from lora_kernels.ops.cpu_gemm import base_product
from lora_kernels.ops.cpu_quantised import held, refuse_codes, some_rows, weight_of, widened
from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.weight_norm.op import MAX_CONDITION

STREAMED_RANKS = 64  # rows of A for which W is streamed once, without a copy
BLOCK = 512  # rows of W copied or widened at a time
LARGE_TABLE = 1 << 22  # elements of a transposed W from which copies of its rows cost more than GEMMs
TABLE_BLOCK = 1 << 18  # elements of a transposed W widened at a time


def refusal(call):
    tensors = {"a": call.a, "b": call.b} if call.layout else {"w": call.w, "a": call.a, "b": call.b}
    of_codes = refuse_codes(call.w, call.parts, call.layout) if call.layout else None
    return of_codes or refuse_dtypes(**tensors) or refuse_negated(**tensors)


def squared_refusal(call):
    if call.layout:
        return refuse_codes(call.w, call.parts, call.layout)
    return refuse_dtypes(w=call.w) or refuse_negated(w=call.w)


def _is_table(w):
    """Whether W is the transpose of a matrix with contiguous rows, as that of an embedding or of
    GPT-2's Conv1D is."""
    return w.stride(0) == 1 and w.stride(1) > 1


def _table_blocks(w):
    """(columns, their rows of Wᵀ in float32) of such a W, some at a time."""
    table = w.t()
    step = max(1, TABLE_BLOCK // w.shape[0])
    for first in range(0, w.shape[1], step):
        columns = slice(first, first + step)
        yield columns, table[columns].float()


def _weight(call):
    """W as the kernels read it, the same memory for all of them."""
    return held(weight_of(call))


def _row_blocks(w):
    """(rows, W of these) with contiguous rows: all of it, or copies of a few if W is neither that
    nor transposed."""
    if w.stride(1) == 1:
        yield slice(0, w.shape[0]), w
        return
    for first in range(0, w.shape[0], BLOCK):
        rows = slice(first, min(first + BLOCK, w.shape[0]))
        yield rows, w[rows].contiguous()


@implements("weight_norm_forward", "cpu", refusal)
def forward(call):
    w, a, b, w_squared = _weight(call), call.a, call.b, call.w_squared
    norm = call.w.new_empty(w.shape[0], dtype=torch.float32)
    if w.numel() == 0:
        return norm.zero_()
    if w.numel() >= LARGE_TABLE and _is_table(w):  # never of codes
        return _norm_of_table(call)
    squared = None if w_squared is None else w_squared.to(torch.float32).contiguous()
    products = _products(w, a)
    for part, rows in _row_blocks(w):
        of_part = None if products is None else products[:, part]
        of_rows = None if squared is None else squared[part]
        condition, threads = MAX_CONDITION[w.dtype], torch.get_num_threads()
        _cpu.weight_norm(rows, a, b[part], of_rows, of_part, norm[part], call.scale, condition, threads)
    return norm


def _norm_of_table(call):
    """The same formula and condition as the kernel's, over blocks of a transposed W's columns:
    nothing is copied."""
    w, scaled, a = call.w, call.b.float() * call.scale, call.a.float()
    products, squared = a.new_zeros(len(a), len(w)), call.w_squared
    base = a.new_zeros(len(w)) if squared is None else squared.float()
    for columns, rows in _table_blocks(w):
        products.addmm_(a[:, columns], rows)
        if squared is None:
            base += rows.square().sum(0)
    cross = 2 * products.t() * scaled  # [out, r]
    pairs = (scaled @ (a @ a.t())) * scaled
    total, terms = base + (cross + pairs).sum(1), base + (cross.abs() + pairs.abs()).sum(1)
    # written so that a total of zero or below is summed again, and a NaN stays
    again = (terms > 0) & ~(total * MAX_CONDITION[w.dtype] >= terms) & terms.isfinite()
    (few,) = again.nonzero(as_tuple=True)
    if len(few):
        direct = total.new_zeros(len(few))
        for columns, rows in _table_blocks(w):
            direct += torch.addmm(rows[:, few], a[:, columns].t(), scaled[few].t()).square_().sum(0)
        total[few] = direct
    return total.sqrt_()


def _products(w, a):
    """A Wᵀ, [r, out] in float32, where AMX tiles make it; None where the kernel itself is as
    fast."""
    if not on_tiles(w, w):
        return None
    if a.dtype is torch.bfloat16:
        terms = a
    else:
        # three bf16 numbers hold the 24 bits of a float32
        high = a.to(torch.bfloat16)
        rest = a.float() - high.float()
        middle = rest.to(torch.bfloat16)
        terms = torch.cat([high, middle, (rest - middle.float()).to(torch.bfloat16)])
    sums = torch.cat([base_product(some, w) for some in terms.contiguous().split(STREAMED_RANKS)])
    return sums if len(sums) == len(a) else sums.view(3, *a.shape[:1], -1).sum(0)


@implements("weight_norm_backward", "cpu", refusal)
def backward(call):
    """With c = dn / n: dB = s·c ⊙ (W + s·BA) Aᵀ, dA = s·(c ⊙ B)ᵀ (W + s·BA), in blocks of rows; BA
    is not formed."""
    w, a, b, scale = _weight(call), call.a, call.b, call.scale
    c = torch.where(call.n > 0, call.dn / call.n, 0.0)[:, None]
    wide_a, wide_b = a.float(), b.float()
    gram, weighted = wide_a @ wide_a.T, c * wide_b
    da = wide_a.new_zeros(a.shape)
    db = torch.empty_like(wide_b)
    for first in range(0, w.shape[0], BLOCK):
        part = slice(first, min(first + BLOCK, w.shape[0]))
        rows = widened(some_rows(w, part))
        da.addmm_(weighted[part].T, rows)
        torch.mm(rows, wide_a.T, out=db[part])
    da.addmm_(weighted.T @ wide_b, wide_a, alpha=scale)
    db.addmm_(wide_b, gram, alpha=scale).mul_(c)
    grads = zip((da.mul_(scale), db.mul_(scale)), (a, b), call.needs, strict=True)
    return tuple(g.to(gradient_dtype(t, need)) if need else None for g, t, need in grads)


@implements("row_norm_squared", "cpu", squared_refusal)
def row_norm_squared(call):
    w = _weight(call)
    squared = call.w.new_empty(w.shape[0], dtype=torch.float32)
    if w.numel() == 0:
        return squared.zero_()
    if _is_table(w):
        squared.zero_()
        for _, rows in _table_blocks(w):
            squared += rows.square().sum(0)
        return squared
    for part, rows in _row_blocks(w):
        _cpu.row_norm_squared(rows, squared[part], torch.get_num_threads())
    return squared
