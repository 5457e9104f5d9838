"""Triton: what is launched over a quantised W for few tokens, whose kernels read its codes. For
many W is made of them first, in the dtype of x, and freed after its product: neither direction
holds more than that one, of 2 · out · in bytes in 16 bits, 32 MiB at 4096²."""

import torch

from lora_kernels.ops.launch import ceil_div, launch_triton, power_of_two, tile_tickets
from lora_kernels.ops.lora_linear.triton_fields import backward_input, backward_layer, forward_layer, rest_blocks, tall
from lora_kernels.ops.lora_linear.triton_forward import ForwardInput
from lora_kernels.ops.lora_linear.triton_quantised import quantised_forward_kernel
from lora_kernels.ops.lora_linear.triton_quantised_backward import (
    quantised_input_gradient_kernel,
    quantised_rest_of_gradients_kernel,
)
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import rank_stages, sound_schedule
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows
from lora_kernels.ops.triton_skinny import precision

WARPS = 1024  # that programs which share a tile's depth come to, of all tiles
SHARE = 512  # of the depth, at least, of one of them
GROUP = 64  # numbers at most, as many as the search for gains of zero takes of a row at a time


def make_weights(layers):
    """Gives each layer whose W is quantised W itself in the dtype of x, for as long as the call
    takes."""
    for layer in layers:
        if layer.fields:
            layer.w = dequantise_rows(Quantised(*layer.fields))


def forward_of_codes(x, layer, keep, deterministic):
    """The y, the h [m, r] if kept and the z if kept, each in a tuple: one launch."""
    (m, k), n, w = x.shape, layer.n, Quantised(*layer.fields)
    y = x.new_empty(m, n)
    z, h = torch.empty_like(y) if layer.keep_z else None, x.new_empty(m, layer.r, dtype=torch.float32) if keep else None
    t = tile("quantised_forward", x, dtype=x.dtype, m=tall(m), r=layer.r)
    bm, br = power_of_two(tall(m), most=t.rows), power_of_two(layer.r, most=t.ranks)
    # products of W, which comes from registers, and of A
    warps, stages = sound_schedule(x, [layer.a], precision(x), max(t.columns, br), t.warps, t.stages, changed=True, narrow=True)
    count = ceil_div(m, bm) * ceil_div(n, t.columns)
    splits, scratch, ticket = _shared_depth(x, count, warps, k, bm * (t.columns + br), deterministic)
    args = {
        "shared": ForwardInput(x=x, scratch=scratch, ticket=ticket, k=k, x0=x.stride(0), x1=x.stride(1), parts=1),
        "layer": forward_layer(layer, True, None, y, z, h, layer.drop, of_codes=True), **w.arguments(t.depth), "m": m,
        "SPLITS": splits, "PRECISION": precision(x), "BM": bm, "BN": t.columns, "BK": t.depth, "BR": br,
        "RANK_STAGES": rank_stages(x, precision(x), bm, warps),
    }  # fmt: skip
    fills = [t for t in (y, z, h, scratch) if t is not None]
    changes = [] if ticket is None else [ticket]
    launch_triton(
        quantised_forward_kernel, (count, splits), args, fills, changes=changes, warps=warps, stages=stages,
        registers=t.registers,
    )  # fmt: skip
    return (y,), (h,), (z,)


def launch_last_of_codes(x, dy, layer, h, p, dgain, sums, dx, deterministic):
    """The launch that makes dx, unless that is not wanted, and adds up; `dgain` gets what y cannot
    tell."""
    (m, k), w, of_gain, looks = x.shape, Quantised(*layer.fields), tile("quantised_zero_gain", x), dgain is not None
    blocks = rest_blocks([layer], [dgain], sums, of_gain.columns)
    t = tile("quantised_input_gradient", x, dtype=x.dtype, m=tall(m), gains=layer.gain is not None)
    args = {
        **sums.kernel_args(), "shared": backward_input(x, looks),
        "layer": backward_layer(layer, dy, h, p, dgain, looks, dx is not None, of_codes=True),
        "m": m, "COLUMNS": of_gain.columns, **w.arguments(min(GROUP, t.columns)),
    }  # fmt: skip
    if dx is None:
        launch_triton(
            quantised_rest_of_gradients_kernel, (blocks,), args, sums.outputs(), warps=of_gain.warps, stages=of_gain.stages,
            registers=of_gain.registers,
        )  # fmt: skip
        return
    bm = power_of_two(tall(m), most=t.rows)
    # products of W, which comes from registers, and in float16 of dy ⊙ gain, which is float32
    factors = [p] if x.dtype is torch.float16 and layer.gain is not None else [None]
    warps, stages = sound_schedule(x, factors, precision(x), t.columns, t.warps, t.stages, changed=True, narrow=True)
    count = ceil_div(m, bm) * ceil_div(k, t.columns)
    splits, scratch, ticket = _shared_depth(x, count, warps, layer.n, bm * (t.columns + t.ranks), deterministic)
    args |= {
        "dx": dx, "scratch": scratch, "ticket": ticket, "SPLITS": splits, "PRECISION": precision(x), "BM": bm, "BN": t.depth,
        "BK": t.columns, "BR": t.ranks, "RANK_STAGES": rank_stages(x, precision(x), bm, warps),
    }  # fmt: skip
    fills = [t for t in (dx, scratch, *sums.outputs()) if t is not None]
    launch_triton(
        quantised_input_gradient_kernel, (count + ceil_div(blocks, splits), splits), args, fills,
        changes=[] if ticket is None else [ticket], warps=warps, stages=stages, registers=t.registers,
    )  # fmt: skip


def _shared_depth(x, count, warps, depth, size, deterministic):
    """How many programs share the depth of each of `count` tiles over codes, where each leaves its
    `size` sums, and their tickets."""
    splits = 1 if deterministic or not count else max(1, min(8, WARPS // (count * warps), depth // SHARE))
    if splits == 1:
        return 1, None, None
    return splits, x.new_empty(count * splits * size, dtype=torch.float32), tile_tickets(x.device, count)
