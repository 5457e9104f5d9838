"""What stands under an adapter where the base weight is kept as codes: another library's module,
held beside the parameters that the layer shares with it."""

import copy
import sys
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.kept_weight import KeptWeight
from lora_kernels.nn.quantised import holds_codes, quantised_weight
from lora_kernels.ops.lora_linear import lora_linear
from lora_kernels.ops.lora_linear.op import FLOATS
from lora_kernels.ops.quantised import QuantisedWeight

BESIDE_CODES = ("quant_state", "state")
"""The attributes of bitsandbytes' modules that say what their codes mean."""


class QuantisedBase:
    """A quantised module as a layer computes with it. On a CPU the module itself is never called:
    of bitsandbytes' the first call in eval mode would pack the codes anew, and round their scales.

    Raises:
        TypeError: the module's weight cannot be read; the message says why.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.codes = "weight_packed" if "weight_packed" in module._parameters else "weight"
        """The module's name for what is the layer's `weight`."""
        self._kept = KeptWeight()
        self._look_at_dtype()
        found = quantised_weight(module, self.dtype)
        if isinstance(found, str):
            raise TypeError(found)
        self.shape = found.shape
        self._traced: QuantisedWeight | None = found
        """What a compiler finds: it cannot look into the library's parameter."""

    def _look_again(self) -> None:
        self._kept = KeptWeight()
        self._look_at_dtype()
        found = quantised_weight(self.module, self.dtype)
        self._traced = None if isinstance(found, str) else found

    def _look_at_dtype(self) -> None:
        said = _floating_dtype(self.module)
        self.says_dtype = said is not None
        self.dtype = torch.get_default_dtype() if said is None else said
        """What the weight was in before it was quantised, as far as the module says so."""

    @staticmethod
    def of(layer: str, module: nn.Module) -> "QuantisedBase | None":
        """Of a module that is to get an adapter; None if it is not quantised.

        Raises:
            TypeError: its weight cannot be read; the message names the layer.
        """
        if not holds_codes(module):
            return None
        try:
            return QuantisedBase(module)
        except TypeError as error:
            raise TypeError(f"{layer}: the weight of the {type(module).__name__} cannot be read: {error}") from None

    def weight(self, dtype: torch.dtype) -> QuantisedWeight:
        """W for inputs of a dtype, as the module has it now.

        Raises:
            RuntimeError: it cannot be read any more; the message says why.
        """
        if torch.compiler.is_compiling() and self._traced is not None:
            return self._traced.to(dtype)
        found = self._kept(self.module, dtype)
        if isinstance(found, str):
            raise RuntimeError(f"{type(self.module).__name__}: {found}")
        return found

    def compute_dtype(self, x: Tensor | None) -> torch.dtype:
        """What the product of x is computed in: the module's own dtype where it was given one, else
        that of x; without an x, that of the weight before it was quantised."""
        held = self.module.__dict__
        given = held.get("compute_dtype") if held.get("compute_type_is_set", True) else None
        if given is not None:
            return given
        return self.dtype if x is None else x.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias in the dtype of x, with the gradients of x and bias; on other devices than
        the CPU, as the library computes it."""
        if x.device.type != "cpu":
            return self.module.forward(x)
        return product_of_codes(x, self.weight(x.dtype), bias)

    def output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the module alone makes of x: in its compute dtype, and back to that of x."""
        dtype = self.compute_dtype(x)
        y = self.product(x if x.dtype is dtype else x.to(dtype), bias)
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def like_weight(self) -> Tensor:
        """A tensor with the shape and device of W, for what asks no more of it."""
        return self.weight(self.dtype).scales.new_zeros(1, dtype=torch.float32).expand(self.shape)

    def shell(self) -> nn.Module:
        """A copy of the module without its parameters."""
        module = copy.copy(self.module)
        module._parameters, module._buffers = {}, dict(module._buffers)
        rebind_forward(module)
        weight = self.parameter
        if getattr(weight, "quant_state", None) is not None:
            module.quant_state, weight.module = weight.quant_state, module
        return module

    @property
    def parameter(self) -> Any:
        """The module's parameter that holds the codes."""
        return self.module._parameters[self.codes]

    def is_scale(self, tensor: Tensor) -> bool:
        """Whether a parameter is one of those that say what the codes mean, or the codes
        themselves."""
        return any(tensor is p for name, p in self.module._parameters.items() if name != "bias")

    def take(self, parameters: Mapping[str, nn.Parameter | None]) -> None:
        """Makes the module's parameters those of its layer again, and what stands beside the codes
        their companions."""
        for name in self.module._parameters:
            self.module._parameters[name] = parameters["weight" if name == self.codes else name]
        self._look_beside()

    def _look_beside(self) -> None:
        weight = self.parameter
        held: Any
        for held in (weight, self.module.__dict__.get("state")):
            if getattr(held, "CB", None) is not None:
                held.CB = weight.data  # the same memory, which a move or a copy would double
            if getattr(held, "SCB", None) is not None:
                held.SCB = held.SCB.to(weight.device)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            state.to(weight.device)
            self.module.quant_state, weight.module = state, self.module
        self._look_again()

    def save(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds what the module's own `state_dict` has beside the weight, and that by its name
        there."""
        if self.codes != "weight":
            destination.pop(f"{prefix}weight", None)
        self.module._save_to_state_dict(destination, prefix, keep_vars)

    def named_weight(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A `state_dict` of the module in which the codes are the layer's `weight`."""
        codes = None if self.codes == "weight" else state_dict.get(f"{prefix}{self.codes}")
        return state_dict if codes is None else {**state_dict, f"{prefix}weight": codes}

    def load(self, state_dict: Mapping[str, Any], prefix: str, unexpected: list[str], errors: list[str]) -> None:
        """Takes what `save` added, beside the codes that the layer has loaded already."""
        if self.codes != "weight":
            unexpected[:] = [key for key in unexpected if key != f"{prefix}{self.codes}"]
        state = getattr(self.parameter, "quant_state", None) or self.module.__dict__.get("quant_state")
        if state is not None:
            found = {key: state_dict[key] for key in state_dict if key.startswith(f"{prefix}weight.")}
            self._load_state(state, found, prefix, errors)
        elif "state" in self.module.__dict__:
            found = {key: state_dict[key] for key in (f"{prefix}SCB", f"{prefix}weight_format") if key in state_dict}
            self._load_scales(found, prefix, errors)
        else:
            return
        if not found and f"{prefix}weight" in state_dict:
            errors.append(f"{prefix}weight has codes, and the state_dict nothing that says what they mean")
        unexpected[:] = [key for key in unexpected if key not in found]

    def _load_state(self, state: Any, found: dict[str, Tensor], prefix: str, errors: list[str]) -> None:
        weight = self.module.weight
        new = load_state(state, found, f"{prefix}weight", weight.device, errors)
        if new is not None:
            weight.quant_state = self.module.quant_state = new

    def _load_scales(self, found: dict[str, Tensor], prefix: str, errors: list[str]) -> None:
        scales = found.get(f"{prefix}SCB")
        if scales is None:
            return
        weight, state = self.module.weight, self.module.state
        if scales.numel() != self.shape[0]:
            errors.append(f"{prefix}SCB must have {self.shape[0]} numbers, found {list(scales.shape)}")
            return
        own = scales.detach().to(weight.device, torch.float32, copy=True).reshape(-1)
        if state.SCB is None:
            weight.SCB = own
        else:
            state.SCB = own

    def requantised(self, w: Tensor) -> "QuantisedBase":
        """A module like this one whose weight is w [out, in], quantised by its library in the same
        way.

        Raises:
            NotImplementedError: the library has no call for that.
        """
        module, device = copy.copy(self.module), w.device
        state = module.__dict__.get("quant_state")
        kinds: Any = getattr(sys.modules.get("bitsandbytes"), "nn", None)
        if state is not None:
            new = kinds.Params4bit(
                w, requires_grad=False, blocksize=state.blocksize, compress_statistics=state.nested,
                quant_type=state.quant_type, quant_storage=module.quant_storage,
            ).to(device)  # fmt: skip
            new.quant_state.dtype = state.dtype
            new.module, module.quant_state = module, new.quant_state
        elif "state" in module.__dict__:
            new = kinds.Int8Params(w.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
            before, module.state = module.state, type(module.state)()
            module.state.threshold, module.state.has_fp16_weights = before.threshold, False
            module.state.use_pool = before.use_pool
        else:
            new = _as_torchao(self.parameter, w)
            if new is None:
                raise NotImplementedError(f"a {type(module).__name__} cannot be quantised again; merge it to floating numbers")
        module._parameters = {**module._parameters, "weight": new}
        return QuantisedBase(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantisedBase":
        again = copy.copy(self)
        again.module = copy.deepcopy(self.module, memo)
        again._look_beside()
        return again

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_traced": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._look_again()


def product_of_codes(x: Tensor, w: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, with the gradients of x and bias; W, of the dtype of x, is not formed."""
    n_out, n_in = w.shape
    # an adapter of one zero: the op has the product without one in no other form
    zeros = x.new_zeros(1)
    return lora_linear(x, w, zeros.expand(1, n_in), zeros.expand(n_out, 1), 1.0, bias)


def _as_torchao(like: Any, w: Tensor) -> nn.Parameter | None:
    """w as int8 or float8 of torchao, with scales for as many numbers as those of a weight; None
    where that is another tensor, or has zero points or tiles."""
    kinds, kind = sys.modules.get("torchao.quantization"), type(like).__name__
    if kind not in ("Int8Tensor", "Float8Tensor") or kinds is None:
        return None
    rows, columns = like.block_size
    zeros = getattr(like, "zero_point", None)
    if (zeros is not None and bool(zeros.any())) or (rows > 1 and (rows, columns) != tuple(like.shape)):
        return None
    if rows > 1:
        granularity = kinds.PerTensor()
    else:
        granularity = kinds.PerRow() if columns == like.shape[1] else kinds.PerGroup(columns)
    w = w.to(like.dtype)
    if kind == "Int8Tensor":
        new = kinds.Int8Tensor.from_hp(w, granularity, reduce_range=like.reduce_range)
    else:
        how = {"mm_config": like.mm_config, "kernel_preference": like.kernel_preference}
        new = kinds.Float8Tensor.from_hp(w, like.qdata.dtype, granularity, **how)
    return nn.Parameter(new, requires_grad=False)


def load_state(
    state: Any, found: Mapping[str, Tensor], name: str, device: torch.device, errors: list[str]
) -> Any:  # fmt: skip
    """A QuantState of bitsandbytes from what a `state_dict` has beside the codes called so; None
    where there is nothing, or an error was added."""
    if not found:
        return None
    try:
        new = type(state).from_dict({key.removeprefix(f"{name}."): t.clone() for key, t in found.items()}, device)
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        errors.append(f"{name}: what stands beside its codes cannot be read: {error}")
        return None
    if new.shape != state.shape:
        errors.append(f"{name}: the codes are of a weight {list(state.shape)}, found {list(new.shape or ())}")
        return None
    return new


def rebind_forward(module: nn.Module) -> None:
    """Makes a method that a copy of a module holds as its forward the copy's own."""
    held = vars(module).get("forward")
    if isinstance(held, MethodType):
        vars(module)["forward"] = MethodType(held.__func__, module)


def form_of_codes(module: Any) -> tuple[tuple[int, int], torch.dtype]:
    """[out, in] of a quantised module, and the dtype in which it multiplies, as far as it says
    so."""
    given = getattr(module, "compute_dtype", None) if getattr(module, "compute_type_is_set", True) else None
    return (module.out_features, module.in_features), given or _floating_dtype(module) or torch.get_default_dtype()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ over all numbers."""
    size = float(wanted.norm())
    return float((found.to(wanted.dtype) - wanted).norm()) / size if size else 0.0


def _floating_dtype(module: Any) -> torch.dtype | None:
    held = module._parameters
    weight, bias = held.get("weight"), held.get("bias")
    state = getattr(weight, "quant_state", None) or module.__dict__.get("quant_state")
    # compressed-tensors keeps its scales in the dtype of W
    scale = held.get("weight_scale") if "quantization_scheme" in module.__dict__ else None
    dtypes: Iterable[Any] = (getattr(each, "dtype", None) for each in (state, weight, scale, bias))
    return next((dtype for dtype in dtypes if dtype in FLOATS), None)
