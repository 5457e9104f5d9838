"""The parameters of experts, [experts, out, in], as a pool names them and serves them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lora_kernels.nn.forms import ROUTED, Form, form_of
from lora_kernels.ops.lora_linear.op import FLOATS

KEY = "_lora_experts"
"""Where a served module of experts has what serves it."""


@dataclass(frozen=True, eq=False)
class Experts:
    """One weight of a module of experts, as a layer of a pool."""

    module: nn.Module
    parameter: str
    form: Form

    @property
    def weight(self) -> Tensor:
        found = self.module._parameters[self.parameter]
        assert found is not None
        return found

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.weight.shape[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """[out, in] of each."""
        one, other = self.weight.shape[1:]
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
    kind = type(module).__name__
    if isinstance(form, str):
        return f"{kind}: {form}"
    if form.kind != ROUTED or "forward" in vars(module):
        return f"{kind}: its forward is not that of experts that a router chooses for each token"
    names = form.weights if wanted is None else (wanted,)
    found = {f"{path}.{each}": Experts(module, each, form) for each in names if each in form.weights}
    if not found:
        return f"{parameter} of {kind}: its experts' matrices are {' and '.join(form.weights)}"
    # a call reads all matrices, also those that no adapter changes
    return next((why for each in form.weights if (why := _refusal(module, each))), found)


def _refusal(module: nn.Module, parameter: str) -> str | None:
    w = module._parameters.get(parameter)
    what = f"{parameter} of {type(module).__name__}"
    if w is None or type(w) not in (Tensor, nn.Parameter) or w.dim() != 3 or w.dtype not in FLOATS:
        return f"{what}: it is no floating parameter of three dimensions in memory"
    count = getattr(module, "num_experts", w.shape[0])
    return None if count == w.shape[0] else f"{what}: it is of {w.shape[0]} of the module's {count} experts"
