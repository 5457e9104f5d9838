"""PEFT's layers over quantised linear layers, with a forward on our kernels.

    bitsandbytes   Linear4bit, Linear8bitLt
    torchao        int8, float8 and unpacked intx weights of an nn.Linear, inputs as they are
    HQQ            HQQLinear

Each base computes in a dtype of its own, and answers in one: `_of_bitsandbytes`, `_of_torchao`,
`_of_hqq`. So x is cast to it where the base casts it, the adapter's input with it, and y is cast to
what the base gives.

The 8-bit base of bitsandbytes is exact here: x is not rounded to int8, as LLM.int8() rounds it
outside of training.
"""

from collections.abc import Callable
from threading import local
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available, is_hqq_available
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from lora_kernels.integrations.peft.adapters import call_refusal
from lora_kernels.integrations.peft.bias import base_bias
from lora_kernels.integrations.peft.devices import device_refusal
from lora_kernels.integrations.peft.linear import WAYS, Way, count_fallback, kept_weights, run_fused
from lora_kernels.integrations.peft.state import DISABLED, PLAIN, READERS, read_codes, type_name
from lora_kernels.nn.flat_parameters import VIEWS, are_attributes
from lora_kernels.nn.kept_weight import KeptWeight
from lora_kernels.nn.quantised import quantised_weight
from lora_kernels.nn.quantised_base import product_of_codes
from lora_kernels.ops import QuantisedWeight
from lora_kernels.ops.lora_linear.op import FLOATS, autocasts
from lora_kernels.ops.quantised import codes_refusal
from lora_kernels.ops.registry import forced_backend

UNCAST = "the input is of another dtype than the base computes in, and its casting is off"
FEW = "few tokens in float32 over int8 codes, which torchao widens once and keeps for the backward"
"""Where PEFT is faster. With 8 tokens and more, DoRA, 16 bits or no gradients it is not."""
UNZEROED = "torchao leaves the zero points out of its product with rows of int8"
_EVERY_FORMAT = ("cpu", "meta")  # devices whose kernels read all; on meta nothing is computed
_compiling = torch.compiler.is_compiling
_any_autocast = torch._C._is_any_autocast_enabled

Dtypes = tuple[torch.dtype, torch.dtype]
"""What the base computes in and what it answers in."""


class _Call(local):
    """Of a thread: the dtype in which W is wanted by the call under way, None outside of one."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None


_call = _Call()


def _read(layer: Any, base: Any) -> QuantisedWeight | str:
    """The layer's W for the call under way, or why PEFT must run it."""
    if "weight" not in base._parameters and are_attributes(base):
        return VIEWS
    dtype = _call.dtype or _usual_dtype(base)
    # none: the survey, before any call; a graph makes it of the parts as each call finds them
    kept = None if _compiling() else kept_weights.get(layer)
    w = quantised_weight(base, dtype) if kept is None else kept(base, dtype)
    # a compiler cannot look into the backends: call_refusal asks for the device, and the ops choose
    if isinstance(w, QuantisedWeight) and w.device.type not in _EVERY_FORMAT and not (_compiling() or forced_backend()):
        return device_refusal(w.codes) or codes_refusal(w) or w
    return w


def _read_torchao(layer: Any, base: Any) -> QuantisedWeight | str:
    """The same where an nn.Linear has a weight of a class of its own."""
    if not isinstance(layer, TorchaoLoraLinear):
        return f"base_layer was quantised after PEFT had made a {type_name(layer)} of it"
    w = _read(layer, base)
    whole_rows = isinstance(w, QuantisedWeight) and w.zeros is not None and w.block >= w.shape[1]
    return UNZEROED if whole_rows and type(base._parameters["weight"]).__name__ == "Int8Tensor" else w


def _usual_dtype(base: Any) -> torch.dtype:
    for dtype in (
        getattr(base, "compute_dtype", None),
        getattr(base.__dict__.get("quant_state"), "dtype", None),
        getattr(base._parameters.get("weight"), "dtype", None),
    ):
        if dtype in FLOATS:
            return dtype
    return torch.float32


def _of_bitsandbytes(layer: Any, base: Any, x: Tensor, cast: torch.dtype | None) -> Dtypes | str:
    """Of 4 bits in `compute_dtype`, which the first input sets where nobody did, of 8 bits in that
    of the input; the answer is in that of the input."""
    dtype = _computes_in(base, x)
    if cast is not None:
        # a base of 8 bits answers in autocast's dtype, in training alone
        return cast, cast if "state" in base.__dict__ and base.training else x.dtype
    if x.dtype is not dtype and not layer.cast_input_dtype_enabled:
        return UNCAST
    return dtype, x.dtype


def _computes_in(base: Any, x: Tensor) -> torch.dtype:
    """The dtype in which the base computes with this input; the first one may set it."""
    is_set = base.__dict__.get("compute_type_is_set")
    if is_set is None:
        return x.dtype
    if not is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return base.compute_dtype or x.dtype


def _of_torchao(layer: Any, base: Any, x: Tensor, cast: torch.dtype | None) -> Dtypes | str:
    """In the dtype of the input. Rows of int8 are scaled after the product, whatever dtype W was
    in; else W is dequantised to that dtype first, where another one would round it twice."""
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    kind, dtype = type(weight).__name__, cast or x.dtype
    with torch._C.DisableTorchFunctionSubclass():
        own = None if weight is None else weight.dtype
    by_rows = kind == "Int8Tensor" and weight.block_size[-1] >= base.in_features
    casts = cast is not None or kind == "Int8Tensor"
    if dtype is torch.float64 or not (by_rows or own is dtype or (casts and own is torch.float32)):
        return f"the input is {x.dtype}, and torchao's {kind} was {own}"
    if dtype is torch.float32 and kind != "Float8Tensor" and _is_few(layer, base, x):
        return FEW
    if kind == "Int8Tensor":
        return dtype, x.dtype
    return dtype, dtype if kind != "Float8Tensor" or bias is None else torch.promote_types(dtype, bias.dtype)


def _is_few(layer: Any, base: Any, x: Tensor) -> bool:
    n_in, n_out = base.in_features, base.out_features
    if not x.is_cpu or x.numel() >= 8 * n_in or n_in * n_out > 1 << 20 or not torch.is_grad_enabled() or layer.lora_variant:
        return False
    # a checkpoint's first call has no gradients, and its second must draw the same mask
    return all(type(drop) is nn.Identity for drop in layer._modules["lora_dropout"]._modules.values())


def _of_hqq(layer: Any, base: Any, x: Tensor, cast: torch.dtype | None) -> Dtypes | str:
    """In `compute_dtype`, which the input must have, or autocast's."""
    own, dtype = base.compute_dtype, cast or x.dtype
    if own is dtype or (cast is not None and own is torch.float32):
        return dtype, dtype
    return f"the input is {x.dtype}, and HQQ computes in {own}"


def _forward(
    layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any],
    dtypes: Callable[[Any, Any, Tensor, torch.dtype | None], Dtypes | str],
) -> Tensor | None:  # fmt: skip
    """What the kernels give for a call, or None where PEFT's own forward must run; the reason is
    counted."""
    if not _compiling() and type(x) not in PLAIN:
        count_fallback(layer, f"the input is {type(x).__name__}")
        return None
    cast = None
    if _any_autocast() and autocasts(x.device.type) and x.dtype is not torch.float64:
        cast = torch.get_autocast_dtype(x.device.type)
    found = dtypes(layer, layer._modules["base_layer"], x, cast)
    if isinstance(found, str):
        count_fallback(layer, found)
        return None
    dtype, wanted = found
    kept = None
    if not _compiling():
        kept = kept_weights.get(layer)
        if kept is None:
            kept = kept_weights[layer] = KeptWeight()
    outer, _call.dtype = _call.dtype, dtype
    try:
        y = run_fused(layer, x if x.dtype is dtype or cast is not None else x.to(dtype), args, kwargs)
    finally:
        _call.dtype = outer
    if y is None:
        if kept is not None:
            kept.clear()
        return None
    return y if y.dtype is wanted else y.to(wanted)


def _run_disabled(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The base's output, of the codes as they are: bitsandbytes' own call would pack them in eval
    mode, and what is packed cannot be trained through."""
    if args or kwargs or layer.merged_adapters:
        return DISABLED
    w = read_codes(layer)
    if not isinstance(w, QuantisedWeight):
        return DISABLED if w is None else w
    return call_refusal(x) or product_of_codes(x, w, base_bias(layer._modules["base_layer"]))


WAYS[DISABLED] = Way(_run_disabled)


class FusedTorchaoLoraLinear(TorchaoLoraLinear):
    """peft.tuners.lora.torchao.TorchaoLoraLinear; a call that the kernels cover runs there, any
    other in PEFT's own forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if _compiling() else _forward(self, x, args, kwargs, _of_torchao)
        return super().forward(x, *args, **kwargs) if y is None else y


QUANTISED_KINDS: list[tuple[type[nn.Module], type[nn.Module]]] = [(TorchaoLoraLinear, FusedTorchaoLoraLinear)]
"""PEFT's classes and ours; without those of libraries that are not there."""
READERS[nn.Linear] = _read_torchao

if is_bnb_available():
    import bitsandbytes
    from peft.tuners.lora.bnb import Linear8bitLt

    class FusedLinear8bitLt(Linear8bitLt):
        """peft.tuners.lora.bnb.Linear8bitLt, as FusedTorchaoLoraLinear."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = _forward(self, x, args, kwargs, _of_bitsandbytes)
            return super().forward(x, *args, **kwargs) if y is None else y

    QUANTISED_KINDS.append((Linear8bitLt, FusedLinear8bitLt))
    READERS[bitsandbytes.nn.Linear8bitLt] = _read

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(Linear4bit):
        """peft.tuners.lora.bnb.Linear4bit, as FusedTorchaoLoraLinear."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = _forward(self, x, args, kwargs, _of_bitsandbytes)
            return super().forward(x, *args, **kwargs) if y is None else y

    QUANTISED_KINDS.append((Linear4bit, FusedLinear4bit))
    for _base in (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.LinearNF4, bitsandbytes.nn.LinearFP4):
        READERS[_base] = _read

if is_hqq_available():
    from hqq.core.quantize import HQQLinear
    from peft.tuners.lora.hqq import HqqLoraLinear

    class FusedHqqLoraLinear(HqqLoraLinear):
        """peft.tuners.lora.hqq.HqqLoraLinear, as FusedTorchaoLoraLinear."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = None if _compiling() else _forward(self, x, args, kwargs, _of_hqq)
            return super().forward(x, *args, **kwargs) if y is None else y

    QUANTISED_KINDS.append((HqqLoraLinear, FusedHqqLoraLinear))
    READERS[HQQLinear] = _read
