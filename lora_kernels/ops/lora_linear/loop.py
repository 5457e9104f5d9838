"""The group as a loop over the single formula, for the backends whose kernels take one member at a time."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def drops_base(drop_base: bool, gain: Tensor | None, dropout: float) -> bool:
    """Whether this member's dropout also acts on the input of its rescaled base."""
    return drop_base and gain is not None and dropout > 0


def keeps_z(bias: Tensor | None, gain: Tensor | None, drop_base: bool) -> bool:
    """Whether gain's gradient needs z: y does not give it back once a bias is added (cancellation) or the base dropped."""
    return gain is not None and (bias is not None or drop_base)


def refuse_each(refusal: Callable[..., str | None], *args: Any) -> str | None:
    """What the refusal of the single op says of the first member that it refuses."""
    x, *lists = args[:7]
    for i, member in enumerate(zip(*lists, strict=True)):
        reason = refusal(x, *member)
        if reason is not None:
            return f"member {i}: {reason}"
    return None


def forward_each(forward, x, w, a, b, scale, bias, gain, dropout, seed, drop_base, keep, keep_z):
    """`forward` is the single op's."""
    results = []
    for *member, g, p, s in zip(w, a, b, scale, bias, gain, dropout, seed, strict=True):
        drop = drops_base(drop_base, g, p)
        results.append(forward(x, *member, g, p, s, drop, keep, keep_z and keeps_z(member[-1], g, drop)))
    return tuple(map(list, zip(*results, strict=True)))


def backward_each(gradients, x, dy, w, a, b, scale, bias, gain, dropout, seed, drop_base, h, y, z, needs):
    """`gradients` is the single op's backward that leaves dx in the dtype of the sums: it is rounded once, here."""
    dx, others = None, []
    for i, (d, *member, g, p, s) in enumerate(zip(dy, w, a, b, scale, bias, gain, dropout, seed, strict=True)):
        own = [needs[0], *needs[1 + 4 * i : 5 + 4 * i]]
        wide, *rest = gradients(d, x, *member, g, p, s, drops_base(drop_base, g, p), h[i], y[i], z[i], own)
        others.append(rest)
        if needs[0]:
            dx = wide if dx is None else dx.add_(wide)
    return (dx.to(x.dtype) if needs[0] else None, *map(list, zip(*others, strict=True)))
