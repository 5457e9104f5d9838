"""A frozen embedding with a LoRA adapter."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lora_kernels.nn.base import AdapterLayer, freeze_parameters
from lora_kernels.nn.init import embedding_factors
from lora_kernels.nn.snapshot import of_one_state
from lora_kernels.ops import merged_weight
from lora_kernels.ops.lora_linear.op import _any_autocast

_WIDE = (torch.float32, torch.float64)
_READ = ("weight", "lora_embedding_A", "lora_embedding_B")


def is_scaled_embedding(module: Any) -> bool:
    """Whether it is one of transformers' embeddings that multiply their rows with `embed_scale`
    (Gemma, BART, M2M100), and computes that."""
    if not isinstance(module, nn.Embedding) or not type(module).__name__.endswith("ScaledWordEmbedding"):
        return False
    scale, weight = getattr(module, "embed_scale", None), module._parameters.get("weight")
    if weight is None or not isinstance(scale, int | float | Tensor) or (isinstance(scale, Tensor) and scale.numel() != 1):
        return False
    if weight.is_meta:
        return True
    with torch.no_grad():
        index = torch.zeros(1, dtype=torch.long, device=weight.device)
        factor = scale.to(weight.dtype) if isinstance(scale, Tensor) else scale
        return torch.equal(type(module).forward(module, index), nn.Embedding.forward(module, index) * factor)


def _float32_product(rows: Tensor, b: Tensor) -> Tensor:
    """rows [..., r] Bᵀ in float32 (float64 for float64), whatever autocast says."""
    dtype, autocast = rows.dtype, _any_autocast()
    if dtype in _WIDE and dtype is b.dtype and not autocast:
        return F.linear(rows, b)
    wide = torch.promote_types(torch.promote_types(rows.dtype, b.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False) if autocast else nullcontext():
        return F.linear(rows.to(wide), b.to(wide))


class LoRAEmbedding(AdapterLayer):
    """y = W[i] + scaling · (Aᵀ)[i] Bᵀ for each index i.

    Shapes: indices [...]; weight W [num_embeddings, dim], lora_embedding_A A [r, num_embeddings],
    lora_embedding_B B [dim, r]; y [..., dim] in the dtype of weight, summed in float32 (float64 for
    float64) and rounded once. W is frozen; the adapter is float32, float64 if W is float64.
    padding_idx, max_norm, norm_type and scale_grad_by_freq act on W and on Aᵀ, as in PEFT; the
    gradient of A is dense, sparse or not. A is zero at first and B normal; with
    init_lora_weights=False both are normal.

    In the place of an embedding that multiplies its rows with an `embed_scale` (Gemma, BART), the
    whole y is multiplied, as in PEFT. Autocast does not act on the sums.

    Raises:
        TypeError: an option has the wrong type, or the weight a dtype that is not supported.
        ValueError: an option is outside its range; the message names it. Nothing has changed.

    Source: LoRA, arXiv:2106.09685, eq. 3, on the one-hot input, as in the authors' loralib.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
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
        plain = isinstance(embedding, nn.Embedding) and type(embedding).forward is nn.Embedding.forward
        if not plain and not is_scaled_embedding(embedding):
            own = " with a forward of its own" if isinstance(embedding, nn.Embedding) else ""
            raise TypeError(f"{cls.__name__}: embedding must be an nn.Embedding, found {type(embedding).__name__}{own}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        return layer._add_adapter(embedding, r, lora_alpha, use_rslora, init_lora_weights)

    def _add_adapter(
        self, embedding: nn.Embedding, r: int, lora_alpha: float, use_rslora: bool, init_lora_weights: Any
    ) -> Self:
        self._set_up(embedding, r, lora_alpha, use_rslora)
        if not isinstance(init_lora_weights, bool):
            found = f"found {init_lora_weights!r}"
            raise TypeError(f"{self._class_name()}: init_lora_weights must be True or False, {found}")
        self.num_embeddings, self.embedding_dim = self.weight.shape
        self.padding_idx, self.max_norm, self.norm_type = embedding.padding_idx, embedding.max_norm, embedding.norm_type
        self.scale_grad_by_freq, self.sparse = embedding.scale_grad_by_freq, embedding.sparse
        a, b = embedding_factors(init_lora_weights, self.r, self.weight)
        self.lora_embedding_A, self.lora_embedding_B = nn.Parameter(a), nn.Parameter(b)
        self._init = init_lora_weights
        self.embed_scale: float | Tensor | None = None
        if is_scaled_embedding(embedding):
            scale: Any = embedding.embed_scale
            if isinstance(scale, Tensor):
                self.__dict__.pop("embed_scale")
                kept = "embed_scale" not in embedding._non_persistent_buffers_set
                self.register_buffer("embed_scale", scale, persistent=kept)
            else:
                self.embed_scale = scale
        freeze_parameters(self.weight)
        self.train(embedding.training)
        return self

    @of_one_state
    def forward(self, indices: Tensor) -> Tensor:
        """Shapes: indices [...], int32 or int64, → [..., dim]."""
        if not self.enabled:
            return self._scaled(self._look_up(indices, self._base_weight(), self.sparse))
        # an attribute of a module costs ten times as much, and may be what parametrize put there
        held = self._parameters
        weight, a, b = (p if (p := held.get(name)) is not None else getattr(self, name) for name in _READ)
        y = self._look_up(indices, weight, self.sparse)
        if self.merged:
            return self._scaled(y)
        # never sparse: torch cannot transpose such a gradient, and PEFT's layer raises in backward
        rows = self._look_up(indices, a.T, False)  # [..., r]
        total = y + _float32_product(rows, b) * self.scaling
        return (total if self.embed_scale is None else self._scaled(total)).to(y.dtype)

    def _scaled(self, y: Tensor) -> Tensor:
        scale = self.embed_scale
        if scale is None:
            return y
        # Gemma rounds its scale to the dtype of the weight first
        return y * (scale.to(self.weight.dtype).to(y.dtype) if isinstance(scale, Tensor) else scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives the adapter its first values; the base weight stays. For layers made on the meta
        device: after `to_empty`.

        Raises:
            RuntimeError: the layer is merged.
        """
        if self.merged:
            raise RuntimeError(f"{self._class_name()}: reset_parameters() on a merged layer; call unmerge() first")
        a, b = embedding_factors(self._init, self.r, self.weight)
        self.lora_embedding_A.copy_(a)
        self.lora_embedding_B.copy_(b)

    def _plain_weight(self, call: str, name: str = "weight") -> nn.Parameter:
        if call == "merge" and self.max_norm is not None:
            raise ValueError(
                f"{self._class_name()}: an embedding with max_norm cannot be merged: max_norm={self.max_norm:g} would then"
                " act on the sum of base and adapter rather than on each"
            )
        return super()._plain_weight(call, name)

    def _look_up(self, indices: Tensor, table: Tensor, sparse: bool) -> Tensor:
        return F.embedding(indices, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, sparse)

    def _adapted_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W + scaling·(BA)ᵀ, [num_embeddings, dim]."""
        return merged_weight(self.weight, self.lora_embedding_B.T, self.lora_embedding_A.T, self.scaling)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._adapter_repr()}"
