"""CUDA C++. Up to 64 tokens with 16-bit A and B, without dropout: one launch, csrc/lora_linear/cuda_small.cu, with W in 16 bits
or int8. Else the library's GEMM with thin kernels around it, cuda_layers.py; in the deterministic mode, where a row's bits must
not depend on the other rows, or where that was measured to be faster, h = s·drop(x) Aᵀ and csrc/lora_linear/cuda_tiles.cu, if
they take it (`refuse_fused`)."""

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.alone import alone, refuse_beside_triton
from lora_kernels.ops.chips import chip
from lora_kernels.ops.dispatch import Problem, plan
from lora_kernels.ops.launch import KINDS, architecture, ceil, gpu, launch_cuda, multiprocessors, refuse_cuda, tickets, vector
from lora_kernels.ops.lora_linear import cuda_backward, cuda_layers
from lora_kernels.ops.lora_linear.cuda_thin import EXPAND, part_of_a, shrink
from lora_kernels.ops.lora_linear.layer import Layer, layers_of
from lora_kernels.ops.lora_linear.loop import forward_each, refuse_each
from lora_kernels.ops.parts import shared_part
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated, refuse_rows
from lora_kernels.ops.registry import implements, note

SMALL, TILES = (f"lora_linear/cuda_{name}.cu" for name in ("small", "tiles"))
TOKENS = 64  # the most of `small`
# as in the sources, whose tiles have rows of 128 bytes
WIDTH, ROWS = 128, 64
STAGES = {("", 16): 6, ("", 64): 4, ("i8_", 16): 5, ("i8_", 64): 3}  # of `small`, by W's type and tokens
TILE = 128  # tokens and outputs of a tile of `tiles`


def refusal(x, w, a, b, scale, bias, gain, dropout, seed, drop_base, keep, keep_z, w_scale=None):
    if w_scale is not None:
        return refuse_int8(x, w, a, b, dropout, seed) or _refuse_operands(x, w, a, b, bias, gain, w_scale=w_scale)
    return _refuse_operands(x, w, a, b, bias, gain) or _slower(x, w, a, b, gain, dropout, seed, drop_base)


def _refuse_operands(x, w, a, b, bias, gain, **more):
    if x.dtype not in KINDS:
        return f"x is {x.dtype}; the kernels read bfloat16 or float16"
    return (
        refuse_dtypes(a=a, b=b, bias=bias, gain=gain, **{name: t for name, t in more.items() if name != "dy"})
        or refuse_negated(x=x, w=w, a=a, b=b, bias=bias, gain=gain, **more)
        or refuse_cuda(x, EXPAND)
    )


def refuse_int8(x, w, a, b, dropout, seed):
    if len(x) > TOKENS or (dropout > 0 and seed is not None):
        return f"w is int8; the kernel for that takes up to {TOKENS} rows of x, found {len(x)}, and has no dropout"
    if a.dtype is not x.dtype:
        return f"x is {x.dtype} and a {a.dtype}; w is int8, and the kernel for that wants the same for both"
    if x.shape[1] % 16:
        return f"x has {x.shape[1]} columns; w is int8, and the kernel for that needs a multiple of 16"
    return _refuse_layout(x, w, a, b)


def _refuse_layout(x, w, a, b):
    if b.numel() and b.stride(1) != 1:
        return f"b has strides {list(b.stride())}; the kernel needs rows without gaps"
    return refuse_rows(x=x, w=w, a=a)


def refuse_fused(x, w, a, b, drop_base):
    """Why `small` and `tiles` cannot do it."""
    if a.dtype is not x.dtype:
        return f"x is {x.dtype} and a {a.dtype}"
    if drop_base:
        return "the base is dropped, too"
    if x.shape[1] % 8:
        return f"x has {x.shape[1]} columns, no multiple of 8"
    return _refuse_layout(x, w, a, b)


def _slower(x, w, a, b, gain, dropout, seed, drop_base):
    """Why Triton's kernels are the better choice, if they run here and this backend is not forced."""
    if alone():
        return None
    reason = refuse_fused(x, w, a, b, drop_base)
    if reason:
        return f"Triton's kernels are there: {reason}"
    p = planned(x, w, a, gain, dropout, seed)
    return None if p.winner == cost.CUDA else f"Triton's {p.winner} is the choice: {p.why}"


def planned(x, w, a, gain, dropout, seed):
    problem = Problem(
        "forward", *x.shape, (len(w),), (len(a),), x.dtype, gain=gain is not None, dropout=dropout > 0 and seed is not None
    )
    deterministic, count = torch.are_deterministic_algorithms_enabled(), multiprocessors(x)
    return plan(problem, architecture(x), deterministic, count, ("cuda",) if alone() else ("triton", "cuda"), gpu(x))


@implements("lora_linear_forward", "cuda", refusal)
def forward(x, w, a, b, scale, bias, gain, dropout, seed, drop_base, keep, keep_z, w_scale=None):
    drops = dropout > 0 and seed is not None
    few = len(x) <= TOKENS and not drops
    if w_scale is None:
        fused = refuse_fused(x, w, a, b, drop_base) is None
        if fused:
            note(lambda: planned(x, w, a, gain, dropout, seed))
        if not fused or planned(x, w, a, gain, dropout, seed).winner != cost.CUDA:
            layer = Layer(w, a, b, scale, bias, gain, dropout, seed, drop_base, keep_z)
            (y,), (h,), (z,) = cuda_layers.forward(x, [layer], keep)
            return y, h, z
    m, (n, r) = len(x), b.shape
    y, h = x.new_empty(m, n), x.new_empty(m, r, dtype=torch.float32)
    z = torch.empty_like(y) if keep_z else None
    if not few:
        parts, _ = shrink(x, a, scale, (dropout, seed) if drops else (0.0, None))
        tiles(x, w, b, bias, gain, parts, y, z, None if len(parts) == 1 or not keep else h)
        return y, parts[0] if len(parts) == 1 else h, z
    if m > 0:
        small(x, w, a, b, scale, bias, gain, y, z, h, w_scale)
    return y, h, z


def group_refusal(x, *lists):
    return refuse_each(lambda x, w, a, b, scale, bias, gain: _refuse_operands(x, w, a, b, bias, gain), x, *lists[:6]) or (
        refuse_beside_triton("one launch serves all layers")
    )


@implements("lora_linear_group_forward", "cuda", group_refusal)
def group_forward(x, w, a, b, scale, bias, gain, dropout, seed, drop_base, keep, keep_z):
    lists = (w, a, b, scale, bias, gain, dropout, seed)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic or (len(x) <= TOKENS and not any(dropout)):
        return forward_each(forward, x, *lists, drop_base, keep, keep_z)
    return cuda_layers.forward(x, layers_of(*lists, drop_base, keep_z), keep)


def backward_refusal(dy, x, w, a, b, scale, bias, gain, dropout, seed, drop_base, h, y, z, needs, w_scale=None):
    if dy.dtype is not x.dtype:
        return f"dy is {dy.dtype} and x {x.dtype}; the kernels read the same for both"
    if w_scale is None:
        reason = refuse_beside_triton("they take three launches")
        return _refuse_operands(x, w, a, b, bias, gain, dy=dy) or reason
    if x.dtype is not torch.bfloat16:
        return f"x is {x.dtype}; w is int8, and the kernel for that reads bfloat16"
    if not w.numel() or w.shape[0] % 8:
        return f"w is int8 {list(w.shape)}; the kernel for that needs multiples of 8, and some"
    return (
        refuse_int8(x, w, a, b, dropout, seed)
        or (None if _is_expanded(dy) else refuse_rows(dy=dy))
        or _refuse_operands(x, w, a, b, bias, gain, w_scale=w_scale, dy=dy)
    )


@implements("lora_linear_backward", "cuda", backward_refusal)
def backward(dy, x, w, a, b, scale, bias, gain, dropout, seed, drop_base, h, y, z, needs, w_scale=None):
    layer = Layer(w, a, b, scale, bias, gain, dropout, seed, drop_base)
    dx, (grads,) = cuda_backward.backward(x, [_plain(dy)], [layer], [h], [y], [z], needs[0], [needs[1:]], w_scale)
    return dx, *grads


def group_backward_refusal(x, dy, *lists):
    for i, each in enumerate(dy):
        if each.dtype is not x.dtype or each.is_neg():
            return f"dy of member {i} is {each.dtype}{', negated' * each.is_neg()}; the kernels read {x.dtype} as x is"
    return group_refusal(x, *lists)


@implements("lora_linear_group_backward", "cuda", group_backward_refusal)
def group_backward(x, dy, w, a, b, scale, bias, gain, dropout, seed, drop_base, h, y, z, needs):
    each = [needs[1 + 4 * i : 5 + 4 * i] for i in range(len(w))]
    layers = layers_of(w, a, b, scale, bias, gain, dropout, seed, drop_base)
    dx, grads = cuda_backward.backward(x, list(map(_plain, dy)), layers, h, y, z, needs[0], each)
    return (dx, *map(list, zip(*grads, strict=True)))


def _is_expanded(dy):
    """As that of y.sum() is: one number to memory, all rows and columns to torch."""
    return dy.stride(1) == 0


def _plain(dy):
    return dy.contiguous() if _is_expanded(dy) else dy


def small(x, w, a, b, scale, bias, gain, y, z, h, w_scale=None):
    """Fills y, z and h in one launch."""
    (m, k), (n, r) = x.shape, b.shape
    tokens, of_w = 16 if m <= 16 else TOKENS, "" if w_scale is None else "i8_"
    a_part = part_of_a(r)
    a_tiles, w_tiles, a_parts = ceil(r, ROWS), ceil(n, ROWS), max(1, ceil(k, a_part))
    w_part = shared_part(x, k, WIDTH // w.element_size(), w_tiles, a_tiles * a_parts, 8 * tokens)
    blocks = a_tiles * a_parts + w_tiles * max(1, ceil(k, w_part))
    scratch = x.new_empty(blocks * ROWS * tokens, dtype=torch.float32)
    ticket = tickets(x.device, a_tiles + w_tiles + 1)
    args = (
        x, w, a, b, y, z, h, scratch, ticket, *vector(w_scale), *vector(bias), *vector(gain), m, n, k, r, x.stride(0),
        w.stride(0), a.stride(0), b.stride(0), a_part, w_part, float(scale),
    )  # fmt: skip
    makes = [t for t in (y, z, h, scratch) if t is not None]
    wide = x.element_size() // w.element_size()  # tiles of x beside one of W
    kernel, shared = f"lora_linear_small_{of_w}{KINDS[x.dtype]}_{tokens}", STAGES[of_w, tokens] * (ROWS + wide * tokens) * WIDTH
    launch_cuda(SMALL, kernel, (blocks,), 128, args, makes, shared, changes=[ticket])


def tiles(x, w, b, bias, gain, h, y, z, whole):
    """Fills y, z and, with the sum of h's parts, `whole`."""
    (m, k), (n, r) = x.shape, b.shape
    panel = TILE * max(k, 1) * x.element_size()
    group, slab = cost.order(panel, panel, TILE * TILE * x.element_size(), ceil(n, TILE), chip(architecture(x)).l2)
    args = (
        x, w, b, h, y, z, whole, *vector(bias), *vector(gain), m, n, k, r, len(h), x.stride(0), w.stride(0), b.stride(0),
        group, slab,
    )  # fmt: skip
    makes, shared = [t for t in (y, z, whole) if t is not None], 3 * 2 * TILE * WIDTH
    grid = (ceil(m, TILE) * ceil(n, TILE),)
    launch_cuda(TILES, f"lora_linear_tiles_{KINDS[x.dtype]}", grid, 256, args, makes, shared, early=True)
