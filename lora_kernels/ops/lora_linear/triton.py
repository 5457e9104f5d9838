"""Triton: what is launched for lora_linear and for a group of layers that share x, of which one
layer is the smallest.

Forward: h = s·drop(x) Aᵀ, then triton_forward.py. Backward: P = s·(dy ⊙ gain) B, dB and the sums of
dy from one read of dy; dA from one read of x; then dx, and all that is left to add up, in
triton_backward.py. h, P, dA and dB are in ops/triton_skinny.py. For many tokens y and dx are the
library's GEMM with triton_expand.py beside it (library.py), until a GPU has shown that ours is
faster. In bfloat16 dy ⊙ gain is rounded before its product with W, which makes the error of dx 1.4
times that of rounding it alone.

Of a quantised W few tokens read the codes, forward (triton_quantised.py) and backward
(triton_quantised_backward.py), as triton_codes.py launches them; for many W is made first.
"""

import torch

from lora_kernels.ops import cost
from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.dispatch import Problem, choose_plan
from lora_kernels.ops.dropout import inverse_keep_rate
from lora_kernels.ops.gradients import empty_gradient
from lora_kernels.ops.launch import (
    architecture,
    ceil_div,
    gpu_name,
    launch_triton,
    multiprocessors,
    power_of_two,
    refuse_device,
    tile_tickets,
)
from lora_kernels.ops.lora_linear import library
from lora_kernels.ops.lora_linear.call import Needs
from lora_kernels.ops.lora_linear.layer import Layer, layers_of
from lora_kernels.ops.lora_linear.loop import refuse_codes_or_each
from lora_kernels.ops.lora_linear.triton_backward import input_gradient_kernel, rest_of_gradients_kernel
from lora_kernels.ops.lora_linear.triton_codes import forward_of_codes, launch_last_of_codes, make_weights
from lora_kernels.ops.lora_linear.triton_expand import expand
from lora_kernels.ops.lora_linear.triton_fields import (
    backward_input,
    backward_layer,
    field_of_each,
    forward_layer,
    rest_blocks,
    tall,
)
from lora_kernels.ops.lora_linear.triton_forward import ForwardInput, forward_kernel
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements, note_plan
from lora_kernels.ops.tables.tiles import tile
from lora_kernels.ops.triton_compiler import rank_stages, sound_schedule
from lora_kernels.ops.triton_partials import Sums, sum_partials_of_each
from lora_kernels.ops.triton_quantised import Quantised
from lora_kernels.ops.triton_skinny import Side, both_sides, outer_product, precision, shrink
from lora_kernels.ops.triton_tma import loads_by_tma, tensor_map, tensor_maps


def refusal(call):
    tensors = {"x": call.x, "a": call.a, "b": call.b, "bias": call.bias, "gain": call.gain}
    if call.layout:
        if reason := Quantised(call.w, call.parts, call.layout).refusal():
            return reason
    else:
        tensors["w"] = call.w
    return refuse_dtypes(**tensors) or refuse_negated(**tensors) or refuse_device(call.x)


def backward_refusal(call):
    return refusal(call) or refuse_dtypes(dy=call.dy) or refuse_negated(dy=call.dy)


def group_refusal(call):
    return refuse_codes_or_each(refusal, call)


def group_backward_refusal(call):
    dys = {f"dy of member {i}": each for i, each in enumerate(call.dy)}
    return group_refusal(call) or refuse_dtypes(**dys) or refuse_negated(**dys)


@implements("lora_linear_forward", "triton", refusal)
def forward(call):
    (y,), (h,), (z,) = _forward(call.x, [Layer(call)], call.keep_h)
    return y, h, z


@implements("lora_linear_group_forward", "triton", group_refusal)
def group_forward(call):
    return tuple(map(list, _forward(call.x, layers_of(call), call.keep_h)))


@implements("lora_linear_backward", "triton", backward_refusal)
def backward(call):
    dx, (grads,) = _backward(call.x, [call.dy], [Layer(call)], [call.h], [call.y], [call.z], [Needs(*call.needs)])
    return dx, *grads


@implements("lora_linear_group_backward", "triton", group_backward_refusal)
def group_backward(call):
    needs = [Needs(*member.needs) for member in call.members()]
    dx, grads = _backward(call.x, call.dy, layers_of(call), call.h, call.y, call.z, needs)
    return (dx, *map(list, zip(*grads, strict=True)))


def sound_tile(x, factors, m, t, two_sums, **how):
    """Rows, warps, stages and registers of a tile as far as they are sound for products of x's
    dtype with these factors; `how` as in `sound_schedule`. Few rows go half at once, by mma.sync,
    but not where a row must have the bits that it has among many."""
    rows = power_of_two(tall(m), most=t.rows)
    found = sound_schedule(x, factors, precision(x), rows, t.warps, t.stages, **how)
    if found != (t.warps, t.stages) and m <= 64 and not two_sums and not torch.are_deterministic_algorithms_enabled():
        return 32, t.warps, t.stages, None
    return rows, *found, t.registers


def planned(direction, x, layers):
    """Which candidate of `dispatch` runs, and whether rows must have the same bits however many
    there are."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    p = choose_plan(Problem(
        direction, *x.shape, field_of_each(layers, "n"), field_of_each(layers, "r"), x.dtype,
        any(layer.gain is not None for layer in layers), any(layer.drop_base for layer in layers),
        any(layer.drop[1] is not None for layer in layers), precision(x) == "tf32",
        sum(Quantised(*layer.fields).nbytes for layer in layers if layer.fields),
    ), architecture(x), deterministic, multiprocessors(x), gpu=gpu_name(x))  # fmt: skip
    note_plan(p)
    return p.winner, deterministic


def _forward(x, layers, keep):
    """The y, the h [m, r] if kept and the z if kept of each layer: two launches, or one, or those
    around the library's GEMM."""
    form, deterministic = planned("forward", x, layers)
    if form == cost.CODES:
        return forward_of_codes(x, *layers, keep, deterministic)
    make_weights(layers)
    if form == cost.LIBRARY:
        return _forward_by_library(x, layers, keep)
    m, k = x.shape
    one_pass = form == "one pass"
    none = (None,) * len(layers)
    ys = tuple(x.new_empty(m, layer.n) for layer in layers)
    zs = tuple(torch.empty_like(y) if layer.keep_z else None for y, layer in zip(ys, layers, strict=True))
    given = (field_of_each(layers, name) for name in ("a", "scale", "drop"))
    hs = none if one_pass else shrink(x, *given, early=True, fixed=deterministic)
    in_one_part = not one_pass and len(hs[0]) == 1
    wholes = tuple(x.new_empty(m, layer.r, dtype=torch.float32) if keep and not in_one_part else None for layer in layers)
    two_sums = any(layer.drop_base for layer in layers)
    drops = [layer.drop if one_pass or layer.drop_base else (0.0, None) for layer in layers]
    ws, ns = field_of_each(layers, "w"), field_of_each(layers, "n")
    mapped = form == "two launches" and not two_sums and loads_by_tma([x], ws)
    t = tile(
        "forward", x, dtype=x.dtype, m=tall(m), k=k, n=sum(ns), layers=len(ws), two_sums=two_sums, one_pass=one_pass,
        mapped=mapped,
    )  # fmt: skip
    by_maps, bn, bk = mapped and t.maps, t.columns, t.depth
    drawing = any(seed is not None for _, seed in drops)
    factors = field_of_each(layers, "a") if one_pass else ws
    bm, warps, stages, registers = sound_tile(x, factors, m, t, two_sums, changed=drawing, mapped=by_maps)
    count = ceil_div(m, bm) * sum(ceil_div(layer.n, bn) for layer in layers)
    br = power_of_two(max(field_of_each(layers, "r")), most=t.ranks)
    splits = 1 if deterministic or two_sums or m > 64 else cost.split_k_count(count, k)
    scratch = x.new_empty(count * splits * bm * (bn + br), dtype=torch.float32) if splits > 1 else None
    ticket = tile_tickets(x.device, count) if splits > 1 else None
    waits = not one_pass and architecture(x) >= 90
    given = zip(layers, hs, ys, zs, wholes, drops, strict=True)
    args = {
        "shared": ForwardInput(
            x=x, scratch=scratch, ticket=ticket, k=k, x0=x.stride(0), x1=x.stride(1), parts=1 if one_pass else len(hs[0]),
        ),
        "layers": tuple(forward_layer(layer, one_pass, *rest) for layer, *rest in given),
        "map_x": tensor_map(x, bm, bk) if by_maps else None, **tensor_maps("map_w", ws if by_maps else (), bn, bk), "m": m,
        "LAYERS": len(layers), "SPLITS": splits, "WAITS": waits, "PRECISION": precision(x), "BM": bm, "BN": bn, "BK": bk,
        "BR": br, "RANK_STAGES": rank_stages(x, precision(x), bm, warps),
        **_tile_order(x, bm, bn, k, sum(ceil_div(layer.n, bn) for layer in layers)),
    }  # fmt: skip
    fills = [t for t in (*ys, *zs, *wholes, scratch) if t is not None]
    changes = [] if ticket is None else [ticket]
    launch_triton(
        forward_kernel, (count, splits), args, fills, changes=changes, warps=warps, stages=stages, registers=registers,
        early=waits,
    )  # fmt: skip
    return ys, tuple(h[0] for h in hs) if keep and in_one_part else wholes, zs


def _forward_by_library(x, layers, keep):
    ys = tuple(x.new_empty(len(x), layer.n) for layer in layers)
    zs = tuple(torch.empty_like(y) if layer.keep_z else None for y, layer in zip(ys, layers, strict=True))
    dropped = [x.new_empty(x.shape) if layer.drop_base else None for layer in layers]
    hs = shrink(x, *(field_of_each(layers, name) for name in ("a", "scale", "drop")), dropped=dropped, fixed=False)
    if keep and len(hs[0]) > 1:
        hs = sum_partials_of_each(hs)
    library.forward(expand, x, dropped, layers, hs, ys, zs)
    return ys, tuple(h[0] if keep else None for h in hs), zs


def _tile_order(x, rows, columns, depth, across):
    """Of tiles [rows, columns] that sum over `depth`."""
    size = x.element_size()
    found = cost.tile_order(
        rows * depth * size, columns * depth * size, rows * columns * size, across, nearest_chip(architecture(x)).l2
    )
    return dict(zip(("GROUP", "SLAB"), found, strict=True))


def _backward(x, dys, layers, hs, ys, zs, needs):
    """dx, and da, db, dbias and dgain of each layer; three launches, or those around the library's
    GEMM."""
    sides, sums, grads, dgains, needs_dx = [], Sums(x), [], [], needs[0].x
    form, deterministic = planned("backward", x, layers) if needs_dx else (None, False)
    by_library = form == cost.LIBRARY
    for dy, layer, h, y, z, need in zip(dys, layers, hs, ys, zs, needs, strict=True):
        sides.append(Side(
            dy, layer.r, v=layer.b if need.x or need.a else None, gain=layer.gain, h=h if need.b else None,
            times=(y if z is None else z) if need.gain else None, scale=float(layer.scale), sums=need.bias,
            less=layer.drop_base,
            scaled=x.new_empty(dy.shape) if by_library and layer.gain is not None else None,
        ))  # fmt: skip
    if any(side.v is not None or side.h is not None or side.sums or side.times is not None for side in sides):
        both_sides(sides)
    ps, drops = [side.p for side in sides], [layer.drop for layer in layers]
    of_x = [i for i, need in enumerate(needs) if need.a]
    parts = {}
    if of_x:
        made, wholes = outer_product(x, [ps[i] for i in of_x], [drops[i] for i in of_x], keep=needs_dx)
        parts = dict(zip(of_x, made, strict=True))
        if needs_dx:
            for i, whole in zip(of_x, wholes, strict=True):
                ps[i] = whole[None]
    for i, (layer, side, need) in enumerate(zip(layers, sides, needs, strict=True)):
        of = zip((layer.a, layer.b, layer.bias, layer.gain), need[1:], strict=True)
        da, db, dbias, dgain = (empty_gradient(t, wanted) if wanted else None for t, wanted in of)
        if da is not None:
            sums.add_job(parts[i], da, inverse_keep_rate(*layer.drop))
        if db is not None:
            sums.add_job(side.part, db, gain=layer.gain)
        if dbias is not None:
            sums.add_job(side.of_u, dbias)
        from_y = dgain is not None and zs[i] is None
        if dgain is not None:
            sums.add_job(side.of_uv, dgain, divisor=layer.gain if from_y else None)
        grads.append((da, db, dbias, dgain))
        dgains.append(dgain if from_y else None)
    dx = x.new_empty(x.shape) if needs_dx else None
    # without dx a few rows of W at most are read, those of gains of zero: from the codes, too
    if layers[0].fields and (form == cost.CODES or (not needs_dx and dgains[0] is not None)):
        launch_last_of_codes(x, *dys, *layers, *hs, *ps, *dgains, sums, dx, deterministic)
        return dx, grads
    # the last that reads W, so that what the launches before needed is free
    if needs_dx:
        make_weights(layers)
    if by_library:
        library.input_gradient(expand, dys, [side.scaled for side in sides], layers, ps, dx)
    _launch_last(x, dys, layers, hs, ps, dgains, sums, None if by_library else dx)
    return dx, grads


def _launch_last(x, dys, layers, hs, ps, dgains, sums, dx):
    """The launch that makes dx, unless that is there or not wanted, and adds up."""
    m, k = x.shape
    looks, of_gain = any(d is not None for d in dgains), tile("zero_gain", x)
    blocks = rest_blocks(layers, dgains, sums, of_gain.columns)
    args = {
        **sums.kernel_args(), "shared": backward_input(x, looks),
        "layers": tuple(
            backward_layer(*each, looks, dx is not None) for each in zip(layers, dys, hs, ps, dgains, strict=True)
        ),
        "m": m, "LAYERS": len(layers), "COLUMNS": of_gain.columns,
    }  # fmt: skip
    if dx is None:
        if blocks:
            launch_triton(rest_of_gradients_kernel, (blocks,), args, sums.outputs(), warps=of_gain.warps, stages=of_gain.stages)
        return
    gains, two_sums = any(layer.gain is not None for layer in layers), any(layer.drop_base for layer in layers)
    ws, ns = field_of_each(layers, "w"), field_of_each(layers, "n")
    t = tile(
        "input_gradient", x, dtype=x.dtype, m=tall(m), k=k, n=sum(ns), layers=len(layers), gains=gains, two_sums=two_sums
    )
    by_maps, bk, bn = t.maps and loads_by_tma(dys, ws), t.columns, t.depth
    # dy ⊙ gain is float32 there, as ps are
    factors = ps if x.dtype is torch.float16 and gains else ws
    bm, warps, stages, registers = sound_tile(x, factors, m, t, two_sums, changed=gains, mapped=by_maps)
    args |= {
        "dx": dx, **tensor_maps("map_d", dys if by_maps else (), bm, bn), **tensor_maps("map_w", ws if by_maps else (), bn, bk),
        "DROP_BASES": tuple(int(layer.drop_base) for layer in layers), "PRECISION": precision(x), "BM": bm, "BN": bn, "BK": bk,
        "BR": t.ranks, "RANK_STAGES": rank_stages(x, precision(x), bm, warps),
        **_tile_order(x, bm, bk, sum(ns), ceil_div(k, bk)),
    }  # fmt: skip
    grid = (ceil_div(m, bm) * ceil_div(k, bk) + blocks,)
    made = [dx, *sums.outputs()]
    launch_triton(input_gradient_kernel, grid, args, made, warps=warps, stages=stages, registers=registers)
