"""The formula in plain PyTorch."""

import math

import torch

from lora_kernels.ops.registry import implements


@implements("gated_activation_forward", "reference")
def forward(call):
    gate, up, v, _ = _parts(call)
    return (gate * torch.sigmoid(v) * up).to(call.x.dtype)


@implements("gated_activation_backward", "reference")
def backward(call):
    gate, up, v, dv = _parts(call)
    dy, s = call.dy.to(gate.dtype), torch.sigmoid(v)
    dgate = dy * up * (s + gate * s * torch.sigmoid(-v) * dv)  # 1 - s would cancel
    return torch.cat([dgate, dy * gate * s], -1).to(call.x.dtype)


def _parts(call):
    """gate, up, v and v'."""
    gate, up = call.x.to(torch.promote_types(call.x.dtype, torch.float32)).chunk(2, -1)
    if not call.tanh:
        return gate, up, gate, 1
    root = math.sqrt(8 / math.pi)
    return gate, up, root * (gate + 0.044715 * gate**3), root * (1 + 3 * 0.044715 * gate**2)
