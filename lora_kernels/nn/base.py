"""What every layer with an adapter has: rank and scale, the adapter on and off, merging into the
base weight."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lora_kernels.nn.checks import check_flag, check_number, check_rank, check_weight
from lora_kernels.nn.quantised_base import QuantisedBase, rebind_forward, relative_error
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
    _quantised: QuantisedBase | None = None
    """Where the weight is kept as codes: what says how."""
    _requantised: QuantisedBase | None = None
    """The same of a merged weight that was quantised again."""

    def _set_up(self, module: nn.Module, r: int, lora_alpha: float, use_rslora: bool) -> None:
        """Takes the options, checked, and the weight of the module to replace; others may own it,
        too."""
        name = type(self).__name__
        base = QuantisedBase.of(name, module)
        weight = check_weight(name, module._parameters.get("weight")) if base is None else base.parameter
        self.r = check_rank(name, r)
        self.lora_alpha = check_number(name, "lora_alpha", lora_alpha)
        self.use_rslora = check_flag(name, "use_rslora", use_rslora)
        self.scaling = self._initial_scaling()
        self.enabled = True
        self.weight = weight
        if base is not None:
            self._quantised = base
        self._made_on_meta = weight.is_meta
        values = vars(module) if base is None else {}
        self._origin = type(module), {key: value for key, value in values.items() if key not in _MODULE_KEYS}
        named = {"weight" if base is not None and name == base.codes else name: p for name, p in module._parameters.items()}
        self._origin_parameters = tuple(named)
        self._trained = [name for name, p in named.items() if p is not None and p.requires_grad]
        # the base weight while another is in its place; past nn.Module, which would register it
        self._unmerged: nn.Parameter | None = None

    def _initial_scaling(self) -> float:
        return initial_scaling(self.lora_alpha, self.r, self.use_rslora)

    def _adapted_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that makes a plain layer compute what this one does in eval mode, rounded once
        to its dtype; over codes to the one given, or the base's."""
        raise NotImplementedError

    def _base_weight(self) -> nn.Parameter:
        held = self._unmerged
        return self.weight if held is None else held

    def _base_weights(self) -> list[nn.Parameter]:
        """All that the layer adapts."""
        return [self._base_weight()]

    def _is_rescaled(self) -> bool:
        """Whether `set_scale` changed the layer."""
        return not math.isclose(self.scaling, self._initial_scaling(), rel_tol=1e-6)

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the adapter."""
        return self._unmerged is not None

    def merge(self, safe: bool = False, *, dtype: torch.dtype | None = None, requantise: bool = False) -> float | None:
        """Puts the adapter into `weight`: sums in float32 (float64 for float64), one rounding to
        the weight's dtype.

        While merged, `weight` is another parameter, the layer's own: a module that shared the base
        weight (a tied embedding) keeps it, and `unmerge` ties both again. So a merged layer holds
        two tensors of that size. Its `state_dict` is that of the plain layer with the merged
        weight; `save_adapter` still saves the adapter. With `safe`, values that are not finite are
        refused.

        Over a quantised base the merged weight is floating, of `dtype`: if not given, that in which
        the base weight was before it was quantised, as far as it says so. With `requantise` the
        library that quantised the base does so again, in the same way. That rounds: what is
        returned then is the relative error ‖Q(W') − W'‖ / ‖W'‖ of the merged W'.

        Raises:
            RuntimeError: the layer is merged already, or its weight is computed by pruning or a
                parametrization.
            TypeError: a flag is not True or False, or `dtype` is not a floating one.
            ValueError: `safe`, and the merged weight is not finite; or `dtype` or `requantise` for
                a base that is not quantised, or both. Nothing has changed.
            NotImplementedError: `requantise`, and the library cannot.
        """
        if self.merged:
            raise RuntimeError(f"{self._class_name()}: merge() on a merged layer; call unmerge() first")
        base = self._plain_weight("merge")
        own, again, error = self._merged_parameter(safe, dtype, requantise)
        with changing(self):
            self.__dict__["_unmerged"] = base
            self._requantised = again
            self._replace_weight(own)
        return error

    def check_merge(self, safe: bool = False, dtype: torch.dtype | None = None, requantise: bool = False) -> None:
        """Raises what `merge` would."""
        self._check_merge_options(safe, dtype, requantise)
        self._plain_weight("merge")
        if safe and not self.merged:
            self._merged_weight(safe, dtype)

    def _check_merge_options(self, safe: bool, dtype: torch.dtype | None, requantise: bool) -> None:
        name = self._class_name()
        check_flag(name, "merge: safe", safe)
        check_flag(name, "merge: requantise", requantise)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"{name}: merge: dtype must be float32, bfloat16, float16 or float64, found {dtype}")
        if self._quantised is None and (requantise or dtype is not None):
            given = "requantise" if requantise else "dtype"
            raise ValueError(f"{name}: merge: {given} is for a quantised base; this one is {self._base_weight().dtype}")
        if requantise and dtype is not None:
            raise ValueError(f"{name}: merge: dtype is of a floating weight; requantise=True makes none")

    def _merged_parameter(
        self, safe: bool, dtype: torch.dtype | None, requantise: bool
    ) -> tuple[nn.Parameter, QuantisedBase | None, float | None]:
        """The merged weight; and where it is quantised again, what says how, and its relative
        error."""
        self._check_merge_options(safe, dtype, requantise)
        base = self._quantised
        if base is None or not requantise:
            return nn.Parameter(self._merged_weight(safe, dtype), requires_grad=False), None, None
        adapted = self._merged_weight(safe, torch.float32)
        again = base.requantised(adapted)
        return again.parameter, again, relative_error(again.weight(torch.float32).dequantise(), adapted)

    def _merged_weight(self, safe: bool, dtype: torch.dtype | None = None) -> Tensor:
        # the merged tensor must be as the weight is: one made in inference mode could never be
        # trained through
        with torch.inference_mode(self.weight.is_inference()), torch.no_grad():
            adapted = self._adapted_weight(dtype)
        if safe:
            self._check_merged("weight", adapted)
        return adapted

    def _check_merged(self, name: str, adapted: Tensor) -> None:
        wrong = adapted.numel() - int(adapted.isfinite().sum())
        if wrong:
            raise ValueError(
                f"{self._class_name()}: merge(safe=True): the merged {name} must be finite, found {wrong} of"
                f" {adapted.numel()} values that are not; nothing has changed"
            )

    def _merged_as(self) -> tuple[bool, torch.dtype]:
        """Whether the merged weight was quantised again, and its dtype."""
        return self._requantised is not None, self.weight.dtype

    def unmerge(self) -> None:
        """Takes the adapter out of `weight`, which is then the parameter of before `merge`.

        Raises:
            RuntimeError: the layer is not merged, or its weight was pruned or parametrized since.
        """
        if self._unmerged is None:
            raise RuntimeError(f"{self._class_name()}: unmerge() on a layer that is not merged")
        self._plain_weight("unmerge")
        with changing(self):
            self._replace_weight(self._unmerged)
            self._unmerged = self._requantised = None

    def _plain_weight(self, call: str, name: str = "weight") -> nn.Parameter:
        weight = self._parameters.get(name)
        if weight is None:
            raise RuntimeError(
                f"{self._class_name()}: {call}() needs {name} to be a parameter, but pruning or a parametrization computes"
                " it; make that permanent first (torch.nn.utils.prune.remove, parametrize.remove_parametrizations)"
            )
        return weight

    def _replace_weight(self, weight: nn.Parameter) -> None:
        self._parameters["weight"] = weight

    def plain_layer(self, merged: bool, safe: bool = False) -> nn.Module:
        """The module that this layer replaced, anew: with its class, hooks and mode, and with the
        merged weight or the base's. A quantised base that is merged to floating numbers, as it is
        if the layer is not merged yet, gives an nn.Linear.

        Raises:
            RuntimeError: not `merged`, and the initialisation changed the base weight; or as merge.
            ValueError: as merge.
        """
        base = self._unmerged
        if not merged and self._base_changed():
            raise RuntimeError(
                f"{self._class_name()}: the first values of the adapter were taken out of the base weight (pissa, olora),"
                " so without it the weight is a residual; merge it"
            )
        weight, held = self._plain_weight("plain_layer"), self._quantised
        if not merged:
            weight = weight if base is None else base
        elif base is None:
            weight, held = nn.Parameter(self._merged_weight(safe), requires_grad=False), None
        else:
            held = self._requantised
        return self._furnished(held, {"weight": weight})

    def _furnished(self, held: QuantisedBase | None, weights: dict[str, nn.Parameter]) -> nn.Module:
        """The module that this layer replaced, with these weights and what else the layer holds of
        it."""
        plain = self._empty_origin(held)
        for hooks in HOOKS:
            setattr(plain, hooks, getattr(self, hooks))
        for name in self._plain_names(held):
            as_there = held.codes if held is not None and name == "weight" else name
            plain.register_parameter(as_there, parameter := weights.get(name, self._parameters[name]))
            if name in self._trained and parameter is not None:
                parameter.requires_grad_(True)
        for name in plain_buffers(self):
            plain.register_buffer(name, self._buffers[name], persistent=name not in self._non_persistent_buffers_set)
        plain.training = self.training
        return plain

    def _plain_names(self, held: QuantisedBase | None) -> tuple[str, ...]:
        """The parameters of the plain module: without those that codes had, if it has become
        floating."""
        return ("weight", "bias") if held is None and self._quantised is not None else self._origin_parameters

    def _empty_origin(self, held: QuantisedBase | None) -> nn.Module:
        """The module that this layer replaced, without its parameters; of a quantised one that has
        become floating, an nn.Linear."""
        if held is not None:
            return held.shell()
        kind, values = self._origin
        if self._quantised is not None:
            kind, values = nn.Linear, {"out_features": self._quantised.shape[0], "in_features": self._quantised.shape[1]}
        plain: nn.Module = kind.__new__(kind)
        nn.Module.__init__(plain)
        vars(plain).update(values)
        rebind_forward(plain)
        return plain

    def _base_changed(self) -> bool:
        """Whether making the adapter changed the base weight."""
        return False

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
        self.enabled = check_flag(self._class_name(), "enable_adapter: enabled", enabled)

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
            if self._quantised is not None:
                fn = keeping_codes(fn, self._quantised, self._requantised)
            if self._unmerged is not None:
                # as one of the parameters: what is tied to it must stay so
                self._parameters["_unmerged"] = self._unmerged
            try:
                return super()._apply(fn, recurse)
            finally:
                if self._unmerged is not None:
                    self.__dict__["_unmerged"] = self._parameters.pop("_unmerged")
                self._share_parameters()

    def _share_parameters(self) -> None:
        """Gives what says how codes lie the parameters that the layer has now."""
        if self._quantised is not None:
            self._quantised.take({**self._parameters, "weight": self._base_weight()})
        if self._requantised is not None:
            self._requantised.take(self._parameters)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = self._requantised if self.merged else self._quantised
        if self.merged:
            # with the adapter beside it, a reader would add it twice
            for name in self._parameters.keys() - {*self._plain_names(held)}:
                destination.pop(f"{prefix}{name}", None)
        if held is not None:
            held.save(destination, prefix, keep_vars)

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
            if self._quantised is not None:
                state_dict = self._quantised.named_weight(state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            if self._quantised is not None:
                self._share_parameters()
                self._quantised.load(state_dict, prefix, unexpected_keys, error_msgs)
                self._share_parameters()

    def _adapter_repr(self) -> str:
        text = f"r={self.r}, lora_alpha={self.lora_alpha:g}, scaling={self.scaling:g}"
        text += ", merged=True" if self.merged else ""
        return text if self.enabled else f"{text}, enabled=False"


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_MODULE_KEYS = frozenset(vars(nn.Module()))


def keeping_codes(fn: Callable[[Tensor], Tensor], *bases: Any) -> Callable[[Tensor], Tensor]:
    """A function of `_apply` that casts neither codes, which may lie in memory of a floating dtype,
    nor their scales."""
    held = [base for base in bases if base is not None]

    def kept(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if any(base.is_scale(tensor) for base in held) and moved.dtype is not tensor.dtype:
            return tensor.to(moved.device)
        return moved

    return kept


def plain_buffers(layer: nn.Module) -> list[str]:
    """The buffers that a layer has from the module that it replaced."""
    return [name for name in layer._buffers if not name.startswith("initial_")]


def initial_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """What the adapter's product is multiplied with."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def freeze_parameters(*parameters: nn.Parameter | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            parameter.requires_grad_(False)
