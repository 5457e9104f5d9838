"""A scale that a compiler holds as a symbol."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def traced_scale(scale: float | Tensor) -> Any:
    """The scale, or while compiling a tensor of it where it changed between calls, for a symbol
    would become a constant in an op's argument: another graph for each value."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not isinstance(scale, Tensor) and not has_static_value(scale):
            # a product, which the compiler makes one of tensors; no other maker of a tensor is
            return torch.ones((), dtype=torch.float64, device="cpu") * scale
    return scale


def add_tensor_scale(
    library: torch.library.Library,
    name: str,
    signature: str,
    structure: Callable[..., Any],
    run: Callable[..., Any],
    fake: Callable[[Any], Any],
) -> None:
    """Gives an op a second overload, whose scale is a tensor of one number on the CPU."""

    def run_tensor(*args: Any) -> Any:
        call = structure(*args)
        return run(*call._replace(scale=call.scale.item()))

    overload = f"{name}.scale_tensor"
    library.define(overload + signature.replace("float scale", "Tensor scale"))
    library.impl(overload, run_tensor, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{overload}", lambda *args: fake(structure(*args)), lib=library)
