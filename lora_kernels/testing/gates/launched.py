"""What an op launches, as the gates compile it."""

from torch import Tensor

from lora_kernels.ops.chips import nearest_architecture
from lora_kernels.ops.launch import Launch
from lora_kernels.ptxsim.triton_ptx import map_leaves
from lora_kernels.testing.gates.configuration import NVIDIA, Map, Triton
from lora_kernels.testing.gates.measure import compiled, soundness, unsound
from lora_kernels.testing.gates.occupancy import CHIPS


def launched(one: Launch) -> Triton:
    """The kernel of a launch, with the dtypes of its tensors."""
    args = {name: map_leaves(value, _dtype) for name, value in one.args.items()}
    return Triton(f"{one.kernel.fn.__module__}:{one.name}", args, one.warps, one.stages, one.registers)


def refusal(one: Launch, arch: int) -> str | None:
    """The gates that a launch does not pass whatever its budget, in words: it does not compile,
    spills, has a hazard, or more shared memory than there is.

    Raises:
        FileNotFoundError: a tool is not here; the message says which.
    """
    kernel, chip = launched(one), f"sm_{nearest_architecture(arch, [int(name[3:]) for name in NVIDIA])}"
    if gone := kernel.missing(chip):
        raise FileNotFoundError(gone)
    try:
        code, dynamic, _ = compiled(kernel, chip)
    except Exception as error:  # each compiler has its own
        return f"does not compile: {type(error).__name__}: {error}"[:500]
    reasons, shared = unsound(soundness(kernel, chip, code)), code.shared + dynamic
    if shared > CHIPS[chip].shared_block:
        reasons.append(f"shared memory: {shared} bytes, {CHIPS[chip].shared_block} there are")
    return "; ".join(reasons) or None


def _dtype(value: object) -> object:
    if hasattr(value, "block_shape") and hasattr(value, "base"):
        return Map(value.base.dtype, tuple(value.block_shape))
    return value.dtype if isinstance(value, Tensor) else value
