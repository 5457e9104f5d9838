"""CPU: all experts of few tokens in one C++ call, whose threads share the work, each expert by the
kernels that `lora_linear` takes for so many tokens. An expert of more tokens than the table gives
to these kernels, and one that has all tokens, is one call of `lora_linear`'s; but of a quantised W
all are of the one call, whose kernels read codes where they would read numbers."""

import torch

from lora_kernels import _cpu
from lora_kernels.ops.cpu_amx import on_tiles
from lora_kernels.ops.cpu_gemm import choice, no_adapter, outer_on_tiles, streams_up_to
from lora_kernels.ops.cpu_quantised import Packed, expert_args, held, refuse_codes
from lora_kernels.ops.cpu_tensors import row_major, stack_args
from lora_kernels.ops.expert_lora_linear.call import segments_of, summed
from lora_kernels.ops.gradients import gradient_dtype
from lora_kernels.ops.lora_linear.call import Backward as LayerBackward
from lora_kernels.ops.lora_linear.call import Forward as LayerForward
from lora_kernels.ops.lora_linear.call import Needs
from lora_kernels.ops.lora_linear.op import _backward as layer_backward
from lora_kernels.ops.lora_linear.op import _forward as layer_forward
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements

FEW = 8  # tokens up to which W is streamed back, whatever the table of single layers says


def refusal(call):
    names = ("x", "a", "b", "bias", "gain") if call.layout else ("x", "w", "a", "b", "bias", "gain")
    if call.layout and (reason := refuse_codes(call.w, call.parts, call.layout)):
        return reason
    tensors = {name: getattr(call, name) for name in names}
    return refuse_dtypes(**tensors) or refuse_negated(**tensors)


def backward_refusal(call):
    return refusal(call) or refuse_negated(dy=call.dy)


@implements("expert_lora_linear_forward", "cpu", refusal)
def forward(call):
    x, tokens = row_major(call.x), call.tokens
    segments = segments_of(call.offsets, tokens)
    y = x.new_empty(tokens, call.n_out)
    h = x.new_empty(tokens, call.b.shape[2], dtype=torch.float32) if call.keep_h else None
    z = torch.empty_like(y) if call.keep_z else None
    _clear_rest(segments, y, h, z)
    w, transposed = _weight(call)
    _, few, many = _divided(segments, 0, _most(tokens, x, w, transposed), w)
    vectors = {"bias": call.bias, "gain": call.gain}
    _product(call, few, x, w, call.a, call.b, y, transposed, index=call.index, z=z, h=h, **vectors)
    for e, rows in many:
        layer = _layer(call, w, transposed, e)
        of_e = LayerForward(_rows(x, rows, call.index), *layer, 0.0, None, False, call.keep_h, call.keep_z)
        for whole, part in zip((y, h, z), layer_forward(of_e), strict=True):
            if whole is not None:
                whole[rows] = part
    return y, h, z


@implements("expert_lora_linear_backward", "cpu", backward_refusal)
def backward(call):
    x, dy, needs = row_major(call.x), row_major(call.dy), Needs(*call.needs)
    tokens, index = len(dy), call.index
    segments = segments_of(call.offsets, tokens)
    dx = x.new_empty(tokens, x.shape[1]) if needs.x else None
    p = x.new_empty(tokens, call.b.shape[2], dtype=torch.float32) if call.b is not None and (needs.x or needs.a) else None
    _clear_rest(segments, dx)
    w, transposed = _weight(call)
    small_back = 0 if transposed or call.b is None or dy.dtype is not x.dtype else choice(x.dtype).small_back
    small, few, many = _divided(segments, small_back, _most(tokens, dy, w, not transposed), w)
    da, db = (_gradient(t, need, segments) for t, need in ((call.a, needs.a), (call.b, needs.b)))
    experts = len(call.offsets)
    sums = x.new_zeros if len(segments) < experts else x.new_empty
    dbias, dgain = (sums(experts, dy.shape[1], dtype=torch.float32) if need else None for need in (needs.bias, needs.gain))
    v, by_y = call.z, False
    if needs.gain and v is None:
        by_y = not bool((call.gain == 0).any())  # then y is gain ⊙ z
        v = call.y if by_y else forward(call.products())[0]
    if needs.x or needs.a:
        a, b = (None, None) if call.b is None else (call.b.mT, call.a.mT)
        _product(call, few, dy, w, a, b, dx, not transposed, scaled=call.gain, h=p)
    if small and (needs.x or needs.a or needs.b):
        factors, makes = [stack_args(t) for t in (call.a, call.b, call.gain)], [stack_args(t) for t in (da, db)]
        factors, threads = [expert_args(w, experts), *factors], torch.get_num_threads()
        _cpu.expert_backward_small(dy, x, index, *factors, call.h, dx, *makes, call.scale, small, threads)
    if (few and any(needs[1:])) or needs.bias or needs.gain:
        v = row_major(v.to(dy.dtype)) if needs.gain else None
        # of those few tokens the sums alone
        _gradients(call, few, x, dy, v, p, da, db, dbias, dgain)
        _gradients(call, small, x, dy, v, None, None, None, dbias, dgain)
        if by_y:
            # the gain of an expert without tokens may be anything
            some = slice(None) if len(segments) == experts else [e for e, *_ in segments]
            dgain[some] /= call.gain[some]
    for e, rows in many:
        h, y, z = (None if t is None else t[rows] for t in (call.h, call.y, call.z))
        layer = _layer(call, w, transposed, e)
        of_e = LayerBackward(dy[rows], _rows(x, rows, index), *layer, 0.0, None, False, h, y, z, call.needs)
        places = [None if dx is None else dx[rows], *(None if t is None else t[e] for t in (da, db, dbias, dgain))]
        for whole, part in zip(places, layer_backward(of_e), strict=True):
            if whole is not None:
                whole.copy_(part)
    return summed(dx, call), da, db, _as(dbias, call.bias, needs.bias), _as(dgain, call.gain, needs.gain)


def _product(call, few, x, w, a, b, y, back, *, index=None, z=None, bias=None, gain=None, scaled=None, h=None):
    if few:
        factors = expert_args(w, len(call.offsets)), stack_args(a), stack_args(b)
        vectors = (stack_args(t) for t in (bias, gain, scaled))
        small, threads = streams_up_to(x, w), torch.get_num_threads()
        _cpu.expert_product(x, index, *factors, y, z, *vectors, h, call.scale, back, small, few, threads)


def _gradients(call, segments, x, dy, v, p, da, db, dbias, dgain):
    if not segments or all(t is None for t in (da, db, dbias, dgain)):
        return
    read = v, None if da is None else p, None if db is None else call.h
    makes = [stack_args(t) for t in (call.gain, da, db)]
    tiles, threads = outer_on_tiles(x.dtype), torch.get_num_threads()
    _cpu.expert_gradients(x, call.index, dy, *read, *makes, dbias, dgain, tiles, segments, threads)


def _weight(call):
    """W as the kernels read it, and whether it is transposed, such that its rows are contiguous, if
    they can be."""
    if call.layout:
        w = held(Packed.of(call.w, call.parts, call.layout))
        experts, (rows, columns) = len(call.offsets), w.shape
        return w if w.numel() else call.x.new_empty(experts, rows // experts, columns), call.transposed
    w, turned = call.w, call.w.stride(2) != 1 and call.w.stride(1) == 1
    return w.mT if turned else w, call.transposed is not turned


def _divided(segments, small, most, w):
    """Those of up to `small` tokens and up to `most` for one C++ call each, their numbers one after
    another, and (expert, rows) of the others; one alone is among these, but of codes."""
    alone = len(segments) < 2 and not isinstance(w, Packed)
    small, most = (0, 0) if alone else (min(small, most), most)
    tokens = [last - first for _, first, last in segments]
    few = [number for segment, m in zip(segments, tokens, strict=True) if m <= small for number in segment]
    more = [number for segment, m in zip(segments, tokens, strict=True) if small < m <= most for number in segment]
    return few, more, [(e, slice(first, last)) for e, first, last in segments if last - first > most]


def _rows(x, tokens, index):
    """Those that a slice of the tokens are."""
    return x[tokens] if index is None else x.index_select(0, index[tokens])


def _most(tokens, x, w, back):
    """Tokens up to which no product of the library is faster, as `cpu_gemm` and `lora_linear` ask
    the table; of codes all that there are."""
    if isinstance(w, Packed):
        return tokens
    if w.stride(2) != 1 or not w.numel():
        return 0
    if on_tiles(x, w[0]):
        return tokens
    row = choice(x.dtype)
    if back:
        most, until = row.streamed if row.streamed_from <= FEW else 0, row.addmm_back_from
        return max(min(most, until - 1), FEW)
    most = row.packed if row.packed_from <= row.small + 1 else row.small
    return max(min(most, row.addmm_from - 1), row.small)


def _layer(call, w, transposed, e):
    """w, a, b, scale, bias and gain of one expert's layer."""
    w = w[e].T if transposed else w[e]
    bias, gain = (None if t is None else t[e] for t in (call.bias, call.gain))
    a, b = no_adapter(*w.shape, w.dtype) if call.a is None else (call.a[e], call.b[e])
    return w, a, b, call.scale, bias, gain


def _clear_rest(segments, *tensors):
    """Rows of no expert become zeros."""
    last = segments[-1][2] if segments else 0
    for t in tensors:
        if t is not None and last < len(t):
            t[last:].zero_()


def _gradient(t, need, segments):
    """Memory for that of t, which lies as t does; zeros where some experts have no tokens."""
    if not need:
        return None
    make = torch.zeros_like if len(segments) < len(t) else torch.empty_like
    return make(t, dtype=gradient_dtype(t, need))


def _as(sums, t, need):
    """Sums as the gradient of t."""
    if not need:
        return None
    dtype = gradient_dtype(t, need)
    return sums.to(dtype) if t.is_contiguous() else torch.empty_like(t, dtype=dtype).copy_(sums)
