"""The parameters of experts, [experts, out, in], as a pool names them and serves them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.forms import ROUTED, Form, form_of
from lora_kernels.nn.quantised_experts import experts_weight, plain_class
from lora_kernels.nn.quantised_experts_base import QuantisedExperts
from lora_kernels.ops.lora_linear.op import FLOATS
from lora_kernels.ops.quantised import QuantisedWeight

KEY = "_lora_experts"
"""Where a served module of experts has what serves it."""


@dataclass(frozen=True, eq=False)
class Experts:
    """One weight of a module of experts, as a layer of a pool."""

    module: nn.Module
    parameter: str
    form: Form

    codes: QuantisedExperts | None = None
    """Where the weight is kept as codes: what says how."""

    @property
    def weight(self) -> Tensor:
        """The parameter, or that of its codes."""
        found = self.module._parameters[self.parameter] if self.codes is None else self.codes.parameter(self.parameter)
        assert found is not None
        return found

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape if self.codes is None else self.codes.shapes[self.parameter]

    @property
    def dtype(self) -> torch.dtype:
        """What its products are in, as far as the module says so."""
        return self.weight.dtype if self.codes is None else self.codes.dtype

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.shape[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """[out, in] of each."""
        one, other = self.shape[1:]
        return (other, one) if self.form.transposed else (one, other)

    @property
    def has_bias(self) -> bool:
        return self.module._parameters.get(f"{self.parameter}_bias") is not None


def experts_at(modules: Mapping[str, nn.Module], name: str) -> dict[str, Experts] | str | None:
    """The weights of the module of experts that is called so, or the one that is, by their names;
    a text says why they cannot be served; None where the name is of something else.

    `modules` are those of the model, by name.
    """
    owner, _, parameter = name.rpartition(".")
    path, wanted = (owner, parameter) if name not in modules else (name, None)
    module = modules.get(path)
    if module is None:
        return None
    # those that a parametrization computes are no parameters
    three = any(p is not None and p.dim() == 3 for p in module._parameters.values())
    if not three and "parametrizations" not in module._modules:
        return None
    form = form_of(module)
    kind = plain_class(module).__name__
    if isinstance(form, str):
        return f"{kind}: {form}"
    if form.kind != ROUTED or not _is_called_by_its_class(module):
        return f"{kind}: its forward is not that of experts that a router chooses for each token"
    names = form.weights if wanted is None else (wanted,)
    # a call reads all matrices, also those that no adapter changes
    if (why := next((why for each in form.weights if (why := _refusal(module, each))), None)) is not None:
        return why
    held = QuantisedExperts.of(module, form.weights)
    of_codes = () if held is None else held.names
    found = {f"{path}.{p}": Experts(module, p, form, held if p in of_codes else None) for p in names if p in form.weights}
    return found or f"{parameter} of {kind}: its experts' matrices are {' and '.join(form.weights)}"


def _is_called_by_its_class(module: nn.Module) -> bool:
    """Whether its forward is its class's, or what `serve` has put around that."""
    own = vars(module).get("forward")
    return own is None or (KEY in vars(module) and getattr(own, "_lora_kernels_before", None) == {})


def _refusal(module: nn.Module, parameter: str) -> str | None:
    w: Any = experts_weight(module, parameter)
    what = f"{parameter} of {plain_class(module).__name__}"
    if isinstance(w, str):
        return f"{what}: {w}"
    plain = type(w) in (Tensor, nn.Parameter) and w.dim() == 3 and w.dtype in FLOATS
    if not plain and type(w) is not QuantisedWeight:
        return f"{what}: it is no floating parameter of three dimensions in memory"
    count = getattr(module, "num_experts", w.shape[0])
    return None if count == w.shape[0] else f"{what}: it is of {w.shape[0]} of the module's {count} experts"


class CodedMatrix:
    """The codes of one weight of experts, as a pool knows them.

    Raises:
        TypeError: they cannot be read.
    """

    def __init__(self, module: nn.Module, parameter: str) -> None:
        held = QuantisedExperts.of(module, (parameter,))
        if held is None:
            raise TypeError(f"{parameter} of {plain_class(module).__name__} has no codes any more")
        self._held, self._parameter = held, parameter

    @property
    def shape(self) -> torch.Size:
        return self._held.shapes[self._parameter]

    def weight(self, dtype: torch.dtype) -> QuantisedWeight:
        """W for inputs of a dtype."""
        return self._held.weight(self._parameter, dtype)
