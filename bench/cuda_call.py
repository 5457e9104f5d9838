"""What a launch of CUDA C++ costs the host, measured without a GPU: `python -m bench.cuda_call`.

The bound call is the step from Python into `_cuda` up to the driver: it looks the kernel up and
lays its struct out. What the op does before it (its refusal, the choice, its tensors, the
arguments) is timed beside it with a launch that does nothing.
"""

import statistics
import sys
import timeit
from collections.abc import Callable
from unittest import mock

import torch

from bench.paired import machine_stamp
from lora_kernels import _cuda
from lora_kernels.ops.lora_linear import cuda
from lora_kernels.ops.lora_linear.call import Forward

LIMIT = 3.0  # µs of the bound call
CALLS, ROUNDS = 2000, 15


def microseconds(call: Callable[[], object]) -> float:
    """The median of rounds of many calls."""
    return statistics.median(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def main() -> int:
    """The exit status: 1 if the bound call is above its limit."""
    print(machine_stamp())
    x, w, a, b = (torch.randn(shape).bfloat16() for shape in ((4, 4096), (4096, 4096), (16, 4096), (4096, 16)))
    call = Forward(x, w, a, b, 1.0, None, None, 0.0, None, False, False, False)
    seen = []
    with mock.patch.object(cuda, "launch_cuda", lambda *args, **_: seen.append(args)):
        cuda.forward(call)
    fields = tuple(seen[0][4].values())
    bound = microseconds(lambda: _cuda.pack(fields))
    with mock.patch.object(cuda, "launch_cuda", lambda *_, **__: None), mock.patch.object(cuda, "refuse_cuda", lambda *_: None):
        refusal, op = microseconds(lambda: cuda.refusal(call)), microseconds(lambda: cuda.forward(call))
    print(f"bound call, {len(fields)} fields: {bound:.2f} µs, at most {LIMIT:.0f}")
    print(f"lora_linear of 4 rows: refusal and choice {refusal:.1f} µs, the op without its launch {op:.1f} µs")
    return int(bound > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
