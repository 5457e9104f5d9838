"""PEFT's layers over bitsandbytes' 4-bit and 8-bit linear layers, with a forward on our kernels.

Such a base computes in a dtype of its own and answers in that of its input: of 4 bits in
`compute_dtype`, which the first input sets where nobody did, of 8 bits in that of the input. So x
is cast to it, the adapter's input with it, and y is cast back.

The 8-bit base is exact here: x is not rounded to int8, as LLM.int8() rounds it outside of training.
"""

from threading import local
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from torch import Tensor, nn

from lora_kernels.integrations.peft.adapters import call_refusal
from lora_kernels.integrations.peft.bias import base_bias
from lora_kernels.integrations.peft.devices import device_refusal
from lora_kernels.integrations.peft.linear import WAYS, Way, count_fallback, kept_weights, run_fused
from lora_kernels.integrations.peft.state import DISABLED, PLAIN, READERS, read_codes
from lora_kernels.nn.flat_parameters import VIEWS, are_attributes
from lora_kernels.nn.kept_weight import KeptWeight
from lora_kernels.nn.quantised import quantised_weight
from lora_kernels.nn.quantised_base import product_of_codes
from lora_kernels.ops import QuantisedWeight
from lora_kernels.ops.quantised import codes_refusal
from lora_kernels.ops.registry import forced_backend

UNCAST = "the input is of another dtype than the base computes in, and its casting is off"
_EVERY_FORMAT = ("cpu", "meta")  # devices whose kernels read all; on meta nothing is computed
_compiling = torch.compiler.is_compiling
_any_autocast = torch._C._is_any_autocast_enabled


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


def _usual_dtype(base: Any) -> torch.dtype:
    dtype = getattr(base, "compute_dtype", None) or getattr(base.__dict__.get("quant_state"), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _computes_in(base: Any, x: Tensor) -> torch.dtype:
    """The dtype in which the base computes with this input; the first one may set it."""
    is_set = base.__dict__.get("compute_type_is_set")
    if is_set is None:
        return x.dtype
    if not is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return base.compute_dtype or x.dtype


def _forward(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What the kernels give for a call, or None where PEFT's own forward must run; the reason is
    counted."""
    if not _compiling() and type(x) not in PLAIN:
        count_fallback(layer, f"the input is {type(x).__name__}")
        return None
    base = layer._modules["base_layer"]
    dtype, wanted, cast = _computes_in(base, x), x.dtype, x
    if _any_autocast() and torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        # a base of 8 bits answers in autocast's dtype, in training alone
        wanted = dtype if "state" in base.__dict__ and base.training else x.dtype
    elif x.dtype is not dtype:
        if not layer.cast_input_dtype_enabled:
            count_fallback(layer, UNCAST)
            return None
        cast = x.to(dtype)
    kept = None
    if not _compiling():
        kept = kept_weights.get(layer)
        if kept is None:
            kept = kept_weights[layer] = KeptWeight()
    outer, _call.dtype = _call.dtype, dtype
    try:
        y = run_fused(layer, cast, args, kwargs)
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

QUANTISED_KINDS: list[tuple[type[nn.Module], type[nn.Module]]] = []
"""PEFT's classes and ours; none where bitsandbytes is not there, and so PEFT's are not."""

if is_bnb_available():
    import bitsandbytes
    from peft.tuners.lora.bnb import Linear8bitLt

    class FusedLinear8bitLt(Linear8bitLt):
        """peft.tuners.lora.bnb.Linear8bitLt; a call that the kernels cover runs there, any other in
        PEFT's own forward."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = _forward(self, x, args, kwargs)
            return super().forward(x, *args, **kwargs) if y is None else y

    QUANTISED_KINDS.append((Linear8bitLt, FusedLinear8bitLt))
    READERS[bitsandbytes.nn.Linear8bitLt] = _read

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(Linear4bit):
        """peft.tuners.lora.bnb.Linear4bit, as FusedLinear8bitLt."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = _forward(self, x, args, kwargs)
            return super().forward(x, *args, **kwargs) if y is None else y

    QUANTISED_KINDS.append((Linear4bit, FusedLinear4bit))
    for _base in (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.LinearNF4, bitsandbytes.nn.LinearFP4):
        READERS[_base] = _read
