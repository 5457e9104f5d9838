"""The map of a tensor, 128 bytes by which copies in bulk (TMA) go: what the driver's
cuTensorMapEncodeTiled makes."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE, MAGIC = 128, 0x70616D726F736E74  # the form is the simulator's own (csrc/ptxsim/bulk.cpp)
ALIGNMENT = 64  # of a CUtensorMap
TYPES = {
    torch.uint8: 0, torch.int8: 0, torch.int32: 3, torch.int64: 5, torch.float16: 6, torch.float32: 7, torch.float64: 9,
    torch.bfloat16: 10,
}  # fmt: skip
SWIZZLES = (0, 32, 64, 128)


@dataclass(frozen=True)
class TensorMap:
    """An argument of a launch for a `CUtensorMap`: boxes of `box` elements of `tensor`, both with
    the innermost dimension last.

    `swizzle`: bytes of a row within which pieces of 16 bytes are exchanged in shared memory: 0, 32,
    64 or 128.
    """

    tensor: Tensor
    box: Sequence[int]
    swizzle: int = 0

    def encoded(self) -> bytes:
        """Raises ValueError if the tensor has no such map."""
        t, box = self.tensor, list(self.box)
        if not 1 <= t.dim() <= 5 or len(box) != t.dim() or t.stride(-1) != 1:
            raise ValueError(
                f"TensorMap: the tensor must have 1 to 5 dimensions, the last one contiguous, and the box as many; found"
                f" {list(t.shape)}, strides {list(t.stride())}, {t.dtype} and a box of {box}"
            )
        if t.dtype not in TYPES:
            raise ValueError(f"TensorMap: the type must be one of {', '.join(map(str, TYPES))}, found {t.dtype}")
        if not all(1 <= size <= 256 for size in box):
            raise ValueError(f"TensorMap: the sizes of the box must be 1 to 256, found {box}")
        if self.swizzle not in SWIZZLES:
            raise ValueError(f"TensorMap: swizzle must be one of {SWIZZLES}, found {self.swizzle}")

        def inwards(values: Sequence[int], count: int, rest: int) -> list[int]:
            return [*reversed(values), *[rest] * 5][:count]

        return struct.pack(
            "<QQ5B3x5I5H5H4Q", MAGIC, t.data_ptr(), t.dim() - 1, TYPES[t.dtype], SWIZZLES.index(self.swizzle), 0, 0,
            *inwards(t.shape, 5, 0), *inwards(box, 5, 0), *[1] * 5,
            *inwards([s * t.element_size() for s in t.stride()[:-1]], 4, 0),
        ).ljust(SIZE, b"\0")  # fmt: skip
