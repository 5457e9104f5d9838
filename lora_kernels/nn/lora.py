"""A frozen linear layer with a LoRA adapter."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lora_kernels.nn.base import AdapterLayer, freeze_parameters
from lora_kernels.nn.checks import check_dropout, check_flag
from lora_kernels.nn.flat_parameters import constant
from lora_kernels.nn.init import check_init, linear_factors
from lora_kernels.nn.quantised import holds_codes
from lora_kernels.nn.quantised_base import QuantisedBase
from lora_kernels.nn.snapshot import of_one_state
from lora_kernels.ops.lora_linear import Member, lora_linear
from lora_kernels.ops.merge import merged_weight
from lora_kernels.ops.quantised import QuantisedWeight


class LoRALinear(AdapterLayer):
    """y = x Wᵀ + scaling · drop(x) Aᵀ Bᵀ + bias, by `lora_kernels.ops.lora_linear`.

    Shapes: x [..., in]; weight W [out, in], bias [out], lora_A [r, in], lora_B [out, r]; y [...,
    out] as x. weight and bias are frozen: set requires_grad of bias to train it; weight gets no
    gradient. lora_A and lora_B are float32, float64 if weight is float64, as PEFT makes them.
    Dropout acts in training mode only.

    `init_lora_weights`: True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_N" or "olora"
    as in PEFT (the last three change weight, in place), or a pair of tensors (A, B).

    While merged, or with the adapter off, it computes F.linear. Calls from several threads do not
    disturb one another.

    Raises:
        TypeError: an option has the wrong type, or the weight a dtype that is not supported.
        ValueError: an option is outside its range, or tensors do not fit; the message names it.
            Nothing has changed.

    Sources: LoRA, arXiv:2106.09685, eq. 3; rsLoRA, arXiv:2312.03732.
    """

    bias: nn.Parameter | None
    initial_A: Tensor
    initial_B: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str | tuple[Tensor, Tensor] = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_flag(type(self).__name__, "bias", bias, "; give the rank as r=")
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._add_adapter(linear, r, lora_alpha, use_rslora, lora_dropout, init_lora_weights)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str | tuple[Tensor, Tensor] = True,
    ) -> Self:
        """A layer that shares the parameters of `linear`, which it freezes, and its train or eval
        mode."""
        return cls._empty_layer(linear)._add_adapter(linear, r, lora_alpha, use_rslora, lora_dropout, init_lora_weights)

    @classmethod
    def _empty_layer(cls, linear: Any) -> Self:
        """An empty layer, if `linear` is one that it can replace."""
        if not isinstance(linear, nn.Linear) or not (type(linear).forward is nn.Linear.forward or holds_codes(linear)):
            own = " with a forward of its own" if isinstance(linear, nn.Linear) else ""
            raise TypeError(f"{cls.__name__}: linear must be an nn.Linear, found {type(linear).__name__}{own}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        return layer

    def _add_adapter(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        use_rslora: bool,
        lora_dropout: float,
        init_lora_weights: Any,
    ) -> Self:
        """Builds the adapter; every check comes before the first change."""
        name = type(self).__name__
        self._set_up(linear, r, lora_alpha, use_rslora)
        self.out_features, self.in_features = self._weight_shape()
        self.lora_dropout = check_dropout(name, lora_dropout)
        held = self._quantised
        weight = self.weight if held is None else held.like_weight()
        init = check_init(name, init_lora_weights, self.r, weight, self.scaling, held is not None)
        codes = "weight" if held is None else held.codes
        beside = {name: p for name, p in linear._parameters.items() if name != codes}
        for name, parameter in beside.items():
            self.register_parameter(name, parameter)
        self._init = init if isinstance(init, bool | str) else "given"
        a, b = linear_factors(init, self.r, weight, self.scaling)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        if self._init_is_drawn():
            # without them nobody could tell in another process what the base weight was
            self.register_buffer("initial_A", a.clone())
            self.register_buffer("initial_B", b.clone())
        freeze_parameters(self.weight, self.bias, *(() if held is None else beside.values()))
        self.train(linear.training)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives the adapter its first values, as `init_lora_weights` says; the base weight stays,
        but for "pissa" and "olora". For layers made on the meta device: after `to_empty`, once the
        base weight is loaded.

        Raises:
            RuntimeError: the layer is merged, the base weight has been changed already, or the
                first values were given as tensors.
        """
        name = self._class_name()
        if self.merged:
            raise RuntimeError(f"{name}: reset_parameters() on a merged layer; call unmerge() first")
        if self._init == "given" or (self._base_changed() and not self._made_on_meta):
            raise RuntimeError(
                f"{name}: reset_parameters() cannot repeat init_lora_weights={self._init!r}: the tensors were given, or the"
                " base weight is a residual already"
            )
        weight = self.weight if self._quantised is None else self._quantised.like_weight()
        a, b = linear_factors(self._init, self.r, weight, self.scaling)
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        if self._init_is_drawn():
            self.initial_A.copy_(a)
            self.initial_B.copy_(b)
        self._made_on_meta = self.weight.is_meta

    def _base_changed(self) -> bool:
        return isinstance(self._init, str) and self._init.startswith(("pissa", "olora"))

    def _init_is_drawn(self) -> bool:
        """Whether the base weight lacks a product that depends on torch's generator."""
        return isinstance(self._init, str) and self._init.startswith("pissa_niter")

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
        w = self._frozen_weight()
        return lora_linear(x, w, self.lora_A, self.lora_B, self.scaling, self.bias, None, self._dropout())

    def _adapted(self, x: Tensor, w: Tensor | QuantisedWeight) -> Tensor:
        return lora_linear(x, w, self.lora_A, self.lora_B, self.scaling, self.bias, None, self._dropout())

    def _on_codes(self, x: Tensor, base: QuantisedBase) -> Tensor:
        """The forward over a quantised base: in its compute dtype, and back to that of x."""
        wanted = x.dtype
        dtype = base.compute_dtype(x)
        x = x if dtype is wanted else x.to(dtype)
        if self.enabled and self.merged:
            w, again = self.weight, self._requantised
            if again is not None:
                y = again.product(x, self.bias)
            else:
                y = F.linear(x.to(w.dtype), w, None if self.bias is None else self.bias.to(w.dtype))
        else:
            y = self._adapted(x, base.weight(dtype)) if self.enabled else base.product(x, self.bias)
        return y if y.dtype is wanted else y.to(wanted)

    def _frozen_weight(self) -> Tensor:
        w = self.weight
        return constant(self, "weight", w) if w.requires_grad else w

    def _dropout(self) -> float:
        return self.lora_dropout if self.training else 0.0

    def _output_gain(self, w: Any) -> Tensor | None:
        """What multiplies the outputs of the adapted product, [out]."""
        return None

    def _group_member(self) -> Member:
        """What forward computes with, for a call that several layers share."""
        w = self._frozen_weight()
        return Member(w, self.lora_A, self.lora_B, self.scaling, self.bias, self._output_gain(w))

    def _weight_shape(self) -> torch.Size:
        """[out, in]."""
        return self.weight.shape if self._quantised is None else self._quantised.shape

    def _weight_in(self, dtype: torch.dtype | None = None) -> Tensor | QuantisedWeight:
        """The base weight as the ops take it: over codes in a dtype, or that which it was in
        before."""
        held = self._quantised
        return self.weight if held is None else held.weight(held.dtype if dtype is None else dtype)

    def _adapted_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W + scaling·BA, [out, in]."""
        return merged_weight(self._weight_in(dtype), self.lora_A, self.lora_B, self.scaling)

    def extra_repr(self) -> str:
        dropout = f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._adapter_repr()}{dropout}"
