"""lora_linear for many tokens: the library's GEMM, with a thin kernel of the backend before or
after it ("addmm").

The adapter's term is written first and the GEMM adds to it in its own epilogue (beta = 1), so y is
not read once more. With a gain a pass over y follows the GEMM. A dropped base (PEFT's DoRA with
dropout) takes two GEMMs, as its formula does:

    forward    no gain       y = h Bᵀ + bias;  y += x Wᵀ
               gain          y = x Wᵀ;  y = gain ⊙ (y + h Bᵀ) + bias
               dropped base  z = drop(x) Wᵀ;  y = gain ⊙ (z + h Bᵀ) - z + bias;  y += x Wᵀ
    backward   dx = Σ drop(P A);  dx += (dy ⊙ gain) W of each layer
               dropped base  t = (dy ⊙ (gain - 1)) W;  dx = Σ drop(t + P A);  dx += dy W

What is between two steps has the dtype of x, so an adapter's term is rounded before it is added, as
PEFT's is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """One summand of `expand`: inverse · mask ⊙ (gain ⊙ (z + h bᵀ) - less · z), without what is
    None."""

    h: Tensor
    """[parts, m, r], float32, whose parts are added up."""
    b: Tensor
    """[n, r], any strides."""
    z: Tensor | None = None
    """[m, n], in the dtype of what is made; it may be that."""
    gain: Tensor | None = None
    drop: tuple[float, Tensor | None] = (0.0, None)
    """The probability and the seed of the mask; inverse = 1 / (1 - probability)."""


Expand = Callable[..., None]
"""expand(out, terms, *, less=0, bias=None, z_out=None): out [m, n] = Σ terms + bias, and z_out = z
+ h bᵀ of the only term. z, out and z_out may be one tensor."""


def forward(
    expand: Expand, x: Tensor, dropped: Sequence[Tensor | None], layers: Sequence[Any], hs: Sequence[Tensor],
    ys: Sequence[Tensor], zs: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Fills the y, and the z that are wanted, of layers that share x. `dropped`: of each layer
    whose base is dropped, x where its mask keeps it, without the factor."""
    for layer, dropped_x, h, y, z in zip(layers, dropped, hs, ys, zs, strict=True):
        if dropped_x is not None:
            base = torch.empty_like(y) if z is None else z
            torch.addmm(base, dropped_x, layer.w.T, beta=0, alpha=1.0 / (1.0 - layer.dropout), out=base)
            expand(y, [Term(h, layer.b, base, layer.gain)], less=1, bias=layer.bias, z_out=z)
            y.addmm_(x, layer.w.T)
        elif layer.gain is not None:
            torch.mm(x, layer.w.T, out=y)
            expand(y, [Term(h, layer.b, y, layer.gain)], bias=layer.bias, z_out=z)
        else:
            expand(y, [Term(h, layer.b)], bias=layer.bias)
            y.addmm_(x, layer.w.T)


def input_gradient(
    expand: Expand, dys: Sequence[Tensor], scaled: Sequence[Tensor | None], layers: Sequence[Any], ps: Sequence[Tensor],
    dx: Tensor,
) -> None:  # fmt: skip
    """Fills dx. `scaled`: of each layer with a gain dy ⊙ gain or, where the base is dropped, dy ⊙
    (gain - 1)."""
    terms = []
    for layer, own, p in zip(layers, scaled, ps, strict=True):
        z = torch.mm(own, layer.w) if layer.drop_base and own is not None else None
        terms.append(Term(p, layer.a.T, z, drop=layer.drop))
    expand(dx, terms)
    # the widest last: what is there before a GEMM was rounded at its own size, which so stays small
    for layer, dy, own in sorted(zip(layers, dys, scaled, strict=True), key=lambda one: len(one[0].w)):
        dx.addmm_(dy if layer.drop_base or own is None else own, layer.w)
