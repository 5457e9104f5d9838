"""A frozen linear layer with a LoRA adapter."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lora_kernels.nn.base import AdapterLayer, check_dropout, freeze_parameters
from lora_kernels.nn.init import check_init, linear_factors
from lora_kernels.nn.snapshot import of_one_state
from lora_kernels.ops.lora_linear import Member, lora_linear
from lora_kernels.ops.merge import merged_weight


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
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
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
        name, weight = type(self).__name__, linear._parameters.get("weight")
        self._set_up(weight, r, lora_alpha, use_rslora)
        self.out_features, self.in_features = self.weight.shape
        self.lora_dropout = check_dropout(name, lora_dropout)
        init = check_init(name, init_lora_weights, self.r, self.weight, self.scaling)
        self.register_parameter("bias", linear.bias)
        a, b = linear_factors(init, self.r, self.weight, self.scaling)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        freeze_parameters(self.weight, self.bias)
        self.train(linear.training)
        return self

    @of_one_state
    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in] → [..., out].

        Raises:
            TypeError, ValueError: x does not fit weight in dtype, shape or device, or weight
            requires grad.
        """
        if not self.enabled:
            return F.linear(x, self._base_weight(), self.bias)
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, self.scaling, self.bias, None, self._dropout())

    def _dropout(self) -> float:
        return self.lora_dropout if self.training else 0.0

    def _output_gain(self) -> Tensor | None:
        """What multiplies the outputs of the adapted product, [out]."""
        return None

    def _group_member(self) -> Member:
        """What forward computes with, for a call that several layers share."""
        return Member(self.weight, self.lora_A, self.lora_B, self.scaling, self.bias, self._output_gain())

    def _adapted_weight(self) -> Tensor:
        """W + scaling·BA, [out, in]."""
        return merged_weight(self.weight, self.lora_A, self.lora_B, self.scaling)

    def extra_repr(self) -> str:
        dropout = f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._adapter_repr()}{dropout}"
