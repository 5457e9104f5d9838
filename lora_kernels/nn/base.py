"""What every layer with an adapter has: rank and scale, the adapter on and off, merging into the
base weight."""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lora_kernels.nn.snapshot import changing
from lora_kernels.ops.lora_linear.op import FLOATS


class AdapterLayer(nn.Module):
    """The base of our layers; subclasses say how the adapted weight is computed
    (`_adapted_weight`).

        scaling = factor · lora_alpha / r,  or factor · lora_alpha / √r with use_rslora

    `factor` is 1 until `set_scale`. Sources: LoRA, arXiv:2106.09685, §4.1; rsLoRA,
    arXiv:2312.03732, theorem 3.2.
    """

    weight: nn.Parameter
    enabled: bool
    """Whether the adapter takes part; if not, the layer computes what its base does."""
    _changes = 0

    def _set_up(self, weight: nn.Parameter | None, r: int, lora_alpha: float, use_rslora: bool) -> None:
        """Takes the options, checked, and the base weight, whose owner may be another module
        too."""
        name = type(self).__name__
        weight = check_weight(name, weight)
        self.r = check_rank(name, r)
        self.lora_alpha = check_number(name, "lora_alpha", lora_alpha)
        if not isinstance(use_rslora, bool):
            raise TypeError(f"{name}: use_rslora must be True or False, found {use_rslora!r}")
        self.use_rslora = use_rslora
        self.scaling = self._initial_scaling()
        self.enabled = True
        self.weight = weight
        # the base weight as it was before merge(); not a buffer, since state_dict() gives it in the
        # place of `weight`
        self._unmerged: Tensor | None = None

    def _initial_scaling(self) -> float:
        return initial_scaling(self.lora_alpha, self.r, self.use_rslora)

    def _adapted_weight(self) -> Tensor:
        """The weight that makes a plain layer compute what this one does in eval mode, rounded once
        to its dtype."""
        raise NotImplementedError

    def _base_weight(self) -> Tensor:
        held = self._unmerged
        return self.weight if held is None else held

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the adapter."""
        return self._unmerged is not None

    def merge(self, safe: bool = False) -> None:
        """Puts the adapter into `weight`: sums in float32 (float64 for float64), one rounding to
        the weight's dtype.

        The weight as it was is kept, so that `unmerge` gives back its very bits; a merged layer
        therefore holds two tensors of that size. `state_dict` goes on to give the unmerged weight.
        With `safe`, values that are not finite are refused.

        Raises:
            RuntimeError: the layer is merged already.
            ValueError: `safe`, and the merged weight is not finite; nothing has changed.
        """
        if self.merged:
            raise RuntimeError(f"{self._class_name()}: merge() on a merged layer; call unmerge() first")
        # the merged tensor must be as the weight is: one made in inference mode could never be
        # trained through
        with torch.inference_mode(self.weight.is_inference()), torch.no_grad():
            adapted = self._adapted_weight()
        if safe:
            wrong = adapted.numel() - int(adapted.isfinite().sum())
            if wrong:
                raise ValueError(
                    f"{self._class_name()}: merge(safe=True): the merged weight must be finite, found {wrong} of"
                    f" {adapted.numel()} values that are not; nothing has changed"
                )
        with changing(self):
            self._unmerged = self.weight.detach()
            self._replace_weight(adapted)

    def unmerge(self) -> None:
        """Takes the adapter out of `weight`, whose bits are then those before `merge`.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if self._unmerged is None:
            raise RuntimeError(f"{self._class_name()}: unmerge() on a layer that is not merged")
        with changing(self):
            self._replace_weight(self._unmerged)
            self._unmerged = None

    def _replace_weight(self, data: Tensor) -> None:
        with torch.inference_mode(self.weight.is_inference()):
            self.weight.data = data
        # a graph that was built with the other weight must raise in its backward rather than use
        # this one
        if not self.weight.is_inference():
            torch.autograd.graph.increment_version(self.weight)

    def set_scale(self, factor: float) -> None:
        """Sets scaling to `factor` times what it was at first, as PEFT's set_scale does.

        Raises:
            TypeError: factor is not a number.
            ValueError: factor is not finite.
            RuntimeError: the layer is merged.
        """
        name = self._class_name()
        factor = check_number(name, "set_scale: factor", factor)
        if self.merged:
            raise RuntimeError(f"{name}: set_scale() on a merged layer; call unmerge() first")
        with changing(self):
            self.scaling = factor * self._initial_scaling()

    def enable_adapter(self, enabled: bool = True) -> None:
        """Turns the adapter on or off; off, also when merged, the layer computes exactly what its
        base does.

        Raises:
            TypeError: enabled is not True or False.
        """
        if not isinstance(enabled, bool):
            raise TypeError(f"{self._class_name()}: enable_adapter: enabled must be True or False, found {enabled!r}")
        self.enabled = enabled

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Turns the adapter off inside the block, in every thread, and then back to what it was."""
        before = self.enabled
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = before

    def _class_name(self) -> str:
        return type(self).__name__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with changing(self):
            super()._apply(fn, recurse)
            if self._unmerged is not None:
                with torch.no_grad():
                    self._unmerged = fn(self._unmerged)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None:
            destination[f"{prefix}weight"] = self._unmerged

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged and any(f"{prefix}{name}" in state_dict for name in self._parameters):
            error_msgs.append(f"{prefix or self._class_name()} is merged: call unmerge() before load_state_dict()")
            return
        with changing(self):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _adapter_repr(self) -> str:
        text = f"r={self.r}, lora_alpha={self.lora_alpha:g}, scaling={self.scaling:g}"
        text += ", merged=True" if self.merged else ""
        return text if self.enabled else f"{text}, enabled=False"


def initial_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """What the adapter's product is multiplied with."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def freeze_parameters(*parameters: nn.Parameter | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            parameter.requires_grad_(False)


def check_weight(layer: str, weight: Any) -> nn.Parameter:
    if type(weight) is not nn.Parameter:
        raise TypeError(f"{layer}: weight must be a plain parameter, found {type(weight).__name__}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{layer}: weight must be float32, bfloat16, float16 or float64, found {weight.dtype}")
    return weight


def check_rank(layer: str, r: Any) -> int:
    if isinstance(r, bool) or not hasattr(r, "__index__"):
        raise TypeError(f"{layer}: r must be an integer, found {r!r}")
    r = operator.index(r)
    if r < 1:
        raise ValueError(f"{layer}: r must be at least 1, found {r}")
    return r


def check_number(layer: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{layer}: {name} must be a number, found {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{layer}: {name} must be finite, found {value}")
    return value


def check_dropout(layer: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{layer}: lora_dropout must be a number, found {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{layer}: lora_dropout must be in [0, 1), found {value}")
    return float(value)
