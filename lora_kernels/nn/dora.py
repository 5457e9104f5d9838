"""A frozen linear layer with a DoRA adapter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lora_kernels.nn.lora import LoRALinear
from lora_kernels.nn.snapshot import changing, of_one_state
from lora_kernels.ops import NormCache, dora_gain, lora_linear, merged_weight, weight_norm
from lora_kernels.ops.lora_linear.op import DROPOUT_SEMANTICS
from lora_kernels.ops.quantised import QuantisedWeight


class DoRALinear(LoRALinear):
    """y = gain ⊙ (x Wᵀ + scaling · drop(x) Aᵀ Bᵀ) + bias with gain = m / ‖W + scaling·BA‖, one per
    output feature.

    Shapes and parameters as LoRALinear, and lora_magnitude_vector m [out], float32 whatever the
    layer is cast to (float64 if weight is float64): in 16 bits the steps of an optimizer would
    round away. m begins as the norm, by the same routine, so that gain is exactly 1. Where the norm
    is zero, gain is 1 and m gets no gradient.

    `detach_norm`: the norm is a constant in backward, as in the paper (§4.3) and in PEFT; False:
    the exact gradient. `dropout_semantics`: "peft" also drops the input of the rescaled base;
    "lora_only" is the formula above, one GEMM cheaper.

    Raises:
        TypeError: an option has the wrong type, or the weight a dtype that is not supported.
        ValueError: an option is outside its range, or tensors do not fit; the message names it.
            Nothing has changed.

    Source: DoRA, arXiv:2402.09353, eq. 5 and §4.3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        detach_norm: bool = True,
        dropout_semantics: str = "peft",
        **options: Any,
    ) -> None:
        self._check_options(detach_norm, dropout_semantics)
        super().__init__(in_features, out_features, bias, **options)
        self.detach_norm, self.dropout_semantics = detach_norm, dropout_semantics

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *args: Any, detach_norm: bool = True, dropout_semantics: str = "peft", **options: Any
    ) -> Self:
        """A layer that shares the parameters of `linear`, which it freezes; other options as
        LoRALinear.from_linear."""
        cls._check_options(detach_norm, dropout_semantics)
        layer = super().from_linear(linear, *args, **options)
        layer.detach_norm, layer.dropout_semantics = detach_norm, dropout_semantics
        return layer

    @classmethod
    def _check_options(cls, detach_norm: Any, dropout_semantics: Any) -> None:
        if not isinstance(detach_norm, bool):
            raise TypeError(f"{cls.__name__}: detach_norm must be True or False, found {detach_norm!r}")
        if dropout_semantics not in DROPOUT_SEMANTICS:
            raise ValueError(
                f"{cls.__name__}: dropout_semantics must be one of {', '.join(DROPOUT_SEMANTICS)},"
                f" found {dropout_semantics!r}"
            )

    def _add_adapter(self, linear: nn.Linear, *options: Any) -> Self:
        super()._add_adapter(linear, *options)
        self._norm = NormCache()
        with torch.no_grad():
            norm = weight_norm(self._weight_for_norm(), self.lora_A, self.lora_B, self.scaling)
        self.lora_magnitude_vector = nn.Parameter(norm)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lora_magnitude_vector.copy_(weight_norm(self._weight_for_norm(), self.lora_A, self.lora_B, self.scaling))
        self._norm.clear()

    reset_parameters.__doc__ = LoRALinear.reset_parameters.__doc__

    @of_one_state
    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in] → [..., out].

        Raises:
            TypeError, ValueError: x does not fit weight in dtype, shape or device, or weight
                requires grad.
        """
        if self._quantised is not None:
            return self._on_codes(x, self._quantised)
        if not self.enabled:
            return F.linear(x, self._base_weight(), self.bias)
        if self._unmerged is not None:
            return F.linear(x, self.weight, self.bias)
        return self._adapted(x, self._frozen_weight())

    def _adapted(self, x: Tensor, w: Tensor | QuantisedWeight) -> Tensor:
        return lora_linear(
            x,
            w,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.bias,
            self._output_gain(w),
            self._dropout(),
            self.dropout_semantics,
        )

    def _output_gain(self, w: Any) -> Tensor:
        a, b, scaling = self.lora_A, self.lora_B, self.scaling
        if self.detach_norm:
            return self._norm.gain(w, a, b, scaling, self.lora_magnitude_vector)
        return dora_gain(self.lora_magnitude_vector, weight_norm(w, a, b, scaling))

    def _weight_for_norm(self) -> Tensor | QuantisedWeight:
        """W as calls see it, so that the first gain is 1: over codes, in a compute dtype that is
        known before there is an x."""
        held = self._quantised
        return self.weight if held is None else held.weight(held.compute_dtype(None))

    def _adapted_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """gain ⊙ (W + scaling·BA), [out, in]."""
        w, a, b, scaling = self._weight_in(dtype), self.lora_A, self.lora_B, self.scaling
        return merged_weight(w, a, b, scaling, dora_gain(self.lora_magnitude_vector, weight_norm(w, a, b, scaling)))

    def _replace_weight(self, weight: nn.Parameter) -> None:
        super()._replace_weight(weight)
        self._norm.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with changing(self):
            super()._apply(keeping_magnitudes(fn, self.lora_magnitude_vector), recurse)
            self._norm.clear()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        with changing(self):
            super()._load_from_state_dict(*args)
            widen(self.lora_magnitude_vector)
            self._norm.clear()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += "" if self.detach_norm else ", detach_norm=False"
        return text if self.dropout_semantics == "peft" else f"{text}, dropout_semantics={self.dropout_semantics!r}"


def keeping_magnitudes(fn: Callable[[Tensor], Tensor], *magnitudes: nn.Parameter) -> Callable[[Tensor], Tensor]:
    """A function of `_apply` that leaves magnitudes and their gradients at least float32."""
    kept = [each for m in magnitudes for each in (m, m.grad)]

    def widened(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if any(tensor is k for k in kept) and moved.dtype.itemsize < 4:
            # again from the original: through 16 bits its values would be rounded
            return tensor.to(moved.device, torch.float32)
        return moved

    return widened


def widen(magnitude: nn.Parameter) -> None:
    """Makes it float32 again where load_state_dict(assign=True) took over the dtype of a file."""
    if magnitude.dtype.itemsize < 4:
        magnitude.data = magnitude.data.float()
