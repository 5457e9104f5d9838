"""CUDA C++: layers that share x, by the library's GEMMs (library.py) with thin kernels around them (cuda_thin.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear import library
from lora_kernels.ops.lora_linear.cuda_thin import expand, shrink, total
from lora_kernels.ops.lora_linear.loop import drops_base, keeps_z


@dataclass
class Layer:
    """One of the layers that share x, and what is to be had of it."""

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
        self.dropout = self.dropout if self.seed is not None else 0.0
        self.drop = (self.dropout, self.seed if self.dropout > 0 else None)
        self.drop_base = drops_base(self.drop_base, self.gain, self.dropout)
        self.keep_z = self.keep_z and keeps_z(self.bias, self.gain, self.drop_base)


def layers_of(w, a, b, scale, bias, gain, dropout, seed, drop_base, keep_z=False):
    each = zip(w, a, b, scale, bias, gain, dropout, seed, strict=True)
    return [Layer(*member, drop_base, keep_z) for member in each]


def forward(x, layers, keep):
    """The y, the h [m, r] if kept and the z if kept of each layer."""
    fixed = torch.are_deterministic_algorithms_enabled()
    made = [shrink(x, each.a, each.scale, each.drop, fixed=fixed, keep=each.drop_base) for each in layers]
    hs, dropped = [h for h, _ in made], [kept for _, kept in made]
    ys = [x.new_empty(len(x), len(each.w)) for each in layers]
    zs = [torch.empty_like(y) if each.keep_z else None for y, each in zip(ys, layers, strict=True)]
    library.forward(expand, x, dropped, layers, hs, ys, zs)
    return ys, [total(h) if keep else None for h in hs], zs
