"""LoRA and DoRA in plain PyTorch, as well as it can be done there: what ours must not lose to."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Addmm(torch.autograd.Function):
    """y = x Wᵀ + s·drop(x) Aᵀ Bᵀ: the adapter first, and the library adds it in its own epilogue
    (beta 1); dx alike."""

    @staticmethod
    def forward(ctx, x, w, a, b, scale, p):
        d, mask = torch.native_dropout(x, p, True) if p else (x, None)
        h = (d @ a.T).mul_(scale)
        y = h @ b.T
        torch.addmm(y, x, w.T, out=y)
        ctx.save_for_backward(d, w, a, b, h, mask)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    def backward(ctx, dy):
        d, w, a, b, h, mask = ctx.saved_tensors
        g = (dy @ b).mul_(ctx.scale)
        dx = g @ a
        if mask is not None:
            dx = torch.ops.aten.native_dropout_backward(dx, mask, 1 / (1 - ctx.p))
        torch.addmm(dx, dy, w, out=dx)
        return dx, None, g.T @ d, dy.T @ h, None, None


def lora_by_addmm(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None, p: float) -> Tensor:
    """By `Addmm`. DoRA with dropout is PEFT's: y = (x - d) Wᵀ + g ⊙ (d Wᵀ + s·d Aᵀ Bᵀ), two
    products with W."""
    if magnitude is None:
        return Addmm.apply(x, w, a, b, scale, p)
    g = dora_gain(w, a, b, scale, magnitude)
    if not p:
        return g * Addmm.apply(x, w, a, b, scale, 0.0)
    d = F.dropout(x, p)
    return (x - d) @ w.T + g * Addmm.apply(d, w, a, b, scale, 0.0)


def lora_as_written(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None, p: float) -> Tensor:
    """As one would write it, for torch.compile."""
    d = F.dropout(x, p) if p else x
    added = scale * ((d @ a.T) @ b.T)
    if magnitude is None:
        return x @ w.T + added
    g = dora_gain(w, a, b, scale, magnitude)
    base = x @ w.T
    return base + (g - 1) * (d @ w.T if p else base) + g * added


def dora_gain(w: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """m / ‖W + s·B A‖, the norm without a gradient, as PEFT has it."""
    norm = torch.linalg.vector_norm(w + scale * (b.detach() @ a.detach()), dim=1)
    return (magnitude / norm).to(w.dtype)
