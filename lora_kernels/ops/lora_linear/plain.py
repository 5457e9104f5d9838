"""A call of few tokens on the CPU without gradients, as each step of eager decoding has it. Between
its checks and the kernel there are no structures and no views: they cost as much as a small layer.

The choices are those of `op.py`, the registry and `cpu.py`: what is not plainly theirs goes there.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels import _cpu
from lora_kernels.ops.cpu_gemm import choice
from lora_kernels.ops.cpu_tensors import PLAIN
from lora_kernels.ops.quantised.weight import QuantisedWeight
from lora_kernels.ops.refusals import READ
from lora_kernels.ops.registry import is_watched

_any_autocast = torch._C._is_any_autocast_enabled
_forward = _cpu.forward_plain


def plain_forward(
    x: Tensor,
    w: Tensor | QuantisedWeight,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
) -> Tensor | None:
    """`lora_linear` without dropout, or None where the call is not one of these; then nothing was
    checked."""
    grad = torch.is_grad_enabled()
    if grad and type(a) in PLAIN and a.requires_grad:  # as in training: nothing more is asked
        return None
    if type(x) not in PLAIN or x.dtype not in READ or _any_autocast() or forward_ad._current_level >= 0 or is_watched():
        return None
    row = choice(x.dtype)
    most = row.small
    if type(w) is QuantisedWeight:
        w, most = w.packed(), max(most, row.small_codes)
    return _forward(x, w, a, b, scale, bias, gain, most, torch.get_num_threads(), grad)
