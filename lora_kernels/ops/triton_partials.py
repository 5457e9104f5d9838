"""Triton: sums of what several programs left in parts, in the order of the parts; in a launch of
its own or in another's last programs."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_kernels.ops.launch import ceil_div, launch_triton
from lora_kernels.ops.tables.tiles import tile


class Sum(NamedTuple):
    """One sum of `reduce_partials`; None for what there is not."""

    part: Any
    """[parts, n, r], float32."""
    gain: Any
    """[n]."""
    divisor: Any
    """[n]."""
    out: Any
    """[n, r], contiguous."""
    factor: Any
    parts: Any
    n: Any
    r: Any


@triton.jit
def reduce_partials(block, sums, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """out [n, r] = factor · gain ⊙ Σ part [parts, n, r] / divisor of each `Sum`, in the order of
    the parts. Where the divisor is zero out stays as it is. `block` counts the blocks of all; what
    is left of it comes back."""
    for j in tl.static_range(SUMS):
        one = sums[j]
        size = tl.cast(one.n, tl.int64) * one.r
        blocks = tl.cdiv(size, BLOCK).to(tl.int32)
        if block >= 0 and block < blocks:
            offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offsets < size
            accumulator = tl.zeros((BLOCK,), tl.float32)
            for z in range(one.parts):
                accumulator += tl.load(one.part + z * size + offsets, mask=mask, other=0.0)
            if one.gain is not None:
                accumulator *= tl.load(one.gain + offsets // one.r, mask=mask, other=0.0).to(tl.float32)
            if one.divisor is not None:
                divisor = tl.load(one.divisor + offsets // one.r, mask=mask, other=0.0).to(tl.float32)
                mask = mask & (divisor != 0.0)
                accumulator = tl.div_rn(accumulator, tl.where(divisor != 0.0, divisor, 1.0))
            tl.store(one.out + offsets, (one.factor * accumulator).to(one.out.dtype.element_ty), mask=mask)
        block -= blocks
    return block


@triton.jit
def reduce_partials_kernel(sums, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    reduce_partials(tl.program_id(0), sums, SUMS, BLOCK)


class Sums:
    """What is to be added up: the arguments of `reduce_partials`, for its own launch or for another
    kernel's last programs."""

    def __init__(self, on):
        """`on`: a tensor of the GPU where it is done."""
        self.jobs, self.tile = [], tile("add_up", on)

    def add_job(self, part, out, factor=1.0, gain=None, divisor=None):
        """out [n, r] (r = 1 for a vector) = factor · gain ⊙ Σ part [parts, n, r] / divisor; out is
        contiguous, and left alone where the divisor is zero."""
        n, r = part.shape[1], part.shape[2] if part.dim() == 3 else 1
        self.jobs.append(Sum(part, gain, divisor, out, float(factor), len(part), n, r))

    def block_count(self):
        return sum(ceil_div(one.n * one.r, self.tile.columns) for one in self.jobs)

    def kernel_args(self):
        return {"sums": tuple(self.jobs), "SUMS": len(self.jobs), "BLOCK": self.tile.columns}

    def outputs(self):
        return [one.out for one in self.jobs]

    def launch_alone(self):
        grid, t = (self.block_count(),), self.tile
        launch_triton(reduce_partials_kernel, grid, self.kernel_args(), self.outputs(), warps=t.warps, stages=t.stages)


def sum_partials_of_each(parts):
    """Σ part [parts, ...] of each in the order of its parts, as one part [1, ...]."""
    outs, sums = [part.new_empty(1, *part.shape[1:]) for part in parts], Sums(parts[0])
    for part, out in zip(parts, outs, strict=True):
        sums.add_job(part, out)
    sums.launch_alone()
    return outs


def sum_partials(part):
    """Σ part [parts, ...] in the order of the parts."""
    return part[0] if len(part) == 1 else sum_partials_of_each([part])[0][0]
