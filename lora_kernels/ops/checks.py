"""Checks of an adapted weight, W + scale·BA, which more than one op computes with."""

from typing import Any

from torch import Tensor

from lora_kernels.ops.lora_linear.op import FLOATS, check_kinds


def check_adapted_weight(
    op: str, w: Any, a: Any, b: Any, scale: Any, vectors: dict[str, Any], matrices: dict[str, Any] | None = None
) -> None:
    """Raises unless w [out, in], a [r, in], b [out, r], the `vectors` [out] and the `matrices`
    [out, in] fit in kind, shape, device and dtype. Vectors and matrices may be None. The message
    names the op and the tensor."""
    others = vectors | (matrices or {})
    check_kinds(op, scale, w=w, a=a, b=b, **others)
    if w.dim() != 2 or a.dim() != 2:
        raise ValueError(f"{op}: w and a must have two dimensions, found w {list(w.shape)}, a {list(a.shape)}")
    (n_out, n_in), rank = w.shape, a.shape[0]
    if rank < 1:
        raise ValueError(f"{op}: a must have at least one row (the rank), found {list(a.shape)}")
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {"a": (a, (rank, n_in)), "b": (b, (n_out, rank))}
    shapes |= {name: (t, (n_out,) if name in vectors else (n_out, n_in)) for name, t in others.items()}
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, found {list(tensor.shape)}")
        if tensor.device != w.device:
            raise ValueError(f"{op}: {name} must be on {w.device} (w), found {tensor.device}")
    if w.dtype not in FLOATS:
        raise TypeError(f"{op}: w must be float32, bfloat16, float16 or float64, found {w.dtype}")
    if a.dtype is not b.dtype or a.dtype not in FLOATS:
        raise TypeError(f"{op}: a and b must share one floating dtype, found {a.dtype} and {b.dtype}")
