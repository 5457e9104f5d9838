"""A layer in the place of a module of experts, with all that the module has."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.base import AdapterLayer
from lora_kernels.nn.flat_parameters import constant
from lora_kernels.nn.quantised_experts import plain_class
from lora_kernels.nn.quantised_experts_base import QuantisedExperts
from lora_kernels.ops.quantised import QuantisedWeight


class StandIn(AdapterLayer):
    """A layer with a module's parameters, buffers, modules, attributes and methods, by their names.
    Codes stand under the name of their parameter."""

    _quantised: QuantisedExperts | None = None  # type: ignore[assignment]
    _requantised: QuantisedExperts | None = None  # type: ignore[assignment]
    _unmerged: dict[str, nn.Parameter] | None  # type: ignore[assignment]

    def _take_over(self, module: nn.Module) -> None:
        held, plain = self._quantised, frozenset(vars(nn.Module()))
        self._origin = plain_class(module), {key: value for key, value in vars(module).items() if key not in plain}
        vars(self).update(self._origin[1])
        parameters = module._parameters if held is None else held.parameters()
        self._origin_parameters = tuple(parameters)
        self._trained = [name for name, p in parameters.items() if p is not None and p.requires_grad]
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            if held is None or name != "parametrizations":
                self.add_module(name, child)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # what the forwards of experts call is the class's
            origin = self.__dict__.get("_origin")
            if origin is None or name.startswith("__"):
                raise
            for cls in origin[0].__mro__:
                if name in vars(cls):
                    found = vars(cls)[name]
                    return found.__get__(self, type(self)) if hasattr(found, "__get__") else found
            raise

    def _count(self, name: str) -> int:
        """Of how many experts a parameter is."""
        held, w = self._quantised, self._parameters.get(name)
        found: int = getattr(self, name).shape[0] if w is None else w.shape[0]
        return held.shapes[name][0] if held is not None and name in held.shapes else found

    def _weight_in(self, name: str, dtype: torch.dtype | None = None) -> Tensor | QuantisedWeight:
        """The base weight as the ops take it: over codes in a dtype, or that which it was in
        before."""
        held = self._quantised
        if held is None or name not in held.names:
            return self._frozen(name)
        return held.weight(name, held.dtype if dtype is None else dtype)

    def _like(self, name: str) -> Tensor:
        """A tensor with the shape, dtype and device of the base weight."""
        held = self._quantised
        return self._frozen(name) if held is None or name not in held.names else held.like(name)

    def _frozen(self, name: str) -> Tensor:
        w: Tensor = getattr(self, name)
        return constant(self, name, w) if w.requires_grad else w

    def _plain_names(self, held: Any) -> tuple[str, ...]:
        return self._origin_parameters

    def _empty_origin(self, held: Any) -> nn.Module:
        kind, values = self._origin
        plain: nn.Module = kind.__new__(kind)
        nn.Module.__init__(plain)
        vars(plain).update({key: vars(self).get(key, value) for key, value in values.items()})
        return plain

    def _plain_module(self, weights: dict[str, nn.Parameter]) -> nn.Module:
        """The module, anew, with some weights of these in the place of the layer's."""
        plain = self._furnished(None, weights)
        for name, module in self._modules.items():
            plain.add_module(name, module)
        held = self._quantised if weights or self._requantised is None else self._requantised
        if held is not None:
            held.put_into(plain)
        return plain

    def _share_parameters(self) -> None:
        if self._quantised is not None:
            self._quantised.take({**self._parameters, **(self._unmerged or {})})
        if self._requantised is not None:
            self._requantised.take(self._parameters)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None and self._quantised is not None and self._requantised is None:
            self._quantised.save(destination, prefix, keep_vars, self._unmerged)
