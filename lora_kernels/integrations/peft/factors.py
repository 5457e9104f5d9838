"""PEFT's variants of LoRA that are LoRA of other factors than the weights of lora_A and lora_B:

BD-LoRA      block-diagonal A or B, as the matrix that it is
KaSA         y = W x + scale · B diag(σ) A x: A's rows times σ                (arXiv:2412.06071)
MonteCLoRA   A's own weight, but for training, which samples it
VeLoRA       LoRA; in training backward sees a projection of x alone         (arXiv:2405.17991)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

try:
    from peft.tuners.lora import variants
except ImportError:
    variants = None  # type: ignore[assignment]

Factors = tuple[Any, Any]
# names a way of its own, see linear.WAYS
VELORA = "VeLoRA keeps a projection of the input for backward"
BLOCK_DIAGONAL: Any = getattr(variants, "BlockDiagonalLinear", None)


def are_covered(lora_a: nn.Module, lora_b: nn.Module) -> bool:
    """Whether both are linear layers, of which one may be block-diagonal."""
    return all(type(module) in (nn.Linear, BLOCK_DIAGONAL) for module in (lora_a, lora_b))


def _block_diagonal(layer: Any, name: str, a: Tensor, b: Tensor) -> Factors | str:
    return _dense(layer.lora_A._modules[name], a), _dense(layer.lora_B._modules[name], b)


def _dense(module: Any, weight: Tensor) -> Tensor:
    return module.weight_as_blockdiagonal_matrix() if type(module) is BLOCK_DIAGONAL else weight


def _singular_values(layer: Any, name: str, a: Tensor, b: Tensor) -> Factors | str:
    if name in (getattr(layer, "_lora_kasa_truncation_deferred", None) or ()):
        return "KaSA has yet to truncate the base weight"
    # float32, so that a 16-bit product is not rounded once more
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) * layer.lora_diag[name].to(wide)[:, None], b.to(wide)


def _sampled(layer: Any, name: str, a: Tensor, b: Tensor) -> Factors | str:
    if layer.training or layer.lora_dropout._modules[name].training:
        return "MonteCLoRA samples lora_A in training"
    # PEFT makes a sampler that was put off in the first call
    return (a, b) if name in layer.lora_monteclora_sampler else "MonteCLoRA has no sampler yet"


def _projected(layer: Any, name: str, a: Tensor, b: Tensor) -> Factors | str:
    return VELORA if layer.training and torch.is_grad_enabled() else (a, b)


def _named(table: dict[str, Callable[..., Factors | str]]) -> dict[Any, Callable[..., Factors | str]]:
    return {getattr(variants, name): rule for name, rule in table.items() if hasattr(variants, name)}


RULES = _named(
    {
        "BdLoraLinearVariant": _block_diagonal,
        "KasaLinearVariant": _singular_values,
        "MontecloraLinearVariant": _sampled,
        "VeloraLinearVariant": _projected,
    }
)
"""By variant: (layer, adapter, weight of lora_A, of lora_B) to A [r, in] and B [out, r], which have
gradients to what they are made of; or why PEFT must run the call."""
