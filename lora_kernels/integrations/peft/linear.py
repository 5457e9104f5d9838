"""PEFT's linear layer with a forward on our kernels.

All that is remembered between calls is DoRA's norm, under the bits it was computed from, how a
quantised weight lies (`quantised`), and within a call of its module what a group computed
(`groups`).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import peft
import torch
from torch import Tensor, nn

from lora_kernels.integrations.peft.adapters import call_refusal, watcher_refusal
from lora_kernels.integrations.peft.state import ARGUMENTS, read_state
from lora_kernels.nn.kept_weight import KeptWeight
from lora_kernels.ops import NormCache, QuantisedWeight, dora_gain, lora_linear, weight_norm
from lora_kernels.ops.lora_linear.op import FLOATS, autocasts

try:
    from lora_kernels.ops.cpu_tensors import plain_call, plain_classes
except ImportError:
    plain_call = plain_classes = None  # type: ignore[assignment]
try:
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error

_compiling = torch.compiler.is_compiling
# one for each layer, whichever adapter is active: its key is what it was computed from
_norms: WeakKeyDictionary[nn.Module, NormCache] = WeakKeyDictionary()
_fallbacks: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()
kept_weights: WeakKeyDictionary[nn.Module, KeptWeight] = WeakKeyDictionary()
"""By layer over a quantised base."""


class Way(NamedTuple):
    """How calls run for which `read_state` has a reason instead of a state."""

    run: Callable[[Any, Tensor, tuple[Any, ...], dict[str, Any]], Any]
    """The layer, its input and the call's other arguments; gives the output, or the reason why
    PEFT's forward must run."""
    read: Callable[[Any], Any] | None = None
    """A state for the report, or a reason, as `read_state` gives."""


WAYS: dict[str, Way] = {}


def other_way(reason: str, take: Callable[[Way], Any]) -> Any:
    """What `take` gives of the way that a reason names, or of the one that this way's reason names,
    and so on; the last reason if there is none."""
    found: Any = reason
    taken: list[str] = []
    while type(found) is str and found in WAYS and found not in taken:
        taken.append(found)
        found = take(WAYS[found])
    return found


class FusedLinear(Linear):
    """peft.tuners.lora.layer.Linear; a call that the kernels cover runs there, any other in PEFT's
    own forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = run_fused(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


if plain_classes is not None:
    _parts = (nn.Linear, nn.Identity, nn.Dropout, DoraLinearVariant, DoraLinearLayer)
    plain_classes({cls.__name__: cls for cls in (FusedLinear, *_parts)})


def run_fused(layer: Linear, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What the kernels give for a call of PEFT's layer, or None where PEFT's own forward must run;
    the reason is counted."""
    state: Any = None
    reason: str | None = None
    # a quick yes to what follows
    if not (plain_call is None or args or kwargs or _compiling() or watcher_refusal()):
        state = plain_call(layer, x)
    if state is None:
        state = ARGUMENTS if args or kwargs else read_state(layer)
        reason = state if type(state) is str else input_refusal(layer, x, state)
    if reason is not None:
        y = other_way(reason, lambda way: way.run(layer, x, args, kwargs))
        if type(y) is not str:
            return y
        count_fallback(layer, y)
        return None
    # there only for layers that are in a group, or may be
    if not _compiling() and (siblings := layer.__dict__.get("_lora_kernels_siblings")) is not None:
        y = siblings.call(layer, x, state)
        if y is not None:
            return y
    w, bias, a, b, scale, dropout, magnitude = state
    gain = None if magnitude is None else cached_gain(layer, w, a, b, scale, magnitude)
    return lora_linear(x, w, a, b, scale, bias, gain, dropout)


def input_refusal(layer: Linear, x: Tensor, state: Any) -> str | None:
    """Why this input goes to PEFT's forward, which also raises its own error where it cannot take
    it."""
    if (reason := call_refusal(x)) is not None:
        return reason
    w, a = state[0], state[2]
    if x.dtype is not w.dtype or (x.dtype is not a.dtype and not layer.cast_input_dtype_enabled):
        same = (x.dtype is torch.float64) == (w.dtype is torch.float64)
        if not (autocasts(x.device.type) and x.dtype in FLOATS and same):
            return f"the input is {x.dtype}, its casting is {'on' if layer.cast_input_dtype_enabled else 'off'}"
    return None


def cached_gain(
    owner: nn.Module, w: Tensor | QuantisedWeight, a: Tensor, b: Tensor, scale: float | Tensor, magnitude: Tensor
) -> Tensor:
    """DoRA's gain, [out], kept between calls as far as NormCache can; `owner` is the module under
    which it is kept, the layer or one adapter's own."""
    if _compiling():
        with torch.no_grad():
            norm = weight_norm(w, a, b, scale)
        return dora_gain(magnitude.to(norm.dtype), norm)
    cache = _norms.get(owner)
    if cache is None:
        cache = _norms[owner] = NormCache()
    return cache.gain(w, a, b, scale, magnitude)


def count_fallback(layer: nn.Module, reason: str) -> None:
    """Notes that a call went to PEFT's forward."""
    if not _compiling():
        _fallbacks.setdefault(layer, Counter())[reason] += 1


def share_kept(layer: nn.Module, other: nn.Module) -> None:
    """Another module stands in for the layer: what is kept and counted is the layer's."""
    _norms[other] = _norms.setdefault(layer, NormCache())
    _fallbacks[other] = _fallbacks.setdefault(layer, Counter())
    if layer in kept_weights:
        kept_weights[other] = kept_weights[layer]


def forget(layer: nn.Module) -> None:
    """Drops the layer's norms and gains, and the parts of a quantised weight."""
    kept_weights.pop(layer, None)
    for owner in (layer, *getattr(layer, "lora_magnitude_vector", nn.ModuleDict()).values()):
        _norms.pop(owner, None)


def fallbacks(layer: nn.Module) -> dict[str, int]:
    """How many calls of the layer went to PEFT's forward since it was fused, by reason."""
    return dict(_fallbacks.get(layer, {}))


def forget_all(layer: nn.Module) -> None:
    """Drops the layer's norm, gain and counts."""
    forget(layer)
    _fallbacks.pop(layer, None)
