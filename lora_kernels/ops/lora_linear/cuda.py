"""CUDA C++. Up to 64 tokens with 16-bit A and B, without dropout: one launch, cuda_small.py, with W
in 16 bits, int8 or codes. Else the library's GEMM with thin kernels around it, cuda_layers.py; in
the deterministic mode, where a row's bits must not depend on the other rows, or where that was
measured to be faster, h = s·drop(x) Aᵀ and csrc/lora_linear/cuda_tiles.cu, if they take it
(`refuse_fused`). On sm_90, where that was measured to be the fastest, cuda_specialised.py."""

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.cuda_alone import refuse_beside_triton, stands_alone
from lora_kernels.ops.cuda_shared_memory import shared_of_gemm
from lora_kernels.ops.dispatch import Problem, choose_plan, forcing
from lora_kernels.ops.launch import (
    KERNEL_SUFFIX,
    architecture,
    ceil_div,
    gpu_name,
    launch_cuda,
    multiprocessors,
    refuse_cuda,
    vector_fields,
)
from lora_kernels.ops.lora_linear import cuda_backward, cuda_layers, cuda_specialised
from lora_kernels.ops.lora_linear.call import Backward, Needs
from lora_kernels.ops.lora_linear.cuda_skinny import EXPAND, shrink
from lora_kernels.ops.lora_linear.cuda_small import (
    SMALL_TOKENS,
    launch_codes,
    launch_small,
    plan_of_codes,
    refusal_of_codes,
)
from lora_kernels.ops.lora_linear.layer import Layer, layers_of
from lora_kernels.ops.lora_linear.loop import forward_each, refuse_codes_or_each
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated, refuse_quantised, refuse_rows
from lora_kernels.ops.registry import implements, note_plan
from lora_kernels.ops.tables.tiles import compiled

TILES = "lora_linear/cuda_tiles.cu"


def refusal(call):
    if call.layout:
        return _refuse_operands(call) or refusal_of_codes(call)
    if call.w_scale is not None:
        return refuse_int8(call) or _refuse_operands(call)
    return _refuse_operands(call) or _refuse_beside_triton(call)


def _refuse_operands(call, **more):
    if call.x.dtype not in KERNEL_SUFFIX:
        return f"x is {call.x.dtype}; the kernels read bfloat16 or float16"
    read = {"a": call.a, "b": call.b, "bias": call.bias, "gain": call.gain, "w_scale": getattr(call, "w_scale", None)}
    return refuse_dtypes(**read) or refuse_negated(x=call.x, w=call.w, **read, **more) or refuse_cuda(call.x, EXPAND)


def refuse_int8(call):
    x = call.x
    if len(x) > SMALL_TOKENS or _has_dropout(call):
        return f"w is int8; the kernel for that takes up to {SMALL_TOKENS} rows of x, found {len(x)}, and has no dropout"
    if call.a.dtype is not x.dtype:
        return f"x is {x.dtype} and a {call.a.dtype}; w is int8, and the kernel for that wants the same for both"
    if x.shape[1] % 16:
        return f"x has {x.shape[1]} columns; w is int8, and the kernel for that needs a multiple of 16"
    return _refuse_layout(call)


def _has_dropout(call):
    return call.dropout > 0 and call.seed is not None


def _refuse_layout(call):
    if call.b.numel() and call.b.stride(1) != 1:
        return f"b has strides {list(call.b.stride())}; the kernel needs rows without gaps"
    return refuse_rows(x=call.x, w=call.w, a=call.a)


def refuse_fused(call):
    """Why `launch_small` and `launch_tiles` cannot do it."""
    if call.a.dtype is not call.x.dtype:
        return f"x is {call.x.dtype} and a {call.a.dtype}"
    if call.drop_base:
        return "the base is dropped, too"
    if call.x.shape[1] % 8:
        return f"x has {call.x.shape[1]} columns, no multiple of 8"
    return _refuse_layout(call)


def _refuse_beside_triton(call):
    """Why Triton's kernels are the better choice, if they run here and this backend is not
    forced."""
    if stands_alone():
        return None
    reason = refuse_fused(call)
    p = planned(call, fused=not reason)
    if p is not None and (p.winner == cost.SPECIALISED or (p.winner == cost.CUDA and not reason)):
        return None
    return f"Triton's kernels are there: {reason}" if reason else f"Triton's {p.winner} is the choice: {p.why}"


def _refuse_specialised(call):
    """Why cuda_specialised.py cannot compute y or, of a backward, dx."""
    back = isinstance(call, Backward)
    left = {"x": call.x} if not back else {} if _is_expanded(call.dy) else {"dy": call.dy}
    return cuda_specialised.refusal(call.x, call.w, call.drop_base, left)


def planned(call, fused=False):
    """Of a forward, or of a backward that wants dx; None where the only way is the library's.
    `fused`: whether `launch_small` and `launch_tiles` can do it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    few = len(call.x) <= SMALL_TOKENS and not deterministic
    reason = None if few and fused else _refuse_specialised(call)
    # where it is forced and refuses, the plan says why
    if reason and not fused and forcing() != cost.SPECIALISED:
        return None
    x, (n, r), back = call.x, call.b.shape, isinstance(call, Backward)
    direction = "backward" if back else "forward"
    problem = Problem(direction, *x.shape, (n,), (r,), x.dtype, call.gain is not None, call.drop_base, _has_dropout(call))
    # what this backend has for a deterministic backward is no candidate
    backends = ("cuda",) if stands_alone() and not (deterministic and back) else ("triton", "cuda")
    refused = ((cost.SPECIALISED, reason),) if reason and not few else ()
    return choose_plan(problem, architecture(x), deterministic, multiprocessors(x), backends, gpu_name(x), refused)


@implements("lora_linear_forward", "cuda", refusal)
def forward(call):
    x, winner = call.x, cost.CUDA
    if call.layout:
        note_plan(plan_of_codes(call))
    elif call.w_scale is None:
        fused = refuse_fused(call) is None
        p = planned(call, fused)
        winner = p.winner if p else cost.LIBRARY
        if fused or winner == cost.SPECIALISED:
            note_plan(p)
        if winner != cost.SPECIALISED and not (fused and winner == cost.CUDA):
            (y,), (h,), (z,) = cuda_layers.forward(x, [Layer(call)], call.keep_h)
            return y, h, z
    m, (n, r) = len(x), call.b.shape
    y, h = x.new_empty(m, n), x.new_empty(m, r, dtype=torch.float32)
    z = torch.empty_like(y) if call.keep_z else None
    if winner == cost.SPECIALISED or m > SMALL_TOKENS or _has_dropout(call):
        fixed = winner == cost.CUDA or torch.are_deterministic_algorithms_enabled()
        parts, _ = shrink(x, call.a, call.scale, (call.dropout, call.seed) if _has_dropout(call) else (0.0, None), fixed=fixed)
        make = cuda_specialised.forward if winner == cost.SPECIALISED else launch_tiles
        make(call, parts, y, z, None if len(parts) == 1 or not call.keep_h else h)
        return y, parts[0] if len(parts) == 1 else h, z
    if m > 0:
        (launch_codes if call.layout else launch_small)(call, y, z, h)
    return y, h, z


def group_refusal(call):
    return refuse_codes_or_each(_refuse_operands, call) or refuse_beside_triton("one launch serves all layers")


@implements("lora_linear_group_forward", "cuda", group_refusal)
def group_forward(call):
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic or (len(call.x) <= SMALL_TOKENS and not any(call.dropout)):
        return forward_each(forward, call)
    return cuda_layers.forward(call.x, layers_of(call), call.keep_h)


def backward_refusal(call):
    x, w, dy = call.x, call.w, call.dy
    if call.layout:
        return refuse_quantised(call)
    if dy.dtype is not x.dtype:
        return f"dy is {dy.dtype} and x {x.dtype}; the kernels read the same for both"
    if call.w_scale is None:
        reason = _refuse_operands(call, dy=dy)
        return reason or (None if _plan_of_dx(call) else refuse_beside_triton("they take three launches"))
    if x.dtype is not torch.bfloat16:
        return f"x is {x.dtype}; w is int8, and the kernel for that reads bfloat16"
    if not w.numel() or w.shape[0] % 8:
        return f"w is int8 {list(w.shape)}; the kernel for that needs multiples of 8, and some"
    return refuse_int8(call) or (None if _is_expanded(dy) else refuse_rows(dy=dy)) or _refuse_operands(call, dy=dy)


def _plan_of_dx(call):
    """Where dx is wanted, and to be made by cuda_specialised.py; else None."""
    if not Needs(*call.needs).x or call.w_scale is not None:
        return None
    p = planned(call)
    return p if p and p.winner == cost.SPECIALISED else None


@implements("lora_linear_backward", "cuda", backward_refusal)
def backward(call):
    p = _plan_of_dx(call)
    if p is not None:
        note_plan(p)
    of_layer = [_materialized(call.dy)], [Layer(call)], [call.h], [call.y], [call.z], [Needs(*call.needs)]
    dx, (grads,) = cuda_backward.backward(call.x, *of_layer, call.w_scale, specialised=p is not None)
    return dx, *grads


def group_backward_refusal(call):
    for i, each in enumerate(call.dy):
        if each.dtype is not call.x.dtype or each.is_neg():
            return f"dy of member {i} is {each.dtype}{', negated' * each.is_neg()}; the kernels read {call.x.dtype} as x is"
    return group_refusal(call)


@implements("lora_linear_group_backward", "cuda", group_backward_refusal)
def group_backward(call):
    needs = [Needs(*member.needs) for member in call.members()]
    dx, grads = cuda_backward.backward(
        call.x, list(map(_materialized, call.dy)), layers_of(call), call.h, call.y, call.z, needs
    )
    return (dx, *map(list, zip(*grads, strict=True)))


def _is_expanded(dy):
    """As that of y.sum() is: one number to memory, all rows and columns to torch."""
    return dy.stride(1) == 0


def _materialized(dy):
    return dy.contiguous() if _is_expanded(dy) else dy


def launch_tiles(call, h, y, z, whole):
    """Fills y, z and, with the sum of h's parts, `whole`."""
    x, w, b = call.x, call.w, call.b
    (m, k), (n, r) = x.shape, b.shape
    t, size = compiled("lora_linear_tiles.cu"), x.element_size()
    panels = (each * max(k, 1) * size for each in (t.rows, t.columns))
    group, slab = cost.tile_order(*panels, t.rows * t.columns * size, ceil_div(n, t.columns), nearest_chip(architecture(x)).l2)
    args = {
        "x": x, "w": w, "b": b, "h": h, "y": y, "z": z, "whole": whole, **vector_fields("bias", call.bias),
        **vector_fields("gain", call.gain), "m": m, "n": n, "k": k, "r": r, "parts": len(h), "x_row": x.stride(0),
        "w_row": w.stride(0), "b_row": b.stride(0), "group": group, "slab": slab,
    }  # fmt: skip
    makes, grid = [out for out in (y, z, whole) if out is not None], (ceil_div(m, t.rows) * ceil_div(n, t.columns),)
    launch_cuda(
        TILES, f"lora_linear_tiles_{KERNEL_SUFFIX[x.dtype]}", grid, t.threads, args, makes, shared_of_gemm(t), early=True
    )
