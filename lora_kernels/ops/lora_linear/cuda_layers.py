"""CUDA C++: layers that share x, by the library's GEMMs (library.py) with thin kernels around them
(cuda_skinny.py)."""

import torch

from lora_kernels.ops.lora_linear import library
from lora_kernels.ops.lora_linear.cuda_skinny import expand, shrink, sum_partials


def forward(x, layers, keep):
    """The y, the h [m, r] if kept and the z if kept of each layer."""
    fixed = torch.are_deterministic_algorithms_enabled()
    made = [shrink(x, each.a, each.scale, each.drop, fixed=fixed, keep=each.drop_base) for each in layers]
    hs, dropped = [h for h, _ in made], [kept for _, kept in made]
    ys = [x.new_empty(len(x), len(each.w)) for each in layers]
    zs = [torch.empty_like(y) if each.keep_z else None for y, each in zip(ys, layers, strict=True)]
    library.forward(expand, x, dropped, layers, hs, ys, zs)
    return ys, [sum_partials(h) if keep else None for h in hs], zs
