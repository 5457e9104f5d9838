"""One of the layers that share x, as both backends for GPUs hand it to their kernels."""

from dataclasses import dataclass

from torch import Tensor

from lora_kernels.ops.lora_linear.loop import drops_base, keeps_z


@dataclass
class Layer:
    """A layer, and what is to be had of it."""

    w: Tensor
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None
    gain: Tensor | None
    dropout: float
    seed: Tensor | None
    drop_base: bool
    keep_z: bool = False

    def __post_init__(self):
        self.n, self.r = self.b.shape
        self.bias, self.gain = _flat(self.bias), _flat(self.gain)
        self.dropout = self.dropout if self.seed is not None else 0.0
        self.drop = (self.dropout, self.seed if self.dropout > 0 else None)
        self.drop_base = drops_base(self.drop_base, self.gain, self.dropout)
        self.keep_z = self.keep_z and keeps_z(self.bias, self.gain, self.drop_base)


def layers_of(w, a, b, scale, bias, gain, dropout, seed, drop_base, keep_z=False):
    """Those of a group's lists."""
    each = zip(w, a, b, scale, bias, gain, dropout, seed, strict=True)
    return [Layer(*member, drop_base, keep_z) for member in each]


def _flat(vector):
    return None if vector is None else vector.contiguous()
