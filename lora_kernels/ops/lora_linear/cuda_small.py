"""CUDA C++: y of up to 64 tokens in one launch, without dropout. W lies in 16 bits, or as int8 with
a scale for each row (csrc/lora_linear/cuda_small.cu), or as codes (cuda_codes.cu beside it)."""

from typing import Any

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.cuda_alone import stands_alone
from lora_kernels.ops.cuda_shared_memory import shared_of_codes, shared_of_small
from lora_kernels.ops.cuda_split_k import split_k_part
from lora_kernels.ops.dispatch import Plan, Problem, choose_plan
from lora_kernels.ops.launch import (
    KERNEL_SUFFIX,
    architecture,
    ceil_div,
    gpu_name,
    launch_cuda,
    multiprocessors,
    refuse_cuda,
    tile_tickets,
    vector_fields,
)
from lora_kernels.ops.lora_linear.cuda_skinny import part_of_a
from lora_kernels.ops.quantised.weight import DTYPES, INT8, NIBBLES, beyond_blocks
from lora_kernels.ops.refusals import refuse_rows
from lora_kernels.ops.tables.tiles import Tile, compiled

SMALL, OF_CODES = (f"lora_linear/cuda_{name}.cu" for name in ("small", "codes"))
SMALL_TOKENS = 64
GROUP = 32  # codes of 4 bits with one scale, as in the source


def launch_small(call: Any, y: Any, z: Any, h: Any) -> None:
    """Fills y, z and h in one launch."""
    x, w, w_scale = call.x, call.w, call.w_scale
    t, of_w = compiled("lora_linear_small.cu", m=len(x), int8=w_scale is not None), "" if w_scale is None else "i8_"
    args, blocks = _fields(call, y, z, h, t, w.stride(0), w_scale)
    kernel = f"lora_linear_small_{of_w}{KERNEL_SUFFIX[x.dtype]}_{t.columns}"
    _launch(SMALL, kernel, blocks, t, args, args, shared_of_small(t))


def launch_codes(call: Any, y: Any, z: Any, h: Any) -> None:
    """The same of a quantised W."""
    x, (kind, _, k, _, block, outer_block, *_) = call.x, call.layout
    int8, rest = kind == INT8, list(call.parts)
    t = compiled("lora_linear_codes.cu", m=len(x), int8=int8)
    fields, blocks = _fields(call, y, z, h, t, k if int8 else k // 2, rest[0] if int8 else None)
    table, scales, outer_table, outer, offset = [*([None, None] if int8 else rest), None, None, None][:5]
    args = {f"layer.{name}": value for name, value in fields.items()} | {
        "table": table, "scales": scales, "outer_table": outer_table, "outer": outer, "offset": offset,
        "blocks": rest[0 if int8 else 1].numel(), "shift": _logarithm(block), "outer_shift": _logarithm(outer_block),
    }  # fmt: skip
    kernel = f"lora_linear_codes_{'i8' if int8 else 'u4'}_{KERNEL_SUFFIX[x.dtype]}_{t.columns}"
    _launch(OF_CODES, kernel, blocks, t, args, fields, shared_of_small(t) if int8 else shared_of_codes(t))


def _fields(call: Any, y: Any, z: Any, h: Any, t: Tile, w_row: int, w_scale: Any) -> tuple[dict[str, Any], int]:
    """Of a `LoRALinearSmall`, and how many blocks run."""
    x, a, b = call.x, call.a, call.b
    (m, k), (n, r) = x.shape, b.shape
    a_part, tokens = part_of_a(x, r), t.columns
    a_tiles, w_tiles, a_parts = ceil_div(r, t.rows), ceil_div(n, t.rows), max(1, ceil_div(k, a_part))
    w_part = split_k_part(x, k, t.depth, w_tiles, a_tiles * a_parts, 8 * tokens)
    blocks = a_tiles * a_parts + w_tiles * max(1, ceil_div(k, w_part))
    args = {
        "x": x, "w": call.w, "a": a, "b": b, "y": y, "z": z, "h": h,
        "scratch": x.new_empty(blocks * t.rows * tokens, dtype=torch.float32),
        "tickets": tile_tickets(x.device, a_tiles + w_tiles + 1), **vector_fields("w_scale", w_scale),
        **vector_fields("bias", call.bias), **vector_fields("gain", call.gain), "m": m, "n": n, "k": k, "r": r,
        "x_row": x.stride(0), "w_row": w_row, "a_row": a.stride(0), "b_row": b.stride(0), "a_part": a_part,
        "w_part": w_part, "scale": float(call.scale),
    }  # fmt: skip
    return args, blocks


def _launch(
    source: str, kernel: str, blocks: int, t: Tile, args: dict[str, Any], fields: dict[str, Any], shared: int
) -> None:  # fmt: skip
    makes = [out for out in map(fields.get, ("y", "z", "h", "scratch")) if out is not None]
    launch_cuda(source, kernel, (blocks,), t.threads, args, makes, shared, changes=[fields["tickets"]])


def _logarithm(block: int) -> int:
    return block.bit_length() - 1


def refuse_codes(call: Any) -> str | None:
    """Why `launch_codes` cannot take a quantised W."""
    x, (kind, _, k, dtype) = call.x, call.layout[:4]
    if more := beyond_blocks(call.layout):
        return f"w has {more}, which the kernel for codes does not read"
    if kind not in (NIBBLES, INT8):
        return "w is float8_e4m3fn; the kernel for codes reads 4 bits and int8"
    if len(x) > SMALL_TOKENS or (call.dropout > 0 and call.seed is not None):
        return f"w is quantised; the kernel for codes takes up to {SMALL_TOKENS} rows of x, found {len(x)}, and has no dropout"
    if call.a.dtype is not x.dtype or DTYPES[dtype] is not x.dtype:
        return f"x is {x.dtype} and a {call.a.dtype}; w is quantised, and the kernel for codes wants the same for both"
    whole = GROUP if kind == NIBBLES else 16
    if k % whole:
        return (
            f"x has {k} columns; the kernel for codes of {'4 bits' if kind == NIBBLES else 'int8'} needs a multiple of {whole}"
        )
    return _refuse_scales(call) or _refuse_parts(call) or refuse_rows(x=x, a=call.a)


def _refuse_scales(call: Any) -> str | None:
    kind, _, k, _, block, outer_block = call.layout[:6]
    if kind == INT8:
        if len(call.parts) > 1 or block != k:
            return f"w is int8 with blocks of {block}; the kernel for codes wants one float32 scale for each row, of {k}"
    elif block < GROUP or block & (block - 1):
        return f"w has blocks of {block}; the kernel for codes wants a power of two, of at least {GROUP}"
    elif outer_block & (outer_block - 1):
        return f"the scales of w have blocks of {outer_block}; the kernel for codes wants a power of two"
    elif call.parts[1].numel() >= 2**31:
        return f"w has {call.parts[1].numel()} blocks; the kernel for codes counts fewer than {2**31}"
    return None


def _refuse_parts(call: Any) -> str | None:
    if call.b.numel() and call.b.stride(1) != 1:
        return f"b has strides {list(call.b.stride())}; the kernel needs rows without gaps"
    for tensor in (call.w, *call.parts):
        if not tensor.is_contiguous() or tensor.is_neg():
            return "a part of the quantised w has gaps or is a negated view; contiguous() and resolve_neg() mend that"
        # numbers of float32 do so anyway; codes are read in pieces, and scales of 8 bits in words
        if tensor.data_ptr() % (16 if tensor is call.w else 4):
            return "a part of the quantised w does not begin at a multiple of 16 bytes, its scales of 4"
    return None


def plan_of_codes(call: Any) -> Plan:
    """Between `launch_codes` and Triton's kernels, where these are there."""
    x, (m, k), (n, r) = call.x, call.x.shape, call.b.shape
    codes = sum(t.numel() * t.element_size() for t in (call.w, *call.parts))
    problem = Problem("forward", m, k, (n,), (r,), x.dtype, call.gain is not None, codes=codes)
    alone = stands_alone()
    # a row's bits depend on the rows beside it only where other kernels take more of these
    deterministic = torch.are_deterministic_algorithms_enabled() and not alone
    refused = ((cost.LIBRARY, "W is made of the codes by Triton alone"),) if alone else ()
    backends = ("cuda",) if alone else ("triton", "cuda")
    return choose_plan(problem, architecture(x), deterministic, multiprocessors(x), backends, gpu_name(x), refused)


def refusal_of_codes(call: Any) -> str | None:
    """The same, and where Triton's kernels are the better choice."""
    reason = refuse_codes(call) or refuse_cuda(call.x, OF_CODES)
    if reason or stands_alone():
        return reason
    p = plan_of_codes(call)
    return None if p.winner == cost.CUDA else f"Triton's {p.winner} is the choice: {p.why}"
