"""Launching a decoded kernel on tensors."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_kernels import _ptxsim
from lora_kernels.testing.ptxsim.decode import Decoded
from lora_kernels.testing.ptxsim.device import current
from lora_kernels.testing.ptxsim.tensor_map import TensorMap

OPTIONS = {
    "check": True, "late": True, "shuffle": True, "seed": 0, "resident": 8, "trace": False, "tolerant": False,
}  # fmt: skip
_FORMATS = {"f32": "<f", "f64": "<d"}
STEPS = 200_000_000  # instructions of one block after which a launch is given up


class SimulationError(AssertionError):
    """The kernel did what a GPU might not forgive; the message lists each finding with its line of the PTX."""


@dataclass(frozen=True)
class Run:
    """What one launch did."""

    errors: list[str]
    counters: dict[str, int]
    """Sectors of 32 bytes, bytes, requests, passes of shared memory and their ideal, mma, barriers, atomics, instructions."""
    by_opcode: dict[str, int]
    """Instructions that warps executed, by opcode."""
    trace: bytes
    """With `trace`: each sector as uint64, twice its number, and 1 for a store."""


class Kernel:
    """One kernel of a PTX text.

    Raises:
        Unsupported: it holds an instruction that the simulator does not know; the message names the line.
        ValueError: the text has no such kernel.
    """

    def __init__(self, ptx: str, entry: str | None = None) -> None:
        self._decoded = Decoded(ptx, entry)
        self.name = self._decoded.kernel.name
        self.parameters = self._decoded.parameters

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Tensor | TensorMap | int | float | bytes],
        writes: Sequence[Tensor] = (),
        poisoned: Sequence[Tensor] = (),
        shared: int = 0,
        **options: Any,
    ) -> Run:
        """Runs the kernel.

        `args` stand for its parameters in order: a CPU tensor for a pointer, numbers, a `TensorMap` or the bytes of a
        struct. It may touch only these tensors and change only those in `writes`; of those in `poisoned` it may read only
        what it wrote itself. The text's own variables begin with their initial values each time. `shared` is the dynamic
        shared memory in bytes.

        Options, which `device()` sets for many launches:
            check (True): look for races and for memory that nobody wrote
            late (True): a cp.async lands when it is waited for, else as soon as it is issued
            shuffle (True), seed (0): blocks and warps take their turns in an order drawn from the seed
            resident (8): blocks that run side by side
            trace (False): keep every sector that was touched
            tolerant (False): give back what was found in `errors` instead of raising it

        Raises:
            SimulationError: something was found.
            TypeError, ValueError: the arguments do not fit the parameters.
        """
        tensors: dict[int, tuple[str, Tensor]] = {}
        packed = bytearray(max((p.offset + p.bytes for p in self.parameters), default=0))
        if len(args) != len(self.parameters):
            raise ValueError(f"{self.name}: {len(self.parameters)} parameters, found {len(args)} arguments")
        for parameter, argument in zip(self.parameters, args, strict=True):
            tensor = argument.tensor if isinstance(argument, TensorMap) else argument
            if isinstance(tensor, Tensor):
                if tensor.device.type != "cpu":
                    raise ValueError(f"{self.name}: {parameter.name} must be on the CPU, found {tensor.device}")
                tensors.setdefault(tensor.data_ptr(), (parameter.name, tensor))
            packed[parameter.offset : parameter.offset + parameter.bytes] = _packed(self.name, parameter, argument)
        for extra in (*writes, *poisoned):
            tensors.setdefault(extra.data_ptr(), (f"tensor {len(tensors)}", extra))
        changed, fresh = {t.data_ptr() for t in (*writes, *poisoned)}, {t.data_ptr() for t in poisoned}
        buffers = [
            (name, at, _bytes_from(t), at in changed, at in fresh, t.element_size()) for at, (name, t) in tensors.items()
        ]
        buffers += [variable.reset() for variable in self._decoded.variables]
        size = [*block, 1, 1][:3]
        threads = size[0] * size[1] * size[2]
        most = self._decoded.kernel.most_threads or 1024
        if not 1 <= threads <= most:
            raise ValueError(f"{self.name}: a block has 1 to {most} threads, found {list(block)}")
        o = self._options(options)
        found = _ptxsim.run(
            self._decoded.program, [*grid, 1, 1][:3], size, bytes(packed), buffers, shared, o["check"], o["late"], o["shuffle"],
            o["seed"], STEPS, o["trace"], o["resident"],
        )  # fmt: skip
        if found["errors"] and not o["tolerant"]:
            raise SimulationError(f"{self.name}:\n" + "\n".join(found["errors"]))
        if sim := current.get():
            sim.launches += 1
            sim.counters.update(found["counters"])
            sim.by_opcode.update(found["by_opcode"])
            sim.trace += found["trace"]
        return Run(**found)

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        sim = current.get()
        chosen = {**OPTIONS, **(sim.options if sim else {}), **given}
        if unknown := set(chosen) - set(OPTIONS):
            raise TypeError(f"{self.name}: launch has no option {', '.join(sorted(unknown))}")
        return chosen


def _bytes_from(t: Tensor) -> int:
    """What the tensor spans, from its first element."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return (last + 1) * t.element_size()


def _packed(kernel: str, parameter: Any, argument: Any) -> bytes:
    size = parameter.bytes
    argument = argument.encoded() if isinstance(argument, TensorMap) else argument
    if isinstance(argument, Tensor):
        if size != 8:
            raise TypeError(f"{kernel}: {parameter.name} is .{parameter.type}, found a tensor")
        return argument.data_ptr().to_bytes(8, "little")
    if isinstance(argument, bytes):
        if len(argument) != size:
            raise ValueError(f"{kernel}: {parameter.name} has {size} bytes, found {len(argument)}")
        return argument
    if parameter.type in _FORMATS:
        return struct.pack(_FORMATS[parameter.type], argument)
    if isinstance(argument, float):
        raise TypeError(f"{kernel}: {parameter.name} is .{parameter.type}, found the float {argument}")
    return (int(argument) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
