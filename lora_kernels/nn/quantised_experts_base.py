"""What stands under adapters where the matrices of experts are kept as codes: another library's
module, held beside the parameters that the layer shares with it."""

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_kernels.nn.experts import multiplies
from lora_kernels.nn.forms import Form
from lora_kernels.nn.kept_weight import KeptExperts
from lora_kernels.nn.quantised_base import load_state, relative_error
from lora_kernels.nn.quantised_experts import (
    is_fp8,
    is_parametrised,
    keeps_numbers_for_a_call,
    may_hold_codes,
    parameter_names,
    plain_class,
    quantised_experts,
)
from lora_kernels.ops.lora_linear.op import FLOATS
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.quantised.requantise import requantised

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class QuantisedExperts:
    """A module of experts some of whose `weights` are codes, as a layer computes with it.

    Raises:
        TypeError: a matrix of codes cannot be read; the message says why.
    """

    def __init__(self, module: nn.Module, weights: Iterable[str]) -> None:
        self.module: Any = module
        self.weights = tuple(weights)
        """All matrices of the module."""
        self.dtype = self._dtype_of_numbers()
        """What the numbers were in before they were quantised, or are of matrices beside them; as
        far as the module says so."""
        found = self._read()
        for each in found.values():
            if isinstance(each, str):
                raise TypeError(each)
        self.names = tuple(found)
        """Those of codes."""
        self.shapes = {name: each.shape for name, each in found.items()}
        self._kept = {name: KeptExperts(name) for name in found}
        self._traced: dict[str, Any] = found
        """What a compiler finds: it cannot look into the library's objects."""

    @staticmethod
    def of(module: nn.Module, weights: Iterable[str]) -> "QuantisedExperts | None":
        """Of a module of experts; None if it has no codes.

        Raises:
            TypeError: as the constructor.
        """
        held = QuantisedExperts(module, weights) if may_hold_codes(module) else None
        return held if held is not None and held.names else None

    def _read(self) -> dict[str, Any]:
        each = {name: quantised_experts(self.module, name, self.dtype) for name in self.weights}
        return {name: found for name, found in each.items() if found is not None}

    def _look_again(self) -> None:
        self._kept = {name: KeptExperts(name) for name in self.names}
        self.dtype = self._dtype_of_numbers()
        self._traced = self._read()

    def _dtype_of_numbers(self) -> torch.dtype:
        floating = [p.dtype for name in self.weights if (p := self.module._parameters.get(name)) is not None]
        states = (self.state(name) for name in self.weights if is_parametrised(self.module, name))
        said = getattr(vars(self.module).get("config"), "dtype", None) if is_fp8(type(self.module)) else None
        found = (*floating, *(getattr(state, "dtype", None) for state in states), said)
        return next((dtype for dtype in found if dtype in FLOATS), torch.get_default_dtype())

    def dtype_for(self, form: Form, x: Tensor) -> torch.dtype:
        """What the numbers are rounded to for a product of x: where the module casts x to them, or
        has floating matrices, too, the dtype that these have; else that of x."""
        return self.dtype if form.casts or len(self.names) < len(self.weights) else x.dtype

    def takes(self, form: Form, x: Tensor) -> bool:
        """Whether the module takes an x of that dtype; numbers of codes are made in any."""
        return len(self.names) == len(self.weights) or multiplies(form, self, x)

    def weight(self, name: str, dtype: torch.dtype) -> QuantisedWeight:
        """The matrix W [experts, …] of that name for inputs of a dtype, as the module has it now.

        Raises:
            RuntimeError: it cannot be read any more; the message says why.
        """
        if torch.compiler.is_compiling() and name in self._traced:
            traced: QuantisedWeight = self._traced[name]
            return traced.to(dtype)
        found = self._kept[name](self.module, dtype)
        if isinstance(found, str):
            raise RuntimeError(f"{plain_class(self.module).__name__}: {found}")
        return found

    def like(self, name: str) -> Tensor:
        """A tensor with the shape, dtype and device of W, for what asks no more of it."""
        codes = self.parameter(name)
        return torch.zeros(1, dtype=self.dtype, device=codes.device).expand(self.shapes[name])

    def output(self, args: tuple[Any, ...]) -> Tensor:
        """What the module alone makes of its arguments, as the library computes it."""
        with parametrize.cached():
            y: Tensor = self.module.forward(*args)
        return y

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        if is_parametrised(self.module, name):
            return self.module.parametrizations[name]._parameters, "original"
        return self.module._parameters, name

    def parameter(self, name: str) -> Any:
        """The parameter of that name, or that of its codes; None if there is none any more."""
        held, key = self._place(name)
        return held.get(key)

    def parameters(self) -> dict[str, Any]:
        """All parameters of the module, by the names that they have without parametrizations."""
        return {name: self.parameter(name) for name in parameter_names(self.module, self.weights)}

    def state(self, name: str) -> Any:
        """The QuantState of bitsandbytes' codes; None of others."""
        return self.module.parametrizations[name][0].quant_state if is_parametrised(self.module, name) else None

    def is_scale(self, tensor: Tensor) -> bool:
        """Whether a parameter is one of those that say what the codes mean, or the codes
        themselves."""
        scales = (self.module._parameters.get(f"{name}_scale_inv") for name in self.names)
        return any(tensor is p for p in (*map(self.parameter, self.names), *scales))

    def take(self, parameters: Mapping[str, nn.Parameter | None]) -> None:
        """Makes the module's parameters those of its layer again, and what stands beside the codes
        their companions."""
        for name in parameter_names(self.module, self.weights):
            held, key = self._place(name)
            held[key] = parameters[name]
        for name in self.names:
            if (state := self.state(name)) is not None:
                state.to(self.parameter(name).device)
        self._look_again()

    def save(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool, floating: Collection[str] = ()
    ) -> None:  # fmt: skip
        """Adds what the module's own `state_dict` has beside its codes, but of those that are
        `floating` now."""
        for name in self.names:
            state = None if name in floating else self.state(name)
            for key, part in {} if state is None else state.as_dict(packed=True).items():
                destination[f"{prefix}{name}.{key}"] = part

    def merge_refusal(self, requantise: bool) -> str | None:
        """Why adapters cannot be merged, in words; None if they can."""
        if requantise or not is_fp8(type(self.module)):
            return None
        return (
            "FP8Experts have no floating form: requantise=True merges to codes, a base loaded with dequantize=True to numbers"
        )

    def requantised(self, weights: Mapping[str, nn.Parameter]) -> tuple["QuantisedExperts", float]:
        """A module like this one with other numbers in some of its matrices, those of codes
        quantised in the form that they have; and the largest relative error of these."""
        cls, held, codes = self._parts()
        held["_parameters"] = {**held["_parameters"], **weights}
        worst = 0.0
        for name in (name for name in self.names if name in weights):
            numbers, old = weights[name].detach(), self.parameter(name)
            new = requantised(numbers, self.weight(name, torch.float32))
            worst = max(worst, relative_error(new.dequantise(), numbers))
            parameter = nn.Parameter(new.codes.view(old.dtype).view(old.shape), requires_grad=False)
            if name in codes:
                codes[name] = parameter, codes[name][1], _with_scales_of(new, codes[name][2])
                continue
            key = f"{name}_scale_inv"
            scales = self.module._parameters[key]
            new_scales = new.scales.to(scales.dtype).view(scales.shape)
            held["_parameters"] |= {name: parameter, key: nn.Parameter(new_scales, requires_grad=False)}
        for name in codes:
            held["_parameters"].pop(name, None)
        return QuantisedExperts(_parametrised(cls, held, codes), self.weights), worst

    @property
    def says_dtype(self) -> bool:
        """Whether the module says what its numbers were in."""
        return True

    def named_weight(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A `state_dict` of the module by the layer's names, which are the same."""
        return state_dict

    def load(self, state_dict: Mapping[str, Any], prefix: str, unexpected: list[str], errors: list[str]) -> None:
        """Takes what `save` added, beside the codes that the layer has loaded already."""
        for name in self.names:
            if (state := self.state(name)) is None:
                continue
            at = f"{prefix}{name}"
            found = {key: t for key, t in state_dict.items() if key.startswith(f"{at}.")}
            if not found and at in state_dict:
                errors.append(f"{at} has codes, and the state_dict nothing that says what they mean")
            new = load_state(state, found, at, self.parameter(name).device, errors)
            if new is not None:
                self.module.parametrizations[name][0].quant_state = new
            unexpected[:] = [key for key in unexpected if key not in found]

    def put_into(self, module: nn.Module) -> None:
        """Makes the codes among a plain module's parameters what they were: bitsandbytes'
        parametrizations, with the hooks that save them."""
        names = [name for name in self.names if module._parameters.get(name) is self.parameter(name)]
        for name in names:
            if (state := self.state(name)) is not None:
                kind = type(self.module.parametrizations[name][0])
                parametrize.register_parametrization(module, name, kind(state), unsafe=True)
        hooks: Any
        if names:
            module._state_dict_hooks = OrderedDict(self.module._state_dict_hooks)
        else:  # a dict of its own: the other is the layer's, too
            for hooks in _HOOKS:
                left = {key: hook for key, hook in getattr(module, hooks).items() if not keeps_numbers_for_a_call(hook)}
                setattr(module, hooks, OrderedDict(left))

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantisedExperts":
        again = object.__new__(QuantisedExperts)
        again.__dict__.update(self.__dict__)
        again.module = copy.deepcopy(self.module, memo)
        again._look_again()
        return again

    def _parts(self) -> tuple[type[nn.Module], dict[str, Any], dict[str, Any]]:
        """The class of the module, what it holds, and codes under parametrizations with these."""
        held = dict(vars(self.module))
        held["_modules"] = {key: m for key, m in self.module._modules.items() if key != "parametrizations"}
        first = {name: self.module.parametrizations[name][0] for name in self.names if is_parametrised(self.module, name)}
        codes = {name: (self.parameter(name), type(each), each.quant_state) for name, each in first.items()}
        return plain_class(self.module), held, codes

    def __getstate__(self) -> dict[str, Any]:
        """Of a module with parametrizations, which is never pickled, the parts."""
        return {**self.__dict__, "module": self._parts(), "_kept": {}, "_traced": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.module = _parametrised(*state["module"])
        self._look_again()


def _parametrised(cls: type[nn.Module], held: dict[str, Any], codes: dict[str, Any]) -> nn.Module:
    """The module of these parts."""
    module = cls.__new__(cls)
    vars(module).update(held)
    for name, (parameter, kind, state) in codes.items():
        module._parameters[name] = parameter
        parametrize.register_parametrization(module, name, kind(state), unsafe=True)
    return module


def _with_scales_of(w: QuantisedWeight, state: Any) -> Any:
    """A QuantState of bitsandbytes with the scales of a weight in its form."""
    new = copy.copy(state)
    new.absmax = w.scales.view(state.absmax.shape)
    if state.nested:
        new.state2, new.offset = copy.copy(state.state2), w.offset
        new.state2.absmax = w.outer
    return new
