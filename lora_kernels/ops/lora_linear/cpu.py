"""CPU: for few tokens one C++ kernel that streams W once; above, a product between thin C++ passes
in place. Which product runs how many tokens stands in `ops/tables/cpu.py`.

The vendor's 16-bit GEMM rounds the adapter's term, or its own result before that is added, which
costs up to 1.4 times the error of one rounding; without native support it is up to 100 times
slower, and with AMX a NaN can reach other rows. So 16-bit products are ours, of bf16 on AMX tiles
or by vdpbf16ps where there are these, and their sums float32, y rounded once; but where the table
says `addmm_from`.
"""

from functools import partial

import torch

from lora_kernels import _cpu
from lora_kernels.ops.cpu_amx import on_tiles, product_back
from lora_kernels.ops.cpu_gemm import back_product, base_product, base_product_slices, choice, outer_on_tiles
from lora_kernels.ops.cpu_quantised import Packed, refuse_codes, weight_of
from lora_kernels.ops.cpu_tensors import add_adapter, dropout_args, row_major, transposed
from lora_kernels.ops.gradients import empty_gradient, gradient_dtype
from lora_kernels.ops.lora_linear import cpu_dropped_base, library
from lora_kernels.ops.lora_linear.call import Forward, Needs
from lora_kernels.ops.lora_linear.layer import Layer
from lora_kernels.ops.lora_linear.loop import backward_each, forward_each, refuse_each
from lora_kernels.ops.refusals import READ, refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements

# elements of W, from which the library's 16-bit GEMM is worth its calls; in sums of few numbers the
# adapter's term, which is rounded before, may cancel with the base's
LEAST = 2**16
LEAST_ROUNDED = 64  # tokens: of fewer numbers the sum in float32 is cheap


def refusal(call):
    x, w, a, b, bias, gain = call.x, call.w, call.a, call.b, call.bias, call.gain
    if call.layout:
        refused = refuse_codes(w, call.parts, call.layout)
        if refused:
            return refused
        w = x  # of which the same is asked
    readable = (
        x.dtype in READ
        and w.dtype in READ
        and a.dtype in READ
        and b.dtype in READ
        and (bias is None or bias.dtype in READ)
        and (gain is None or gain.dtype in READ)
    )
    negated = (
        x.is_neg()
        or w.is_neg()
        or a.is_neg()
        or b.is_neg()
        or (bias is not None and bias.is_neg())
        or (gain is not None and gain.is_neg())
    )
    if readable and not negated:
        return None
    tensors = {"x": x, "w": w, "a": a, "b": b, "bias": bias, "gain": gain}
    return refuse_negated(**tensors) if readable else refuse_dtypes(**tensors)


def backward_refusal(call):
    return refusal(call) or refuse_negated(dy=call.dy)


@implements("lora_linear_forward", "cpu", refusal)
def forward(call):
    return _forward(_packed(call) if call.layout else call)


def _packed(call):
    """The same call with a w that the kernels read."""
    return call._replace(w=weight_of(call), parts=None, layout=None)


def _forward(call):
    x, w = call.x, call.w
    tokens = x.shape[0]
    if tokens and call.drop_base and w.numel():
        return (cpu_dropped_base.forward if on_tiles(x, w) else cpu_dropped_base.wide_forward)(call)
    if tokens and not call.drop_base and w.numel():
        row = choice(x.dtype)
        if tokens <= row.small or (tokens <= row.small_codes and isinstance(w, Packed)):
            done = _forward_small(call)
            if done is not None:
                return done
        elif on_tiles(x, w):
            return _forward_tiles(call)
        elif tokens >= row.addmm_from and call.gain is None and w.numel() >= LEAST and not isinstance(w, Packed):
            return _forward_library(call)
        if tokens <= row.thin and _may_be_thin(call):
            return _forward_thin(call)
    return _forward_large(call)


def _forward_small(call):
    """None if W is not by rows."""
    x, w, a = call.x, call.w, call.a
    tokens = x.shape[0]
    y = x.new_empty(tokens, w.shape[0])
    h = x.new_empty(tokens, a.shape[0], dtype=torch.float32) if call.keep_h else None
    z = torch.empty_like(y) if call.keep_z else None
    drop, threads = dropout_args(call.dropout, call.seed), torch.get_num_threads()
    # the kernel looks at the strides: here that would take as long as a small layer
    if _cpu.forward_small(x, w, a, call.b, y, z, call.bias, call.gain, h, call.scale, drop, threads):
        return y, h, z
    if x.is_contiguous() and a.is_contiguous():
        return None
    return _forward_small(call._replace(x=x.contiguous(), a=a.contiguous()))


def _forward_tiles(call):
    w, a, scale, threads = call.w, call.a, call.scale, torch.get_num_threads()
    x, drop = row_major(call.x), dropout_args(call.dropout, call.seed)
    h = x.new_empty(x.shape[0], a.shape[0], dtype=torch.float32)
    if drop is not None:
        _cpu.shrink(x, a, None, h, scale, drop, threads)
    y = x.new_empty(x.shape[0], w.shape[0])
    z = torch.empty_like(y) if call.keep_z else None
    in_place = a if drop is None else None
    _cpu.tiles(x, w, in_place, call.b, y, z, call.bias, call.gain, h, scale, None, False, threads)
    return y, h if call.keep_h else None, z


def _forward_library(call):
    layer, x, threads = Layer(call), row_major(call.x), torch.get_num_threads()
    h = x.new_empty(x.shape[0], layer.r, dtype=torch.float32)
    _cpu.shrink(x, layer.a, None, h, layer.scale, dropout_args(layer.dropout, call.seed), threads)
    y = x.new_empty(x.shape[0], layer.n)
    library.forward(_expand, x, [None], [layer], [h], [y], [None])
    return y, h if call.keep_h else None, None


def _expand(out, terms, *, less=0, bias=None, z_out=None):
    """`library.Expand` of one term without a gain."""
    (term,) = terms
    add_adapter(term.z, out, transposed(term.b), term.h, bias=bias, mask=dropout_args(*term.drop))


def _may_be_thin(call):
    """Whether the library's small products with A and B are as exact as ours: nothing is in 16
    bits, and nothing dropped. Their bits may follow the threads, and a row's the number of rows."""
    if call.seed is not None or torch.are_deterministic_algorithms_enabled():
        return False
    return call.x.dtype is call.w.dtype is call.a.dtype is call.b.dtype is torch.float32


def _forward_thin(call):
    """In float32, the products with A and B by the library, too."""
    x, gain, bias = row_major(call.x), call.gain, call.bias
    h = torch.mm(x, call.a.T).mul_(call.scale)
    y, z = base_product(x, call.w).addmm_(h, call.b.T), None
    if gain is not None or bias is not None:
        y, z = torch.empty_like(y) if call.keep_z else y, y
        add_adapter(z, y, None, h, gain=gain, bias=bias)
    elif call.keep_z:
        z = y.clone()
    return y, h if call.keep_h else None, z if call.keep_z else None


def _forward_large(call):
    w, a, b, bias, gain, keep_z = call.w, call.a, call.b, call.bias, call.gain, call.keep_z
    x, drop = row_major(call.x), dropout_args(call.dropout, call.seed)
    tokens, n_out = x.shape[0], w.shape[0]
    h = x.new_empty(tokens, a.shape[0], dtype=torch.float32)
    if w.numel() == 0 or tokens == 0:
        y = x.new_zeros(tokens, n_out)
        if bias is not None:
            y += bias.to(x.dtype)
        return y, h.zero_() if call.keep_h else None, torch.zeros_like(y) if keep_z else None
    _cpu.shrink(x, a, None, h, call.scale, drop, torch.get_num_threads())
    if x.dtype is torch.float32:
        # in place: a second buffer of y's size costs more in page faults than the passes themselves
        wide, rows = base_product(x, w), transposed(b)
        y, z = wide, None
        if keep_z:
            add_adapter(wide, wide, rows, h)
            y, z, rows = torch.empty_like(wide), wide, None
        add_adapter(wide, y, rows, h, gain=gain, bias=bias)
        return y, h if call.keep_h else None, z
    y, z = x.new_empty(tokens, n_out), x.new_empty(tokens, n_out if keep_z else 0)
    # float32 between the passes where there is more than one, so that y is rounded once
    for rows, wide in base_product_slices(x, w):
        slice_b, slice_gain, slice_bias = b[rows], _rows_or_none(gain, rows), _rows_or_none(bias, rows)
        target = y[:, rows]
        if not keep_z:
            add_adapter(wide, target, transposed(slice_b), h, gain=slice_gain, bias=slice_bias)
            continue
        add_adapter(wide, wide, transposed(slice_b), h)
        z[:, rows].copy_(wide)
        add_adapter(wide, target, None, h, gain=slice_gain, bias=slice_bias)
    return y, h if call.keep_h else None, z if keep_z else None


@implements("lora_linear_backward", "cpu", backward_refusal)
def backward(call):
    return _gradients(call.x.dtype, call)


def _gradients(dx_dtype, call):
    return _gradients_of(dx_dtype, _packed(call) if call.layout else call)


def _gradients_of(dx_dtype, call):
    """dx in dx_dtype, float32 or that of x."""
    w, a, b, bias, gain, scale, h = call.w, call.a, call.b, call.bias, call.gain, call.scale, call.h
    dy, x, drop, needs = row_major(call.dy), row_major(call.x), dropout_args(call.dropout, call.seed), Needs(*call.needs)
    tokens, rank = x.shape[0], a.shape[0]
    threads = torch.get_num_threads()
    dx = da = db = dbias = dgain = None
    if w.numel() == 0 or tokens == 0:
        of = zip((x, a, b, bias, gain), needs, strict=True)
        zeros = [t.new_zeros(t.shape, dtype=gradient_dtype(t, need)) if need else None for t, need in of]
        if needs.x:
            zeros[0] = zeros[0].to(dx_dtype)
        if needs.bias:
            zeros[3] += dy.sum(0, dtype=torch.float32)
        return tuple(zeros)
    row = choice(x.dtype)
    small = None
    if tokens <= row.small_back and not call.drop_base:
        small = _small_gradients(dx_dtype, call, dy, x, drop, needs)
    if small is not None:
        dx, da, db = small
        needs = needs._replace(x=0, a=0, b=0)
    elif tokens <= row.thin and not call.drop_base and _may_be_thin(call):
        dx, da, db = _thin_gradients(call, dy, x, needs)
        needs = needs._replace(x=0, a=0, b=0)
    p = x.new_empty(tokens, rank, dtype=torch.float32) if needs.x or needs.a else None
    if needs.x and on_tiles(dy, w) and not call.drop_base:
        dx = x.new_empty(x.shape, dtype=dx_dtype)
        _cpu.tiles(dy, w, transposed(b), transposed(a), dx, None, None, gain, p, scale, drop, True, threads)
    elif p is not None:
        _cpu.shrink(dy, transposed(b), gain, p, scale, None, threads)
        if needs.x and call.drop_base:
            by_tiles = on_tiles(dy, w)
            one = cpu_dropped_base.input_gradient if by_tiles else cpu_dropped_base.wide_input_gradient
            dx = one(call, dy, drop, p, dx_dtype)
        elif needs.x and _by_library(call, dy, dx_dtype):
            dx = torch.empty_like(x)
            library.input_gradient(_expand, [dy], [None], [Layer(call)], [p], dx)
        elif needs.x:
            dx = _input_gradient(dx_dtype, dy, w, a, gain, p, drop)
    if needs.a:
        da = empty_gradient(a, needs.a)
        if drop is None and (rows := _rows_on_tiles(p, x, da, 0)) is not None:
            product_back(rows, x, out=da)
        else:
            _cpu.outer(x, da, None, p, drop, threads)
    if needs.b:
        db = empty_gradient(b, needs.b)
        if gain is None and (rows := _rows_on_tiles(h, dy, db, row.outer)) is not None:
            db.copy_(product_back(rows, dy).T)
        else:
            _cpu.outer(dy, transposed(db), gain, h, None, threads)
    if needs.bias:
        dbias = _column_sums(dy, None).to(gradient_dtype(bias, needs.bias))
    if needs.gain:
        dgain = _gain_gradient(call, dy).to(gradient_dtype(gain, needs.gain))
    return dx, da, db, dbias, dgain


def _small_gradients(dx_dtype, call, dy, x, drop, needs):
    """dx, dA and dB, W read once; None if W is not by rows, or dy of another dtype."""
    w, a, b = call.w, call.a, call.b
    if not dy.dtype is x.dtype is w.dtype:
        return None
    dx = x.new_empty(x.shape, dtype=dx_dtype) if needs.x else None
    da = empty_gradient(a, needs.a) if needs.a else None
    db = empty_gradient(b, needs.b) if needs.b else None
    threads = torch.get_num_threads()
    if _cpu.backward_small(dy, x, w, a, b, call.gain, call.h, dx, da, db, call.scale, drop, threads):
        return dx, da, db
    return None


def _thin_gradients(call, dy, x, needs):
    """dx, dA and dB in float32, the products with A and B by the library."""
    dz = dy if call.gain is None else dy * call.gain.to(dy.dtype)
    dx = da = db = None
    if needs.x or needs.a:
        p = torch.mm(dz, call.b).mul_(call.scale)
    if needs.x:
        dx = back_product(dz, call.w).addmm_(p, call.a)
    if needs.a:
        da = torch.mm(p.T, x).to(gradient_dtype(call.a, needs.a))
    if needs.b:
        db = torch.mm(dz.T, call.h).to(gradient_dtype(call.b, needs.b))
    return dx, da, db


def _rows_on_tiles(p, x, d, above):
    """pᵀ as the product pᵀ x = d takes it on tiles, of more tokens than `above`; None where float32
    vectors are faster. They are beside vdpbf16ps, to which an exact p is three numbers, but for
    many ranks, and a d that is rounded itself."""
    if not on_tiles(x, x) or d.dtype is torch.float16:
        return None
    if outer_on_tiles(x.dtype):
        return p.T if len(x) > above else None
    narrow = p.shape[1] >= _cpu.many_ranks and d.dtype is x.dtype and len(x) > LEAST_ROUNDED
    return p.to(x.dtype).T if narrow else None


def _by_library(call, dy, dx_dtype):
    """Whether the table gives dx of these tokens to the library's 16-bit GEMM."""
    if dy.shape[0] < choice(dy.dtype).addmm_back_from or call.gain is not None or call.w.numel() < LEAST:
        return False
    if isinstance(call.w, Packed):
        return False
    return dx_dtype is dy.dtype is call.w.dtype


def group_refusal(call):
    return refuse_each(refusal, call)


def group_backward_refusal(call):
    negated = {f"dy of member {i}": each for i, each in enumerate(call.dy)}
    return group_refusal(call) or refuse_negated(**negated)


@implements("lora_linear_group_forward", "cpu", group_refusal)
def group_forward(call):
    return forward_each(forward, call)


@implements("lora_linear_group_backward", "cpu", group_backward_refusal)
def group_backward(call):
    # float32: summed over the members in 16 bits, dx would be rounded as often as there are members
    return backward_each(partial(_gradients, torch.float32), call)


def _input_gradient(dtype, dy, w, a, gain, p, drop):
    """(dy ⊙ gain) W + mask ⊙ (p A)."""
    product = back_product(dy if gain is None else dy * gain.to(torch.float32), w)
    dx = product if dtype is torch.float32 else torch.empty_like(product, dtype=dtype)
    add_adapter(product, dx, a, p, mask=drop)
    return dx


def _gain_gradient(call, dy):
    if call.z is not None:
        return _column_sums(dy, call.z)
    if bool((call.gain == 0).any()):
        without = Forward(
            call.x, call.w, call.a, call.b, call.scale, None, None, call.dropout, call.seed, False, False, False, call.w_scale
        )
        return _column_sums(dy, _forward(without)[0])
    return _column_sums(dy, call.y) / call.gain


def _column_sums(u, v):
    sums = u.new_empty(u.shape[1], dtype=torch.float32)
    v = None if v is None else row_major(v.to(u.dtype))
    _cpu.column_sums(u, v, sums, torch.get_num_threads())
    return sums


def _rows_or_none(vector, rows):
    return None if vector is None else vector[rows]
