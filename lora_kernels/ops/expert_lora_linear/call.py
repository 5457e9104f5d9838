"""The arguments of the ops, and the tokens of each expert."""

from typing import NamedTuple

from torch import Tensor


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

    @property
    def n_out(self) -> int:
        """The features of y."""
        return self.w.shape[2 if self.transposed else 1]


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

    def products(self) -> Forward:
        """The call whose y is z = x Wᵀ + h Bᵀ."""
        of = self.x, self.w, self.a, self.b, self.offsets, self.scale
        return Forward(*of, None, None, self.transposed, False, False)


def segments_of(offsets: Tensor, tokens: int) -> list[tuple[int, int, int]]:
    """(expert, first token, end) of each expert that has tokens.

    Raises:
        ValueError: the offsets fall, or leave the tokens.
    """
    found, first = [], 0
    for expert, end in enumerate(offsets.tolist()):
        if not first <= end <= tokens:
            wanted = f"from 0 to the {tokens} tokens of x and never fall"
            raise ValueError(f"expert_lora_linear: offsets must go {wanted}, found {end} after {first} at expert {expert}")
        if end > first:
            found.append((expert, first, end))
        first = end
    return found
