"""What the C++ kernels are told of a tensor: its address, shape, strides and dtype."""

import torch
from torch import Tensor

from lora_kernels import _cpu
from lora_kernels.ops.dropout import threshold

_CPU, _FLOAT, _BFLOAT = 1, 2, 4  # DLPack's numbers


def describe(t: Tensor) -> tuple[int, ...]:
    """A vector or matrix as numbers: what DLPack's exchange function of torch tells, for a torch
    that has none."""
    code = _BFLOAT if t.dtype is torch.bfloat16 else _FLOAT if t.is_floating_point() else 0
    device = _CPU if t.device.type == "cpu" else 0
    sizes, strides = (*t.shape, 1, 1)[:2], (*t.stride(), 1, 1)[:2]
    return (t.data_ptr(), device, code, t.element_size() * 8, t.dim(), *sizes, *strides)


PLAIN = (Tensor, torch.nn.Parameter)
_cpu.read_tensors(getattr(Tensor, "__dlpack_c_exchange_api__", None), describe)
_cpu.plain_tensors(*PLAIN)
valid_lora_linear = _cpu.valid_lora_linear if _cpu.reads_fast() else None
fingerprint = _cpu.fingerprint
plain_call, plain_classes = _cpu.plain_call, _cpu.plain_classes


def transposed(t: Tensor) -> tuple[Tensor]:
    """A matrix that the kernels are to read as its transpose, without the cost of a view."""
    return (t,)


def stack_args(t: Tensor | None) -> tuple[Tensor, int, int] | None:
    """A tensor with a matrix or vector for each expert; the view keeps its memory, whatever another
    thread does to the tensor."""
    if t is None:
        return None
    t = t.detach()
    return t[0], t.stride(0), len(t)


def dropout_args(dropout: float, seed: Tensor | None) -> tuple[int, int, float] | None:
    """The dropout mask, or nothing: (seed, smallest kept word, multiplier)."""
    return None if seed is None or dropout <= 0 else (int(seed), threshold(dropout), 1.0 / (1.0 - dropout))


def row_major(t: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    if t.is_contiguous():  # the cheapest question
        return t
    return t if t.stride(1) == 1 and (t.shape[0] < 2 or t.stride(0) >= t.shape[1]) else t.contiguous()


def add_adapter(
    source: Tensor | None, target: Tensor, b: Tensor | tuple[Tensor] | None, h: Tensor, *, gain: Tensor | None = None,
    bias: Tensor | None = None, mask: tuple[int, int, float] | None = None, mask_from: bool = False,
) -> None:  # fmt: skip
    """target = gain ⊙ (source + mask ⊙ (h b)) + bias, b [rank, out]; with mask_from the mask is on
    both terms. source is float32, or of target's dtype, or None."""
    _cpu.expand(source, target, b, gain, bias, h, mask, mask_from, torch.get_num_threads())
