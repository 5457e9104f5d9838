"""A frozen embedding with a LoRA adapter."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lora_kernels.nn.base import AdapterLayer, freeze_parameters
from lora_kernels.nn.init import embedding_factors
from lora_kernels.nn.snapshot import of_one_state
from lora_kernels.ops import merged_weight


class LoRAEmbedding(AdapterLayer):
    """y = W[i] + scaling · (Aᵀ)[i] Bᵀ for each index i.

    Shapes: indices [...]; weight W [num_embeddings, dim], lora_embedding_A A [r, num_embeddings],
    lora_embedding_B B [dim, r]; y [..., dim] in the dtype of weight, summed in float32 (float64 for
    float64) and rounded once. W is frozen; the adapter is float32, float64 if W is float64.
    padding_idx, max_norm, norm_type and scale_grad_by_freq act on W and on Aᵀ, as in PEFT; the
    gradient of A is dense, sparse or not. A is zero at first and B normal; with
    init_lora_weights=False both are normal.

    Raises:
        TypeError: an option has the wrong type, or the weight a dtype that is not supported.
        ValueError: an option is outside its range; the message names it. Nothing has changed.

    Source: LoRA, arXiv:2106.09685, eq. 3, on the one-hot input, as in the authors' loralib.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embedding = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._add_adapter(embedding, r, lora_alpha, use_rslora, init_lora_weights)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
    ) -> Self:
        """A layer that shares the weight of `embedding`, which it freezes, and its options and
        train or eval mode."""
        if not isinstance(embedding, nn.Embedding) or type(embedding).forward is not nn.Embedding.forward:
            own = " with a forward of its own" if isinstance(embedding, nn.Embedding) else ""
            raise TypeError(f"{cls.__name__}: embedding must be an nn.Embedding, found {type(embedding).__name__}{own}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        return layer._add_adapter(embedding, r, lora_alpha, use_rslora, init_lora_weights)

    def _add_adapter(
        self, embedding: nn.Embedding, r: int, lora_alpha: float, use_rslora: bool, init_lora_weights: Any
    ) -> Self:
        self._set_up(embedding._parameters.get("weight"), r, lora_alpha, use_rslora)
        if not isinstance(init_lora_weights, bool):
            found = f"found {init_lora_weights!r}"
            raise TypeError(f"{self._class_name()}: init_lora_weights must be True or False, {found}")
        self.num_embeddings, self.embedding_dim = self.weight.shape
        self.padding_idx, self.max_norm, self.norm_type = embedding.padding_idx, embedding.max_norm, embedding.norm_type
        self.scale_grad_by_freq, self.sparse = embedding.scale_grad_by_freq, embedding.sparse
        a, b = embedding_factors(init_lora_weights, self.r, self.weight)
        self.lora_embedding_A, self.lora_embedding_B = nn.Parameter(a), nn.Parameter(b)
        freeze_parameters(self.weight)
        self.train(embedding.training)
        return self

    @of_one_state
    def forward(self, indices: Tensor) -> Tensor:
        """Shapes: indices [...], int32 or int64, → [..., dim]."""
        if not self.enabled:
            return self._look_up(indices, self._base_weight(), self.sparse)
        y = self._look_up(indices, self.weight, self.sparse)
        if self.merged:
            return y
        # never sparse: torch cannot transpose such a gradient, and PEFT's layer raises in backward
        rows = self._look_up(indices, self.lora_embedding_A.T, False)          # [..., r]
        return (y + (rows @ self.lora_embedding_B.T) * self.scaling).to(y.dtype)

    def merge(self, safe: bool = False) -> None:
        if self.max_norm is not None:
            raise ValueError(
                f"{self._class_name()}: an embedding with max_norm cannot be merged: max_norm={self.max_norm:g} would then"
                " act on the sum of base and adapter rather than on each"
            )
        super().merge(safe)

    merge.__doc__ = AdapterLayer.merge.__doc__

    def _look_up(self, indices: Tensor, table: Tensor, sparse: bool) -> Tensor:
        return F.embedding(
            indices, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, sparse
        )

    def _adapted_weight(self) -> Tensor:
        """W + scaling·(BA)ᵀ, [num_embeddings, dim]."""
        return merged_weight(self.weight, self.lora_embedding_B.T, self.lora_embedding_A.T, self.scaling)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._adapter_repr()}"
