"""CPU: a gain whose dropout acts on the input of the rescaled base, too. With x̃ = drop(x) and
h = scale · x̃ Aᵀ

    y  = gain ⊙ (x̃ Wᵀ + h Bᵀ) + (x − x̃) Wᵀ + bias
    dx = dy W + mask ⊙ ((dy ⊙ (gain − 1)) W + p A),      p = scale · (dy ⊙ gain) B

need two products with W. In float32 both are one, of twice the rows, so that W is read once.

In bf16 on AMX tiles or by vdpbf16ps x̃ has 1/(1 − p) of what is kept, which bf16 rounds. So the
products are of x itself and of u, x where it is kept, which are exact, and y is their sum:

    z = (u Wᵀ + (1 − p) h Bᵀ) / (1 − p),      y = x Wᵀ + h Bᵀ + bias + (gain − 1) ⊙ z
"""

import torch

from lora_kernels import _cpu
from lora_kernels.ops.cpu_gemm import back_product, base_product_slices, choice, no_adapter
from lora_kernels.ops.cpu_tensors import add_adapter, dropout_args, row_major, transposed
from lora_kernels.ops.dropout import inverse_keep_rate


def forward(call):
    """(y, h if kept, z if kept) of a `Forward`; x and w bf16, w by rows or packed."""
    x, w, gain, threads = row_major(call.x), call.w, call.gain.float(), torch.get_num_threads()
    drop, over = dropout_args(call.dropout, call.seed), inverse_keep_rate(call.dropout, call.seed)
    sums, of_kept = (x.new_empty(len(x), w.shape[0], dtype=torch.float32) for _ in range(2))
    h = x.new_empty(len(x), len(call.a), dtype=torch.float32)
    # of what is kept, h is (1 - p) of that of x̃
    _cpu.tiles(_kept(x, h, drop), w, call.a, call.b, of_kept, None, None, None, h, call.scale, None, False, threads)
    h *= over
    _cpu.tiles(x, w, None, call.b, sums, None, call.bias, None, h, 1.0, None, False, threads)
    sums.addcmul_(of_kept, (gain - 1) * over)
    z = of_kept.mul_(over).to(x.dtype) if call.keep_z else None
    return sums.to(x.dtype), h if call.keep_h else None, z


def wide_forward(call):
    """The same by products in float32, whatever the dtypes; x̃ and x − x̃ are the rows of one."""
    x, w, gain, tokens = row_major(call.x), call.w, call.gain.float(), len(call.x)
    drop = dropout_args(call.dropout, call.seed)
    h = x.new_empty(tokens, len(call.a), dtype=torch.float32)
    _cpu.shrink(x, call.a, None, h, call.scale, drop, torch.get_num_threads())
    y, wide = x.new_empty(tokens, w.shape[0]), x.float()
    z = torch.empty_like(y) if call.keep_z else None
    both = wide.new_empty(2 * tokens, x.shape[1])
    add_adapter(wide, both[:tokens], None, h, mask=drop, mask_from=True)
    torch.sub(wide, both[:tokens], out=both[tokens:])
    # float32 between the passes, so that y is rounded once
    for rows, products in base_product_slices(both, w):
        of_dropped, rest = products[:tokens], products[tokens:]
        add_adapter(of_dropped, of_dropped, transposed(call.b[rows]), h)
        if z is not None:
            z[:, rows] = of_dropped
        if call.bias is not None:
            rest += call.bias[rows]
        y[:, rows] = rest.addcmul_(of_dropped, gain[rows])
    return y, h if call.keep_h else None, z


def wide_input_gradient(call, dy, drop, p, dtype):
    """dx of a `Backward` by products in float32, with p [tokens, r]."""
    tokens, wide = len(dy), dy.float()
    both = wide.new_empty(2 * tokens, dy.shape[1])
    torch.mul(wide, call.gain.float() - 1, out=both[:tokens])
    both[tokens:] = wide
    products = _times_w(both, call.w)
    add_adapter(products[:tokens], products[:tokens], call.a, p, mask=drop, mask_from=True)
    return torch.add(products[:tokens], products[tokens:], out=wide.new_empty(tokens, products.shape[1], dtype=dtype))


def _times_w(rows, w):
    """rows W in float32; few of them by the kernel of a layer's backward, which streams W once."""
    (n_out, n_in), few = w.shape, len(rows) <= choice(w.dtype).small_back
    if few and w.dtype is torch.float32:
        out, (a, b) = rows.new_empty(len(rows), n_in), no_adapter(n_out, n_in, w.dtype)
        if _cpu.backward_small(rows, out, w, a, b, None, None, out, None, None, 1.0, None, torch.get_num_threads()):
            return out
    return back_product(rows, w)


def _kept(x, h, drop):
    """x where it is kept, else zero."""
    kept, (seed, least, _) = torch.empty_like(x, memory_format=torch.contiguous_format), drop
    add_adapter(x, kept, None, h, mask=(seed, least, 1.0), mask_from=True)
    return kept


def input_gradient(call, dy, drop, p, dtype):
    """dx of a `Backward` with p [tokens, r]. dy ⊙ (gain − 1) is rounded before its product with W
    where that is less than gain, as trained ones are; else it enters as three bf16 numbers."""
    w, a, gain, threads = call.w, transposed(call.a), call.gain.float() - 1, torch.get_num_threads()
    of_base, rescaled = (dy.new_empty(call.x.shape, dtype=torch.float32) for _ in range(2))
    _cpu.tiles(dy, w, None, None, of_base, None, None, None, None, 1.0, None, True, threads)
    if bool((gain >= -0.5).all()):
        _cpu.tiles(dy, w, None, a, rescaled, None, None, gain, p, 1.0, None, True, threads)
    else:
        _cpu.tiles(dy * gain, w, None, a, rescaled, None, None, None, p, 1.0, None, True, threads)
    add_adapter(rescaled, rescaled, None, p, mask=drop, mask_from=True)
    return torch.add(of_base, rescaled, out=of_base.new_empty(of_base.shape, dtype=dtype))
