"""DoRA's norm of one layer, kept between calls that cannot have changed it.

A stale norm is silent, and nothing in PyTorch announces a change: fused optimizers and edits through `.data` leave
`tensor._version` as it is. So the key holds the bits themselves: a checksum of all of A and B, and of a sample of W
beside W's address and version. It costs the bytes of A and B, which the layer reads anyway.
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.weight_norm.op import row_norm_squared, weight_norm

try:
    from lora_kernels import _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]


_PLAIN = (Tensor, torch.nn.Parameter)


class NormCache:
    """The last norm of one layer; call it with the layer's present weights.

    Under `torch.no_grad()` a norm is reused if no bit of A and B changed, nor the address, version or a sample of W.
    With grad mode on it is computed anew, and only ‖W‖² is reused. On other devices than the CPU, while compiling, and
    without the CPU extension, nothing is reused. `clear()` forgets: needed only after an edit of W through `.data` that
    leaves the sampled elements, about 64 a matrix, as they were.
    """

    __slots__ = ("_squared", "_norm")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._squared: tuple[Any, Tensor | None] = (None, None)
        self._norm: tuple[Any, Tensor | None] = (None, None)

    @torch.no_grad()
    def _w_squared(self, w: Tensor, key: Any) -> Tensor:
        held, squared = self._squared
        if squared is None or held != key:
            squared = row_norm_squared(w)
            self._squared = (key, squared)
        return squared

    def __call__(self, w: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
        """`weight_norm(w, a, b, scale)` without gradient: [out]."""
        with torch.no_grad():
            w_key = _key(w, a, b, scale)
            if w_key is None:
                return weight_norm(w, a, b, scale)
        grad = torch.is_grad_enabled()
        with torch.no_grad():
            key = (w_key, a.shape, a.dtype, scale, _cpu.checksum(*_bytes(a), *_bytes(b)))
            held, norm = self._norm
            if grad or norm is None or held != key:
                norm = weight_norm(w, a, b, scale, self._w_squared(w, w_key))
                self._norm = (key, norm)
            return norm

    def __deepcopy__(self, memo: dict[int, Any]) -> "NormCache":
        return NormCache()

    def __reduce__(self) -> Any:
        return NormCache, ()


def _key(w: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Any:
    """What identifies W; None where nothing can be reused."""
    if torch.compiler.is_compiling() or _cpu is None or isinstance(scale, Tensor):
        return None
    if not all(type(t) in _PLAIN and t.device.type == "cpu" for t in (w, a, b)) or w.numel() == 0:
        return None
    if not (a.is_contiguous() and b.is_contiguous()):
        return None
    version = -1 if w.is_inference() else w._version
    view = (w.data_ptr(), w.stride(0), w.stride(1), 0)
    rows, columns = w.shape
    return (view, version, w.dtype, w.shape, _cpu.sample(view, rows, columns, w.element_size()))


def _bytes(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.numel() * t.element_size()
