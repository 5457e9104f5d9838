"""Triton: the layers of a call as the kernels of lora_linear take them, dense or as codes."""

import torch

from lora_kernels.ops.launch import ceil_div
from lora_kernels.ops.lora_linear.triton_backward import BackwardInput, BackwardLayer
from lora_kernels.ops.lora_linear.triton_forward import ForwardLayer
from lora_kernels.ops.triton_dropout import dropout_fields
from lora_kernels.ops.triton_skinny import strides


def tall(m):
    """The rows by which a GEMM's tile is chosen. A row's bits do not depend on m where one matrix
    instruction serves all m; sm_90 has another one for less than 64 rows, which is why the
    deterministic mode asks for no fewer."""
    return max(m, 64) if torch.are_deterministic_algorithms_enabled() else m


def field_of_each(layers, name):
    return tuple(getattr(layer, name) for layer in layers)


def forward_layer(layer, one_pass, h, y, z, whole, drop, of_codes=False):
    w, a, b = None if of_codes else layer.w, layer.a if one_pass else None, layer.b
    (w0, w1), (a0, a1), (b0, b1) = strides(w), strides(a), b.stride()
    return ForwardLayer(
        w=w, a=a, h=h, b=b, bias=layer.bias, gain=layer.gain, y=y, z=z, whole=whole, drop=dropout_fields(*drop),
        scale=float(layer.scale), n=layer.n, r=layer.r, w0=w0, w1=w1, a0=a0, a1=a1, b0=b0, b1=b1,
    )  # fmt: skip


def backward_layer(layer, dy, h, p, dgain, looks, makes_dx, of_codes=False):
    """`looks`: for gains of zero. `makes_dx`: the kernel makes dx, too."""
    w, (p, a) = layer.w, (p, layer.a) if makes_dx else (None, None)
    w = w if (makes_dx or looks) and not of_codes else None  # else it may be codes
    h, b, dgain = (h, layer.b, dgain) if looks else (None, None, None)
    (d0, d1), (w0, w1), (a0, a1), (b0, b1) = dy.stride(), strides(w), strides(a), strides(b)
    return BackwardLayer(
        dy=dy, w=w, gain=layer.gain, p=p, a=a, drop=dropout_fields(*layer.drop) if makes_dx else None, h=h, b=b, dgain=dgain,
        n=layer.n, r=layer.r, parts=None if p is None else len(p), d0=d0, d1=d1, w0=w0, w1=w1, a0=a0, a1=a1, b0=b0, b1=b1,
    )  # fmt: skip


def rest_blocks(layers, dgains, sums, columns):
    """The programs that add up, and that look for gains of zero in `columns` each."""
    looking = [ceil_div(layer.n, columns) for layer, d in zip(layers, dgains, strict=True) if d is not None]
    return sums.block_count() + sum(looking)


def backward_input(x, looks):
    return BackwardInput(x, x.shape[1], *x.stride()) if looks else BackwardInput(None, x.shape[1], None, None)
