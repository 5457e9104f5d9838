"""DoRA's norm of one layer, kept between calls that cannot have changed it.

A stale norm is silent, and nothing in PyTorch announces a change: fused optimizers and edits
through `.data` leave `tensor._version` as it is. So the key holds the bits themselves: a checksum
of all of A and B, and of a sample of W beside W's address and version. It costs the bytes of A and
B, which the layer reads anyway.
"""

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.ops.derivatives import transformed, under_functorch
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.weight_norm.op import dora_gain, row_norm_squared, weight_norm

try:
    from lora_kernels.ops.cpu_tensors import fingerprint
except ImportError:
    fingerprint = None  # type: ignore[assignment]


class NormCache:
    """The last norm and gain of one layer; call it with the layer's present weights.

    Under `torch.no_grad()` a norm is reused if no bit of A and B changed, nor the address, version
    or a sample of W. With grad mode on it is computed anew, and only ‖W‖² is reused. On other
    devices than the CPU, while compiling, and without the CPU extension, nothing is reused.
    `clear()` forgets, and `lora_kernels.refresh(model)` does for a model: needed only after an edit
    of W through `.data`, or through memory that it shares with numpy, that leaves the sampled
    elements, about 64 a matrix, as they were. Of a `QuantisedWeight` the codes are sampled so, and
    of its scales and tables the address and version are looked at; a norm is that of one such
    object. What is given is the kept tensor itself: do not change it. What another thread changed,
    or cleared, while a norm was computed is not kept; nor is anything under torch.func and forward
    mode.
    """

    __slots__ = ("_squared", "_norm", "_gain", "_clears")

    def __init__(self) -> None:
        self._clears = 0
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._clears += 1
        self._squared: tuple[Any, Tensor | None] = (None, None)
        self._norm: tuple[Any, Tensor | None] = (None, None)
        self._gain: tuple[Any, Tensor | None] = (None, None)

    def __call__(self, w: Tensor | QuantisedWeight, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
        """`weight_norm(w, a, b, scale)` without gradient and tangent: [out]."""
        if transformed():
            return weight_norm(w, a, b, scale).detach()
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._computed(w, a, b, scale)
        key = _key(scale, w, a, b)
        held, norm = self._norm
        if norm is None or key is None or held != key:
            clears = self._clears
            norm = self._computed(w, a, b, scale)
            if key is not None and clears == self._clears and key == _key(scale, w, a, b):
                self._norm = (key, norm)
        return norm

    def gain(self, w: Tensor | QuantisedWeight, a: Tensor, b: Tensor, scale: float | Tensor, magnitude: Tensor) -> Tensor:
        """DoRA's gain, `dora_gain(magnitude, norm)` with the norm detached: [out]. Reused as the
        norm is."""
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or under_functorch():
            norm = self(w, a, b, scale)
            return dora_gain(magnitude.to(norm.dtype), norm)
        key = _key(scale, w, a, b, magnitude)
        held, gain = self._gain
        if gain is None or key is None or held != key:
            clears = self._clears
            norm = self(w, a, b, scale)
            gain = dora_gain(magnitude.to(norm.dtype), norm)
            if key is not None and clears == self._clears and key == _key(scale, w, a, b, magnitude):
                self._gain = (key, gain)
        return gain

    def _computed(self, w: Tensor | QuantisedWeight, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
        key = _key(0.0, w)
        if key is None:
            return weight_norm(w, a, b, scale)
        held, squared = self._squared
        if squared is None or held != key:
            clears = self._clears
            squared = row_norm_squared(w)
            if clears == self._clears and key == _key(0.0, w):
                self._squared = (key, squared)
        return weight_norm(w, a, b, scale, squared)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NormCache":
        return NormCache()

    def __reduce__(self) -> Any:
        return NormCache, ()


def _key(scale: float | Tensor, w: Any, *others: Tensor) -> Any:
    """What identifies W as far as a sample of it can, and every bit of the others; None where
    nothing can be reused."""
    if fingerprint is None or isinstance(scale, Tensor) or torch.compiler.is_compiling():
        return None
    if isinstance(w, QuantisedWeight):
        return _quantised_key(scale, w, others)
    found = fingerprint(w, *others)
    if found is None and w.dim() == 3:
        found = fingerprint(*_as_matrices(w, *others))
    # the tensor itself, lest another one at the same address be taken for it
    return found and (found, scale, w._version, ref(w if w._base is None else w._base))


@torch.no_grad()
def _as_matrices(*stacks: Tensor) -> list[Tensor]:
    """Stacks of matrices as one matrix each, where they are contiguous."""
    return [t.flatten(0, 1) if t.dim() == 3 and t.is_contiguous() else t for t in stacks]


def _quantised_key(scale: float, w: QuantisedWeight, others: tuple[Tensor, ...]) -> Any:
    """As `_key`, of codes and scales."""
    codes, parts, _ = w.fields()
    if codes.is_inference() or any(t.is_inference() for t in parts):
        return None
    others = others if w.dim() == 2 else (*_as_matrices(*others),)
    found = fingerprint(codes if codes.dim() == 2 else codes.view(-1, 1), *others)
    versions = [codes._version, *((t.data_ptr(), t._version) for t in parts)]
    return found and (found, scale, versions, ref(w))
