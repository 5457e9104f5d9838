"""The arguments of lora_linear's ops, built once in op.py and group.py and read by name in every
backend.

A field stands here and nowhere else: the schema that torch sees is made of these
(`registry.declare`), and so is what autograd says and wants of each argument. A new field has a
default, since calls from elsewhere are older.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """Which gradients are wanted, each a number of `ops.gradients`."""

    x: int
    a: int
    b: int
    bias: int
    gain: int


class Forward(NamedTuple):
    """One layer: y = gain ⊙ (x Wᵀ + scale · drop(x) Aᵀ Bᵀ) + bias, shapes as in `lora_linear`, x
    [tokens, in]."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None
    gain: Tensor | None
    dropout: float
    seed: Tensor | None
    """None where nothing is dropped, whatever `dropout` says."""
    drop_base: bool
    """Whether dropout acts on the input of the rescaled base, too."""
    keep_h: bool
    """Whether h = scale · drop(x) Aᵀ [tokens, r] is wanted, in float32."""
    keep_z: bool
    """Whether z = x Wᵀ + h Bᵀ [tokens, out] is wanted, for the gradient of gain."""
    w_scale: Tensor | None = None
    parts: list[Tensor] | None = None
    layout: list[int] | None = None
    """Where W is quantised; w, parts and layout are then `QuantisedWeight.fields()`."""


class Backward(NamedTuple):
    """Of `Forward`, with dy [tokens, out]; h, and y or z where gain wants its gradient."""

    dy: Tensor
    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None
    gain: Tensor | None
    dropout: float
    seed: Tensor | None
    drop_base: bool
    h: Tensor
    y: Tensor | None
    z: Tensor | None
    needs: list[int]
    """As `Needs`; of an op's schema it can be a list alone."""
    w_scale: Tensor | None = None
    parts: list[Tensor] | None = None
    layout: list[int] | None = None


class GroupForward(NamedTuple):
    """Layers that share x: of each field of `Forward` a number for each."""

    x: Tensor
    w: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    scale: list[float]
    bias: list[Tensor | None]
    gain: list[Tensor | None]
    dropout: list[float]
    seed: list[Tensor | None]
    drop_base: bool
    keep_h: bool
    keep_z: bool
    """z of those whose gain's gradient cannot do with y (`keeps_z`); the others' is None."""
    parts: list[Tensor] | None = None
    layouts: list[int] | None = None
    """Where some W is quantised: `side_by_side` of what `Forward` has for each."""

    def members(self) -> Iterator[Forward]:
        """Each layer as a call of its own."""
        x, *lists, drop_base, keep_h, keep_z, parts, layouts = self
        codes = one_by_one(parts, layouts, len(self.w))
        for (w, a, b, scale, bias, gain, dropout, seed), code in zip(zip(*lists, strict=True), codes, strict=True):
            drop = drops_base(drop_base, gain, dropout)
            keep = keep_z and keeps_z(bias, gain, drop)
            yield Forward(x, w, a, b, scale, bias, gain, dropout, seed, drop, keep_h, keep, None, *code)


class GroupBackward(NamedTuple):
    """Of `GroupForward`, with the dy of each."""

    x: Tensor
    dy: list[Tensor]
    w: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    scale: list[float]
    bias: list[Tensor | None]
    gain: list[Tensor | None]
    dropout: list[float]
    seed: list[Tensor | None]
    drop_base: bool
    h: list[Tensor]
    y: list[Tensor | None]
    z: list[Tensor | None]
    needs: list[int]
    """Of dx, then of da, db, dbias and dgain of each member."""
    parts: list[Tensor] | None = None
    layouts: list[int] | None = None

    def members(self) -> Iterator[Backward]:
        """Each layer as a call of its own; all of them want dx, if one does."""
        x, *lists, drop_base, h, y, z, needs, parts, layouts = self
        codes = one_by_one(parts, layouts, len(self.w))
        for i, (dy, w, a, b, scale, bias, gain, dropout, seed) in enumerate(zip(*lists, strict=True)):
            drop, own = drops_base(drop_base, gain, dropout), [needs[0], *needs[1 + 4 * i : 5 + 4 * i]]
            yield Backward(dy, x, w, a, b, scale, bias, gain, dropout, seed, drop, h[i], y[i], z[i], own, None, *codes[i])


Codes = tuple[list[Tensor] | None, list[int] | None]
"""`parts` and `layout` of a layer, (None, None) where its W is plain."""


def side_by_side(codes: Iterable[Codes]) -> Codes:
    """Those of several layers as two lists, for a schema has no lists of lists: before each layout
    the number of its parts and its own length."""
    every: list[Tensor] = []
    numbers: list[int] = []
    some = False
    for parts, layout in codes:
        if layout is None:
            numbers += [0, 0]
        else:
            assert parts is not None
            some, every, numbers = True, [*every, *parts], [*numbers, len(parts), len(layout), *layout]
    return (every, numbers) if some else (None, None)


def one_by_one(parts: list[Tensor] | None, layouts: list[int] | None, count: int) -> list[Codes]:
    """What `side_by_side` got, again."""
    if layouts is None or parts is None:
        return [(None, None)] * count
    found: list[Codes] = []
    part = number = 0
    for _ in range(count):
        some, length = layouts[number : number + 2]
        number += 2
        own = (parts[part : part + some], layouts[number : number + length])
        found.append(own if length else (None, None))
        part, number = part + some, number + length
    return found


def drops_base(drop_base: bool, gain: Tensor | None, dropout: float) -> bool:
    """Whether this member's dropout also acts on the input of its rescaled base."""
    return drop_base and gain is not None and dropout > 0


def keeps_z(bias: Tensor | None, gain: Tensor | None, drop_base: bool) -> bool:
    """Whether gain's gradient needs z: y does not give it back once a bias is added (cancellation)
    or the base dropped."""
    return gain is not None and (bias is not None or drop_base)
