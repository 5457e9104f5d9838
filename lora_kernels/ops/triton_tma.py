"""Maps of matrices (CUDA's tensor maps, PTX ISA §5.5), for the tensor memory accelerator of sm_90
and later: one thread loads a whole tile through one, and no lane computes addresses.

In the main loop of the forward that is 87 instructions for 127 on sm_90 (tests/gates/table.json),
and no fence is needed, which some Tritons leave out. Only where a loop takes one product of tiles
as they come: with two (a dropped base), or an operand from registers (dy ⊙ gain), it has no stages
on sm_90 (ops/triton_compiler.py). To make a map takes the host about as long as a launch, which a
product over few rows does not hide.
"""

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.ops.launch import architecture
from lora_kernels.ops.triton_skinny import HALVES

LEAST = 90  # of the architectures
LEAST_ROWS = 64  # rows, up to which none is made
# of a group: Triton 3.6 and 3.7 do not take maps in tuples, so that each is a parameter of the
# kernel
MEMBERS = 3


def loads_by_tma(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether products of inputs [m, …] and weights, a pair for each layer or one input for all,
    load them through maps."""
    first = inputs[0]
    able = len(first) > LEAST_ROWS and len(weights) <= MEMBERS and architecture(first) >= LEAST
    return able and all(map(_can_be_mapped, (*inputs, *weights)))


def tensor_map(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A map of t [m, n] from which tiles [rows, columns] are loaded, 0 outside."""
    return TensorDescriptor.from_tensor(t, [rows, columns])


def tensor_maps(name: str, tensors: Sequence[Tensor], rows: int, columns: int) -> dict[str, TensorDescriptor | None]:
    """The arguments `name`0, `name`1, …: a map of each tensor, None for the rest."""
    found = [tensor_map(t, rows, columns) for t in tensors] + [None] * (MEMBERS - len(tensors))
    return {f"{name}{i}": each for i, each in enumerate(found)}


def _can_be_mapped(t: Tensor) -> bool:
    """Whether a map of t [m, n] can be made: 16 bits, rows without gaps, each at a multiple of 16
    bytes."""
    in_rows = t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) % 8 == 0
    return t.dtype in HALVES and t.numel() > 0 and in_rows and t.data_ptr() % 16 == 0
