"""The adapters of one weight of experts."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.nn.quantised_experts import is_parametrised
from lora_kernels.ops import dora_gain
from lora_kernels.ops.expert_weight_norm import expert_weight_norm
from lora_kernels.serving.adapter import Factors
from lora_kernels.serving.base import weight_of
from lora_kernels.serving.experts import Experts
from lora_kernels.serving.site import Pages


class ExpertsSite(Pages):
    """The adapters of one weight of experts, W [experts, out, in], each expert with its own part of
    an adapter's pages. Nobody but the pool calls it, under its lock."""

    def __init__(self, experts: Experts, generation: Tensor, pages: int, max_rank: int) -> None:
        self.shape, self.dtype = (experts.count, *experts.matrix), experts.dtype
        super().__init__(*experts.matrix, self.dtype, generation, pages, max_rank, experts=experts.count)
        self.parameter, self._transposed, self._has_bias = experts.parameter, experts.form.transposed, experts.has_bias
        self.weight_shape, self.weight_dtype = tuple(experts.weight.shape), experts.weight.dtype
        self.device = experts.weight.device
        self.numbers = tuple(experts.shape)
        """The shape of the weight, or of the numbers that its codes stand for."""
        self.is_coded, self.is_parametrised = experts.codes is not None, is_parametrised(experts.module, experts.parameter)

    def refusal(self, f: Factors) -> str | None:
        if f.bias is not None:
            return "experts have no lora_bias in a batch"
        # y holds the bias of its expert before the gain comes, which is not for it
        return "experts with a bias have no DoRA in a batch" if f.magnitude is not None and self._has_bias else None

    def gain(self, f: Factors, weight: Any, mark: int) -> Tensor | None:
        """Of DoRA, m / ‖W + s·BA‖ [experts, out], in one pass over W. May be called without the
        pool's lock."""
        if f.magnitude is None:
            return None
        a, b = (t.to(self.device, self.dtype, non_blocking=True) for t in (f.a, f.b))
        norm = expert_weight_norm(weight_of(weight), a, b, f.scale, None, self._transposed)
        return dora_gain(f.magnitude.to(norm, non_blocking=True), norm).float()

    def renew_gain(self, slot: int, magnitude: Tensor, scale: float, weight: Any, mark: int) -> None:
        """The gain of an adapter in a slot, for a weight that is another now."""
        pages = torch.tensor(self.held[slot], dtype=torch.int32).to(self.device)
        at = self._rows_of_pages(pages)[:, : self._entries[slot][0]]
        gain = self.gain(Factors(self.slots.a[at], self.slots.b[at].mT, scale, magnitude), weight, mark)
        if gain is not None:
            self._each(self.slots.gain)[self._vectors[slot][0]] = gain
