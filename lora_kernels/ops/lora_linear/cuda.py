"""CUDA C++ for 16-bit x, A and B: up to 64 tokens in one launch, csrc/lora_linear/cuda_small.cu, with W in 16 bits or int8;
else, and with dropout, h = s·drop(x) Aᵀ by csrc/lora_linear/cuda_thin.cu and the rest by csrc/lora_linear/cuda_tiles.cu."""

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.chips import chip
from lora_kernels.ops.dispatch import Problem, plan
from lora_kernels.ops.dropout import threshold
from lora_kernels.ops.launch import KINDS, architecture, ceil, launch_cuda, multiprocessors, refuse_cuda, tickets, vector
from lora_kernels.ops.lora_linear import cuda_backward
from lora_kernels.ops.parts import shared_part
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated, refuse_rows
from lora_kernels.ops.registry import forced_backend, implements, missing_backends, note

SMALL, THIN, TILES = (f"lora_linear/cuda_{name}.cu" for name in ("small", "thin", "tiles"))
TOKENS = 64  # the most of `small`
# as in the sources, whose tiles have rows of 128 bytes
WIDTH, ROWS = 128, 64
STAGES = {("", 16): 6, ("", 64): 4, ("i8_", 16): 5, ("i8_", 64): 3}  # of `small`, by W's type and tokens
TILE = 128  # tokens and outputs of a tile of `tiles`


def refusal(x, w, a, b, scale, bias, gain, dropout, seed, drop_base, keep, keep_z, w_scale=None):
    if x.dtype not in KINDS or a.dtype is not x.dtype:
        return f"x is {x.dtype} and a {a.dtype}; the kernel reads bfloat16 or float16, the same for both"
    if drop_base:
        return "the base is dropped, too; the kernels drop the input of a only"
    multiple = 8 if w_scale is None else 16
    if x.shape[1] % multiple:
        return f"x has {x.shape[1]} columns; the kernel needs a multiple of {multiple}"
    if w_scale is not None and (len(x) > TOKENS or (dropout > 0 and seed is not None)):
        return f"w is int8; the kernel for that takes up to {TOKENS} rows of x, found {len(x)}, and has no dropout"
    if b.numel() and b.stride(1) != 1:
        return f"b has strides {list(b.stride())}; the kernel needs rows without gaps"
    return (
        refuse_rows(x=x, w=w, a=a)
        or refuse_dtypes(bias=bias, gain=gain, w_scale=w_scale)
        or refuse_negated(x=x, w=w, a=a, b=b, bias=bias, gain=gain, w_scale=w_scale)
        or refuse_cuda(x, SMALL)
        or (_slower(x, w, a, gain, dropout, seed) if w_scale is None else None)
    )


def _slower(x, w, a, gain, dropout, seed):
    """Why Triton's kernels are the better choice, if they are there and this backend is not forced."""
    p = planned(x, w, a, gain, dropout, seed)
    return None if p.winner == cost.CUDA else f"Triton's {p.winner} is the choice: {p.why}"


def planned(x, w, a, gain, dropout, seed):
    problem = Problem(
        "forward", *x.shape, (len(w),), (len(a),), x.dtype, gain=gain is not None, dropout=dropout > 0 and seed is not None
    )
    deterministic, count = torch.are_deterministic_algorithms_enabled(), multiprocessors(x)
    return plan(problem, architecture(x), deterministic, count, ("cuda",) if _alone() else ("triton", "cuda"))


@implements("lora_linear_forward", "cuda", refusal)
def forward(x, w, a, b, scale, bias, gain, dropout, seed, drop_base, keep, keep_z, w_scale=None):
    m, (n, r) = len(x), b.shape
    if w_scale is None:
        note(lambda: planned(x, w, a, gain, dropout, seed))
    y, h = x.new_empty(m, n), x.new_empty(m, r, dtype=torch.float32)
    z = torch.empty_like(y) if keep_z else None
    drops = dropout > 0 and seed is not None
    if m > TOKENS or drops:
        parts = shrink(x, a, scale, dropout if drops else 0.0, seed)
        tiles(x, w, b, bias, gain, parts, y, z, None if len(parts) == 1 or not keep else h)
        return y, parts[0] if len(parts) == 1 else h, z
    if m > 0:
        small(x, w, a, b, scale, bias, gain, y, z, h, w_scale)
    return y, h, z


def backward_refusal(dy, x, w, a, b, scale, bias, gain, dropout, seed, drop_base, h, y, z, needs, w_scale=None):
    if any(t.dtype is not torch.bfloat16 for t in (dy, x, a, b, *([w] if w_scale is None else []))):
        return "the kernels read bfloat16, of dy, x, w, a and b, and int8 of w"
    if drop_base:
        return "the base is dropped, too; the kernels drop the input of a only"
    if not w.numel() or w.shape[0] % 8 or w.shape[1] % 8:
        return f"w is {list(w.shape)}; the kernels need multiples of 8, and some"
    if b.stride(1) != 1:
        return f"b has strides {list(b.stride())}; the kernels need rows without gaps"
    if w_scale is not None and (len(x) > TOKENS or w.shape[1] % 16 or (dropout > 0 and seed is not None)):
        return f"w is int8; the kernel for that takes up to {TOKENS} rows of x, found {len(x)}, multiples of 16, no dropout"
    times = {"y": y} if z is None else {"z": z}
    return (
        refuse_rows(x=x, w=w, a=a, **({} if _is_expanded(dy) else {"dy": dy}), **(times if needs[4] else {}))
        or refuse_dtypes(bias=bias, gain=gain, w_scale=w_scale)
        or refuse_negated(dy=dy, x=x, w=w, a=a, b=b, bias=bias, gain=gain, w_scale=w_scale)
        or refuse_cuda(x, cuda_backward.DX)
        or (None if w_scale is not None or _alone() else "Triton's kernels are there, which take three launches")
    )


@implements("lora_linear_backward", "cuda", backward_refusal)
def backward(dy, x, w, a, b, scale, bias, gain, dropout, seed, drop_base, h, y, z, needs, w_scale=None):
    dy = dy.contiguous() if _is_expanded(dy) else dy
    return cuda_backward.backward(dy, x, w, a, b, scale, bias, gain, dropout, seed, h, y, z, needs, w_scale)


def _is_expanded(dy):
    """As that of y.sum() is: one number to memory, all rows and columns to torch."""
    return dy.stride(1) == 0


def _alone():
    """Whether Triton's kernels are no choice: this backend is forced, or they are not there."""
    return forced_backend() == "cuda" or "triton" in missing_backends()


def small(x, w, a, b, scale, bias, gain, y, z, h, w_scale=None):
    """Fills y, z and h in one launch."""
    (m, k), (n, r) = x.shape, b.shape
    tokens, of_w = 16 if m <= 16 else TOKENS, "" if w_scale is None else "i8_"
    a_part = _part_of_a(r)
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


def shrink(x, a, scale, dropout, seed):
    """The parts of scale · drop(x) aᵀ, [parts, m, r] in float32."""
    (m, k), r = x.shape, len(a)
    ranks, part = 16 if r <= 16 else 64, _part_of_a(r)
    h = x.new_empty(max(1, ceil(k, part)), m, r, dtype=torch.float32)
    by_value = dropout > 0 and seed.is_cpu
    args = (
        x, a, h, seed if dropout > 0 and not by_value else None, int(seed) if by_value else 0, threshold(dropout), m, k, r,
        x.stride(0), a.stride(0), part, float(scale) / (1.0 - dropout),
    )  # fmt: skip
    kernel, shared = f"lora_linear_shrink_{'drop_' if dropout > 0 else ''}{KINDS[x.dtype]}_{ranks}", 4 * (ROWS + ranks) * WIDTH
    launch_cuda(THIN, kernel, (ceil(m, ROWS), ceil(r, ranks), len(h)), 128, args, [h], shared)
    return h


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


def _part_of_a(r):
    """How many columns of A are summed at a time; as Triton's `shrink` does, for the same bits."""
    return 1024 if r <= 32 else 2048
