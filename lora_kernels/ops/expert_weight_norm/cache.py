"""DoRA's norm of the experts of one layer, kept as `NormCache` keeps that of a matrix."""

from typing import Any

from torch import Tensor

from lora_kernels.ops.derivatives import transformed
from lora_kernels.ops.expert_weight_norm.op import expert_weight_norm
from lora_kernels.ops.weight_norm import NormCache


class ExpertNormCache(NormCache):
    """The last norm and gain of all experts, [experts, out]; call it with w, a, b and scale as
    `expert_weight_norm` takes them.

    Kept under the rules of `NormCache`, where w, a and b are contiguous; about 64 elements of all
    experts' weights are sampled. ‖W‖² is not kept, so a norm has the same bits with and without
    grad mode.
    """

    __slots__ = ("_transposed",)

    def __init__(self, transposed: bool = False) -> None:
        self._transposed = transposed
        super().__init__()

    def __call__(self, w: Any, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
        """`expert_weight_norm(w, a, b, scale)` without gradient and tangent: [experts, out]."""
        return self._computed(w, a, b, scale).detach() if transformed() else super().__call__(w, a, b, scale)

    def _computed(self, w: Any, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
        return expert_weight_norm(w, a, b, scale, None, self._transposed)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertNormCache":
        return ExpertNormCache(self._transposed)

    def __reduce__(self) -> Any:
        return ExpertNormCache, (self._transposed,)
