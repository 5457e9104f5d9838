"""Which modules of experts can be adapted, and how PEFT takes their parameters."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.checks import check_weight
from lora_kernels.nn.forms import LINEAR, ROUTED, SORTED, Form, form_of
from lora_kernels.nn.quantised_experts import experts_weight, parameter_names, plain_class
from lora_kernels.ops.quantised import QuantisedWeight

MAGNITUDE = "lora_magnitude_vector"
_INDICES = (torch.int64, torch.int32)
_OWN = frozenset(
    "adapted r lora_alpha use_rslora use_dora detach_norm scaling enabled _init _norms _unmerged _transposed _origin"
    " _origin_parameters _trained _changes _quantised".split()
)
"""The attributes of the adapter's layer, which has those of the module, too."""


def experts_refusal(module: nn.Module, parameters: Iterable[str] = ()) -> str | None:
    """Why a module's `parameters` cannot be adapted by LoRAExperts, in words; None if they can."""
    form = form_of(module)
    if isinstance(form, str):
        return form
    cls = plain_class(module).__name__
    if form.kind == LINEAR:
        return f"{cls} has one matrix and no experts"
    if form.kind not in (ROUTED, SORTED):
        return f"the calls of {cls} are {form.kind}, which the adapter's layer does not take"
    if unknown := [name for name in parameters if name not in form.weights]:
        return f"{unknown[0]} is none of the matrices of {cls}: {', '.join(form.weights)}"
    if "forward" in vars(module):
        return f"{cls} has a forward of its own, which the adapter's layer would replace"
    if taken := sorted(_OWN & vars(module).keys()):
        return f"{cls} has an attribute {taken[0]}, as the adapter's layer does"
    weights: list[Any] = [experts_weight(module, name) for name in form.weights]
    for name, weight in zip(form.weights, weights, strict=True):
        if isinstance(weight, str):
            return f"{name} of {cls} cannot be read: {weight}"
        try:
            if not isinstance(weight, QuantisedWeight):
                check_weight(cls, weight, name)
        except TypeError as error:
            return str(error)
    for weight in weights:
        if weight.dim() != 3 or (weight.dtype, weight.shape[0]) != (weights[0].dtype, weights[0].shape[0]):
            shapes = ", ".join(f"{each.dtype} {list(each.shape)}" for each in weights)
            return f"the weights of {cls} must be [experts, …] in one dtype, found {shapes}"
    if weights[0].shape[0] == 1 and getattr(module, "is_transposed", False):
        return f"{cls} has one expert, whose [in, out] PEFT takes for [out, in]"
    return None


def experts_shape(module: nn.Module, name: str) -> torch.Size:
    """[experts, …] of a parameter, or of the numbers that its codes stand for."""
    held = vars(module).get("_quantised")
    if held is not None and name in held.shapes:
        shape: torch.Size = held.shapes[name]
        return shape
    weight: Any = experts_weight(module, name)
    if isinstance(weight, str):
        raise TypeError(f"{name} of {plain_class(module).__name__} cannot be read: {weight}")
    return weight.shape


def peft_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(experts, out, in) of a parameter as PEFT's ParamWrapper takes it."""
    experts, *matrix = experts_shape(module, name)
    n_out, n_in = matrix[::-1] if getattr(module, "is_transposed", False) else matrix
    return experts, n_out, n_in


def file_shapes(module: nn.Module, name: str, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that PEFT's files have of a parameter, and lora_magnitude_vector, which only ours
    have."""
    experts, n_out, n_in = peft_shape(module, name)
    form: Any = form_of(module, vars(module).get("_origin", (None,))[0])
    magnitude = experts, experts_shape(module, name)[2 if form.transposed else 1]
    return {"lora_A.weight": (r * experts, n_in), "lora_B.weight": (n_out, r * experts), MAGNITUDE: magnitude}


def most_of_index(module: Any, experts: int) -> int | None:
    """The largest number that the choices of so many experts may have, where that is known: theirs
    or, of no expert, how many there are; expert parallelism takes any beyond for the latter."""
    return None if getattr(module, "_is_expert_parallel", False) else experts


def routed_fault(args: tuple[Any, ...], most: int | None) -> TypeError | ValueError | None:
    """What keeps (x, index, weights) from being the arguments of experts that a router chooses, of
    numbers up to `most`."""
    if len(args) != 3 or not all(isinstance(t, Tensor) for t in args):
        kinds = ", ".join(type(t).__name__ for t in args)
        return TypeError(f"wanted are three tensors, (x, index, weights), found ({kinds})")
    x, index, weights = args
    if x.dim() != 2 or index.dim() != 2 or index.shape != weights.shape or len(index) != len(x):
        found = ", ".join(str(list(t.shape)) for t in args)
        return ValueError(f"x must be [tokens, in], index and weights [tokens, k], found {found}")
    if index.dtype not in _INDICES or not weights.is_floating_point():
        return TypeError(f"index must be int64 or int32 and weights floating, found {index.dtype} and {weights.dtype}")
    if index.is_cpu and not torch.compiler.is_compiling() and index.numel():
        least, largest = map(int, torch.aminmax(index))
        if least < 0:
            return ValueError("index must hold numbers of experts, found a negative one")
        if most is not None and largest > most:
            return ValueError(f"index must hold numbers of experts up to {most}, found {largest}")
    return None


def sorted_fault(args: tuple[Any, ...], experts: int, features: int) -> TypeError | ValueError | None:
    """What keeps (x,) from being as many tokens of so many features for each of the experts."""
    if len(args) != 1 or not isinstance(args[0], Tensor):
        kinds = ", ".join(type(t).__name__ for t in args)
        return TypeError(f"wanted is one tensor, x, found ({kinds})")
    (x,) = args
    if x.dim() == 0 or x.numel() % (experts * features):
        wanted = f"as many tokens of {features} features for each of the {experts} experts"
        return ValueError(f"x must hold {wanted}, found {list(x.shape)}")
    return None


def check_sorted(layer: str, args: tuple[Any, ...], experts: int, features: int) -> Tensor:
    """x of such a call."""
    if (fault := sorted_fault(args, experts, features)) is not None:
        raise type(fault)(f"{layer}: {fault}")
    x: Tensor = args[0]
    return x


def check_routed(layer: str, args: tuple[Any, ...], module: Any, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, index and weights of a call of the module, if they fit together."""
    if (fault := routed_fault(args, most_of_index(module, experts))) is not None:
        raise type(fault)(f"{layer}: {fault}")
    x, index, weights = args
    return x, index, weights


def check_parameters(layer: str, module: nn.Module, form: Form, parameters: Iterable[str] | None) -> tuple[str, ...]:
    """The parameters to adapt, in the order in which the module has them."""
    if isinstance(parameters, str):
        raise TypeError(f"{layer}: parameters must be names of matrices, found the string {parameters!r}")
    wanted = set(form.weights if parameters is None else parameters)
    if not wanted or not wanted <= set(form.weights):
        raise ValueError(f"{layer}: parameters must be some of {', '.join(form.weights)}, found {sorted(map(str, wanted))}")
    return tuple(name for name in parameter_names(module, form.weights) if name in wanted)


def for_each(layer: str, option: str, value: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """An option's value for each parameter."""
    if not isinstance(value, Mapping):
        return [(name, value) for name in names]
    if set(value) != set(names):
        raise ValueError(f"{layer}: {option} must be a number, or one for each of {', '.join(names)}, found {dict(value)}")
    return [(name, value[name]) for name in names]
