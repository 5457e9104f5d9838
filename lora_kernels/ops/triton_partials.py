"""Triton: sums of what several programs left in parts, in the order of the parts; in a launch of
its own or in another's last programs."""

import triton
import triton.language as tl

from lora_kernels.ops.launch import ceil_div, launch_triton
from lora_kernels.ops.tables.tiles import tile


@triton.jit
def reduce_partials(block, parts, gains, divisors, outs, factors, counts, ns, rs, BLOCK: tl.constexpr):
    """outs[j] [n, r] = factor · gain ⊙ Σ parts[j] [count, n, r] / divisor in the order of the
    parts, but where the divisor is zero; `block` counts the blocks of all. What is left of it comes
    back."""
    for j in tl.static_range(len(parts)):
        size = tl.cast(ns[j], tl.int64) * rs[j]
        blocks = tl.cdiv(size, BLOCK).to(tl.int32)
        if block >= 0 and block < blocks:
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < size
            sums = tl.zeros((BLOCK,), tl.float32)
            for z in range(counts[j]):
                sums += tl.load(parts[j] + z * size + at, mask=inside, other=0.0)
            if gains[j] is not None:
                sums *= tl.load(gains[j] + at // rs[j], mask=inside, other=0.0).to(tl.float32)
            if divisors[j] is not None:
                divisor = tl.load(divisors[j] + at // rs[j], mask=inside, other=0.0).to(tl.float32)
                inside = inside & (divisor != 0.0)
                sums = tl.div_rn(sums, tl.where(divisor != 0.0, divisor, 1.0))
            tl.store(outs[j] + at, (factors[j] * sums).to(outs[j].dtype.element_ty), mask=inside)
        block -= blocks
    return block


@triton.jit
def reduce_partials_kernel(parts, gains, divisors, outs, factors, counts, ns, rs, BLOCK: tl.constexpr):
    reduce_partials(tl.program_id(0), parts, gains, divisors, outs, factors, counts, ns, rs, BLOCK)


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
        self.jobs.append((part, gain, divisor, out, float(factor), len(part), n, r))

    def block_count(self):
        return sum(ceil_div(n * r, self.tile.columns) for *_, n, r in self.jobs)

    def kernel_args(self):
        names = ("parts", "gains", "divisors", "outs", "factors", "counts", "ns", "rs")
        return dict(zip(names, map(tuple, zip(*self.jobs, strict=True)) if self.jobs else [()] * 8, strict=True))

    def outputs(self):
        return [out for _, _, _, out, *_ in self.jobs]

    def launch_alone(self):
        args, t = {**self.kernel_args(), "BLOCK": self.tile.columns}, self.tile
        launch_triton(reduce_partials_kernel, (self.block_count(),), args, self.outputs(), warps=t.warps, stages=t.stages)


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
