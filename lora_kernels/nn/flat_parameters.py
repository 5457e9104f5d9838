"""Parameters that FSDP (FullyShardedDataParallel) flattened: in a call they are views of one flat
parameter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

VIEWS = "the weights are FSDP's views and no parameters"
_CONSTANT = "_lora_kernels_constant"


def frozen_view(module: nn.Module, name: str, view: Tensor) -> bool:
    """Whether a tensor that requires grad is the view of a frozen parameter of the module: one
    trained parameter beside it makes the whole flat parameter require grad."""
    flat: Any = view._base
    params = getattr(flat, "_params", None)
    if params is None:  # without use_orig_params all of a flat parameter is frozen, or nothing
        return False
    own = ((module, name) == (info.module, info.param_name) for info in flat._param_infos)
    shared = ((module, name) == (info.module, info.param_name) for info in flat._shared_param_infos)
    found = [p for p, here in zip(params, own, strict=True) if here]
    found += [p for p, here in zip(flat._shared_params, shared, strict=True) if here]
    return bool(found) and not found[0].requires_grad


def constant(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The parameter of a module; where it is a frozen one's view, one tensor without grad as long
    as the view lives."""
    # a compiler can neither read nor keep what stands beside a tensor
    if not parameter.requires_grad or torch.compiler.is_compiling() or not frozen_view(module, name, parameter):
        return parameter
    held = vars(parameter)
    if _CONSTANT not in held:
        held[_CONSTANT] = parameter.detach()
    return held[_CONSTANT]


def are_attributes(*modules: nn.Module) -> bool:
    """Whether a weight of the modules is FSDP's view and no parameter, as without
    use_orig_params."""
    return any("weight" not in m._parameters and isinstance(vars(m).get("weight"), Tensor) for m in modules)


@contextmanager
def registered(module: nn.Module) -> Iterator[None]:
    """Inside it such views are parameters of the module's modules, as they are with
    use_orig_params."""
    added: list[tuple[dict[str, Any], str]] = []
    for each in module.modules():
        for name in ("weight", "bias"):
            view: Any = vars(each).get(name)
            parameters: dict[str, Any] = each._parameters
            if name not in parameters and isinstance(view, Tensor):
                parameters[name] = view
                added.append((parameters, name))
    try:
        yield
    finally:
        for parameters, name in added:
            del parameters[name]
