"""The quantised weight of one layer, or of experts, kept while the library's module holds the parts
it is made of: to look at them costs a tenth of making it anew."""

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.quantised import quantised_weight
from lora_kernels.nn.quantised_experts import quantised_experts
from lora_kernels.ops.quantised import QuantisedWeight

_PLAIN = (Tensor, nn.Parameter)


class KeptWeight:
    """The last `QuantisedWeight` of one layer for each dtype; call it with the module as it stands
    and the dtype of the input. Threads may do so at the same time, each with a dtype of its own.

    It is given again while the parts that the module holds are the same objects at the same
    address, and no version of theirs changed. Codes and float32 scales are not copied, so an edit
    of them shows at once; one through `.data` of parts that are copied, as the scales of int8 are,
    shows after `clear()`.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[torch.dtype, tuple[Any, ...]] = {}

    def clear(self) -> None:
        """Forgets the weights."""
        self._held = {}

    def __call__(self, module: nn.Module, dtype: torch.dtype) -> QuantisedWeight | str:
        """`quantised_weight(module, dtype)`."""
        parts, rest = _parts(module)
        held = self._held.get(dtype)
        if held is not None and held[1] == rest and all(map(is_, parts, held[0])):
            kept: QuantisedWeight = held[2]
            return kept
        with torch.inference_mode(False):  # it stays for calls that autograd records
            found = quantised_weight(module, dtype)
        self._keep(dtype, parts, rest, found)
        return found

    def _keep(self, dtype: torch.dtype, parts: tuple[Any, ...], rest: tuple[Any, ...], found: Any) -> None:
        if isinstance(found, QuantisedWeight):
            # what another dtype's calls still hold of an older state would keep its memory
            same = {d: each for d, each in self._held.items() if all(map(is_, parts, each[0]))}
            self._held = {**same, dtype: (parts, rest, found)}

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptWeight":
        return KeptWeight()

    def __reduce__(self) -> Any:
        return KeptWeight, ()


class KeptExperts(KeptWeight):
    """The same of one parameter of a module of experts."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __call__(self, module: nn.Module, dtype: torch.dtype) -> QuantisedWeight | str:
        """`quantised_experts(module, name, dtype)`; a text, too, where the parameter is of codes no
        more."""
        name = self._name
        parts, rest = _parts_of_experts(module, name)
        held = self._held.get(dtype)
        if held is not None and held[1] == rest and all(map(is_, parts, held[0])):
            kept: QuantisedWeight = held[2]
            return kept
        with torch.inference_mode(False):
            found = quantised_experts(module, name, dtype)
        self._keep(dtype, parts, rest, found)
        return f"{name} is of codes no more" if found is None else found

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptExperts":
        return KeptExperts(self._name)

    def __reduce__(self) -> Any:
        return KeptExperts, (self._name,)


def _parts(module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What `quantised_weight` looks at in a module: the objects, and the addresses of codes and the
    versions of what may be copied."""
    held = module.__dict__
    if "compute_type_is_set" in held:
        return _parts_of_4bit(module)
    if "state" in held:
        return _parts_of_8bit(module)
    weight: Any = module._parameters.get("weight")
    # HQQ's numbers beside its codes, or those of torchao's tensors
    beside = held["meta"] if type(held.get("meta")) is dict else getattr(weight, "__dict__", {})
    status = held.get("quantization_scheme"), held.get("quantization_status")
    parts = *module._parameters.values(), *module._buffers.values(), *beside.values(), *status
    tensors = [part for part in parts if type(part) in _PLAIN]
    copies = 0
    if weight is not None and type(weight) not in _PLAIN:
        with torch._C.DisableTorchFunctionSubclass():
            # which the tensors that torchao's holds do not count
            copies = weight._version
    return parts, (copies, *(t.data_ptr() for t in tensors), *_versions(*tensors))


def _parts_of_8bit(module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    weight, int8 = module._parameters.get("weight"), module.__dict__["state"]
    codes, largest = int8.CB, int8.SCB
    if largest is None:
        largest = getattr(weight, "SCB", None)
    return (weight, codes, largest), (_address(weight), int8.has_fp16_weights, *_versions(largest))


def _parts_of_4bit(module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return (None,), ()
    address = _address(weight)
    state: Any = weight.__dict__.get("quant_state")
    if state is None:
        state = module.__dict__.get("quant_state")
    if state is None:
        return (weight, None), (address,)
    return _parts_of_state(weight, state, address)


def _parts_of_state(weight: Any, state: Any, address: int | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    packed = state.__dict__.get("packing_format_for_cpu", False)
    if not state.nested:
        return (weight, state, state.absmax, state.code), (address, packed, *_versions(state.absmax, state.code))
    outer = state.state2
    parts = (state.absmax, state.code, state.offset, outer.absmax, outer.code)
    return (weight, state, outer, *parts), (address, packed, *_versions(*parts))


def _parts_of_experts(module: Any, name: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What `quantised_experts` looks at."""
    held: Any = module._modules.get("parametrizations")
    if held is not None:
        if name not in held._modules:
            return (None,), ()
        found = held._modules[name]
        weight, first = found._parameters.get("original"), found._modules["0"]
        state = first.__dict__.get("quant_state")
        if state is None or weight is None or len(found._modules) > 1:
            return (weight, state, *found._modules.values()), ()
        return _parts_of_state(weight, state, _address(weight))
    parts = module._parameters.get(name), module._parameters.get(f"{name}_scale_inv")
    return parts, (*map(_address, parts), *_versions(*parts), module.__dict__.get("block_size"))


def _address(weight: Any) -> int | None:
    # the class of a 4-bit weight asks Python for each attribute
    with torch._C.DisableTorchFunctionSubclass():
        return None if weight is None else weight.data_ptr()


def _versions(*tensors: Tensor | None) -> list[int]:
    return [-1 if t is None or t.is_inference() else t._version for t in tensors]
