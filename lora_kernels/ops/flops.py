"""What torch.utils.flop_counter counts for our ops: the products, as of any GEMM 2·m·n·k."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lora_kernels.ops.expert_lora_linear import call as experts
from lora_kernels.ops.lora_linear.call import Backward, Forward, GroupBackward, GroupForward
from lora_kernels.ops.weight_norm.op import Norm


def tell_counters() -> None:
    """Gives every FlopCounterMode that is open these formulas; one of the user's stays."""
    modes: list[Any] = _get_current_dispatch_mode_stack()
    for mode in modes:
        if type(mode).__name__ == "_FlopCounterMode":
            for name, formula in _FORMULAS.items():
                mode.counter.flop_registry.setdefault(getattr(torch.ops.lora_kernels, name), formula)


def _forward(call: Forward) -> int:
    (m, k), (n, r) = call.x.shape, call.b.shape
    return 2 * m * n * k * (2 if call.drop_base else 1) + 2 * m * r * (n + k)


def _backward(call: Backward) -> int:
    (m, k), (n, r) = call.x.shape, call.b.shape
    x, a, b, *_ = call.needs
    flops = 2 * m * n * r * bool(x or a)  # dy B
    flops += (2 * m * n * k * (2 if call.drop_base else 1) + 2 * m * r * k) * bool(x)
    return flops + 2 * m * r * k * bool(a) + 2 * m * n * r * bool(b)


def _experts_forward(call: experts.Forward) -> int:
    m, k, n, r = call.tokens, call.x.shape[1], call.n_out, 0 if call.b is None else call.b.shape[2]
    return 2 * m * n * k + 2 * m * r * (n + k)


def _experts_backward(call: experts.Backward) -> int:
    (m, n), k, r = call.dy.shape, call.x.shape[1], 0 if call.b is None else call.b.shape[2]
    x, a, b, *_ = call.needs
    flops = 2 * m * n * r * bool(x or a) + 2 * m * k * (n + r) * bool(x)
    return flops + 2 * m * r * k * bool(a) + 2 * m * n * r * bool(b)


def _norm(call: Norm) -> int:
    (n, r), k = call.b.shape, call.a.shape[1]  # not of w, which may be codes
    return 2 * r * (n * k + r * k + n * r)


def _counted(structure: Callable[..., Any], flops: Callable[[Any], int]) -> Callable[..., int]:
    return lambda *args, out_val=None, **kwargs: flops(structure(*args, **kwargs))


_FORMULAS = {
    "lora_linear_forward": _counted(Forward, _forward),
    "lora_linear_backward": _counted(Backward, _backward),
    "lora_linear_group_forward": _counted(GroupForward, lambda call: sum(map(_forward, call.members()))),
    "lora_linear_group_backward": _counted(GroupBackward, lambda call: sum(map(_backward, call.members()))),
    "expert_lora_linear_forward": _counted(experts.Forward, _experts_forward),
    "expert_lora_linear_backward": _counted(experts.Backward, _experts_backward),
    "weight_norm_forward": _counted(Norm, _norm),
}
