"""Layers with adapters that read one input: q, k and v; gate and up."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.nn.dora import DoRALinear
from lora_kernels.nn.lora import LoRALinear
from lora_kernels.nn.snapshot import call_of_one_state
from lora_kernels.ops.lora_linear import lora_linear_group

_FORWARDS = (LoRALinear.forward, DoRALinear.forward)


class GroupedLinear(nn.Module):
    """(layer_0(x), layer_1(x), …), by `lora_kernels.ops.lora_linear_group`: one op, which reads x
    once for all.

        group = GroupedLinear({"q_proj": q, "k_proj": k, "v_proj": v})
        q, k, v = group(x)

    `layers`: LoRALinear and DoRALinear, of one in_features; by name, or in a sequence, which names
    them "0", "1", …. They stay ordinary layers and submodules under these names: they may be
    trained, merged, disabled and called alone.

    A layer that is merged, has its adapter off or a quantised base, that has hooks or a forward of
    its own, or that was replaced by another module, is called by itself. Two groups of layers with
    dropout whose `dropout_semantics` differ are two calls.

    Raises:
        TypeError: a layer is not a LoRALinear or DoRALinear.
        ValueError: there is no layer, or in_features differ; the message names the layer.
        KeyError: a name is one that nn.Module.add_module refuses.
    """

    def __init__(self, layers: Mapping[str, LoRALinear] | Sequence[LoRALinear]) -> None:
        super().__init__()
        pairs = layers.items() if isinstance(layers, Mapping) else enumerate(layers)
        named: dict[str, Any] = {str(name): layer for name, layer in pairs}
        if not named:
            raise ValueError("GroupedLinear: layers must hold at least one layer, found none")
        width = None
        for name, layer in named.items():
            if not isinstance(layer, LoRALinear):
                found = type(layer).__name__
                raise TypeError(f"GroupedLinear: layer {name!r} must be a LoRALinear or DoRALinear, found {found}")
            width = layer.in_features if width is None else width
            if layer.in_features != width:
                raise ValueError(
                    f"GroupedLinear: layer {name!r} must have in_features {width} as the first, found {layer.in_features}"
                )
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Shapes: x [..., in] → [..., out_i] of each layer, in their order.

        Raises:
            TypeError, ValueError: x does not fit a weight in dtype, shape or device, or a weight
                requires grad; the message names the member by its index in the call.
        """
        outputs: dict[str, Tensor] = {}
        grouped: list[tuple[str, LoRALinear, float, str | None]] = []
        for name, layer in self._modules.items():
            assert layer is not None
            if not isinstance(layer, LoRALinear) or _is_called_alone(layer):
                outputs[name] = layer(x)
            else:
                dropout = layer._dropout()
                semantics = layer.dropout_semantics if isinstance(layer, DoRALinear) and dropout > 0 else None
                grouped.append((name, layer, dropout, semantics))
        found = list(dict.fromkeys(s for *_, s in grouped if s is not None)) or ["peft"]
        for semantics in found:
            # a layer that does not care goes with the first
            part = [each for each in grouped if each[3] == semantics or (each[3] is None and semantics == found[0])]
            if part:
                ys = self._call_group(x, [layer for _, layer, *_ in part], [p for *_, p, _ in part], semantics)
                outputs.update(zip([name for name, *_ in part], ys, strict=True))
        return tuple(outputs[name] for name in self._modules)

    def _call_group(self, x: Tensor, layers: list[LoRALinear], dropouts: list[float], semantics: str) -> tuple[Tensor, ...]:
        def compute() -> tuple[Tensor, ...]:
            if not torch.compiler.is_compiling() and any(layer.merged or not layer.enabled for layer in layers):
                return tuple(layer(x) for layer in layers)  # changed since it was asked
            return lora_linear_group(x, [layer._group_member() for layer in layers], dropouts, semantics)

        return compute() if torch.compiler.is_compiling() else call_of_one_state(layers, compute)


def _is_called_alone(layer: LoRALinear) -> bool:
    """Whether calling the layer does more or other than its adapted product."""
    return bool(
        not layer.enabled
        or layer.merged
        or layer._quantised is not None
        or type(layer).forward not in _FORWARDS
        or "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or (not torch.compiler.is_compiling() and _has_any_global_hook())
    )
