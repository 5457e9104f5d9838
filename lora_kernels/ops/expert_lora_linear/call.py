"""The arguments of the ops, and the tokens of each expert."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Forward(NamedTuple):
    """Shapes as in `expert_lora_linear`."""

    x: Tensor
    w: Tensor
    a: Tensor | None
    b: Tensor | None
    offsets: Tensor
    scale: float
    bias: Tensor | None
    gain: Tensor | None
    transposed: bool
    """Whether w is [experts, in, out]."""
    keep_h: bool
    """Whether h = scale · x Aᵀ [tokens, r] is wanted, in float32."""
    keep_z: bool
    """Whether z = x Wᵀ + h Bᵀ [tokens, out] is wanted, for the gradient of gain."""
    index: Tensor | None = None
    """[tokens]: x is [rows, in], and token t is its row index[t]."""
    parts: list[Tensor] | None = None
    layout: list[int] | None = None
    """Where W is quantised: w, parts and layout are then `QuantisedWeight.fields()`."""

    @property
    def n_out(self) -> int:
        """The features of y."""
        if self.layout:
            return self.layout[2] if self.transposed else self.layout[1] // len(self.offsets)
        return self.w.shape[2 if self.transposed else 1]

    @property
    def tokens(self) -> int:
        """How many y has."""
        return (self.x if self.index is None else self.index).shape[0]


class Backward(NamedTuple):
    """Of `Forward`, with dy [tokens, out]; h, and y or z where gain wants its gradient."""

    dy: Tensor
    x: Tensor
    w: Tensor
    a: Tensor | None
    b: Tensor | None
    offsets: Tensor
    scale: float
    bias: Tensor | None
    gain: Tensor | None
    transposed: bool
    h: Tensor | None
    y: Tensor | None
    z: Tensor | None
    needs: list[int]
    """As `lora_linear.call.Needs`; of an op's schema it can be a list alone."""
    index: Tensor | None = None
    parts: list[Tensor] | None = None
    layout: list[int] | None = None

    def products(self) -> Forward:
        """The call whose y is z = x Wᵀ + h Bᵀ."""
        of = self.x, self.w, self.a, self.b, self.offsets, self.scale
        return Forward(*of, None, None, self.transposed, False, False, self.index, self.parts, self.layout)


def gathered(call: Forward | Backward) -> Tensor:
    """The tokens [tokens, in] that x or its rows are."""
    return call.x if call.index is None else call.x.index_select(0, call.index)


def summed(dx: Tensor | None, call: Backward) -> Tensor | None:
    """The gradient of x from that of the tokens: of each row the sum over its tokens, in their
    order and in float32."""
    if dx is None or call.index is None:
        return dx
    rows, index = call.x.shape[0], call.index
    if not (rows and dx.numel()):
        return dx.new_zeros(call.x.shape)
    of_rows, order = torch.sort(index, stable=True)
    starts = torch.searchsorted(of_rows, torch.arange(rows, device=dx.device))
    return F.embedding_bag(order, dx, starts, mode="sum")


def segments_of(offsets: Tensor, tokens: int) -> list[tuple[int, int, int]]:
    """(expert, first token, end) of each expert that has tokens; none on the meta device, where
    nobody knows.

    Raises:
        ValueError: the offsets fall, or leave the tokens.
    """
    found, first = [], 0
    if offsets.is_meta:
        return []
    for expert, end in enumerate(offsets.tolist()):
        if not first <= end <= tokens:
            wanted = f"from 0 to the {tokens} tokens of x and never fall"
            raise ValueError(f"expert_lora_linear: offsets must go {wanted}, found {end} after {first} at expert {expert}")
        if end > first:
            found.append((expert, first, end))
        first = end
    return found
