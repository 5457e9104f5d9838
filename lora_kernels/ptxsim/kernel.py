"""Launching a decoded kernel on tensors."""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels import _ptxsim
from lora_kernels.ptxsim.decode import Decoded
from lora_kernels.ptxsim.device import current
from lora_kernels.ptxsim.tensor_map import ALIGNMENT as MAP_ALIGNMENT
from lora_kernels.ptxsim.tensor_map import TensorMap

OPTIONS = {
    "check": True, "late": True, "shuffle": True, "seed": 0, "resident": 8, "trace": False, "tolerant": False,
    "early": False,
}  # fmt: skip
_NAN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FORMATS = {"f32": "<f", "f64": "<d"}
GRID, BLOCK = (2**31 - 1, 65535, 65535), (1024, 1024, 64)
_KIB = 1024
SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB that a block may have by opting in, by architecture: "Technical Specifications per Compute
Capability", CUDA C++ Programming Guide."""
DEPENDENT = 90  # from which architecture on launches may overlap
STEPS = 200_000_000  # instructions of one block after which a launch is given up


class SimulationError(AssertionError):
    """The kernel did what a GPU might not forgive; the message lists each finding with its line of
    the PTX."""


@dataclass(frozen=True)
class Run:
    """What one launch did."""

    errors: list[str]
    counters: dict[str, int]
    """Sectors of 32 bytes, bytes, requests, passes of shared memory and their ideal, mma, barriers,
    atomics, instructions."""
    by_opcode: dict[str, int]
    """Instructions that warps executed, by opcode."""
    trace: bytes
    """With `trace`: each sector as uint64, twice its number, and 1 for a store."""


class Kernel:
    """One kernel of a PTX text.

    Raises:
        Unsupported: it holds an instruction that the simulator does not know; the message names the
            line.
        ValueError: the text has no such kernel.
    """

    def __init__(self, ptx: str, entry: str | None = None) -> None:
        self._decoded = Decoded(ptx, entry)
        self.name = self._decoded.kernel.name
        self.parameters = self._decoded.parameters
        target = re.search(r"\.target\s+sm_(\d+)", ptx)
        self._arch = int(target[1]) if target else 0
        self._most_shared = SHARED.get(self._arch, max(SHARED.values())) * _KIB

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Tensor | TensorMap | int | float | bytes | tuple[Any, ...]],
        writes: Sequence[Tensor] = (),
        poisoned: Sequence[Tensor] = (),
        shared: int = 0,
        **options: Any,
    ) -> Run:
        """Runs the kernel.

        `args` stand for its parameters in order: a CPU tensor for a pointer, numbers, a
        `TensorMap`. For a struct they are its bytes or a tuple of its fields: tensors, None for
        null, int for numbers of 64 bits, float for those of 32, a `TensorMap`. It may touch only
        these tensors and change only those in `writes`. Of those in `poisoned`, which are filled
        with NaN, it may read only what it wrote itself. The text's own variables begin with their
        initial values each time. `shared` is the dynamic shared memory in bytes.

        Options, which `device()` sets for many launches:
            check (True): look for races and for memory that nobody wrote
            late (True): a cp.async lands when it is waited for, else as soon as it is issued
            shuffle (True), seed (0): blocks and warps take their turns in an order drawn from the
            seed
            resident (8): blocks that run side by side
            trace (False): keep every sector that was touched
            tolerant (False): give back what was found in `errors` instead of raising it
            early (False): it may start while the launch before it in `device()` runs, from sm_90
                on; what that writes is there, and what it reads may be written, only after
                griddepcontrol.wait (programmatic dependent launch)

        Raises:
            SimulationError: something was found.
            TypeError, ValueError: the arguments do not fit the parameters; no GPU takes such a
                grid, block or size of shared
                memory; there is no such option or it has no such value.
        """
        tensors: dict[int, tuple[str, int, int]] = {}

        def touches(name: str, t: Tensor) -> None:
            first, extent, unit = tensors.get(t.data_ptr(), (name, 0, t.element_size()))
            tensors[t.data_ptr()] = first, max(extent, _bytes_from(t)), min(unit, t.element_size())

        packed = bytearray(max((p.offset + p.bytes for p in self.parameters), default=0))
        if len(args) != len(self.parameters):
            raise ValueError(f"{self.name}: {len(self.parameters)} parameters, found {len(args)} arguments")
        for parameter, argument in zip(self.parameters, args, strict=True):
            fields = argument if isinstance(argument, tuple) else (argument,)
            for i, one in enumerate(fields):
                tensor = one.tensor if isinstance(one, TensorMap) else one
                if isinstance(tensor, Tensor):
                    name = f"{parameter.name}[{i}]" if fields is argument else parameter.name
                    if tensor.device.type != "cpu":
                        raise ValueError(f"{self.name}: {name} must be on the CPU, found {tensor.device}")
                    touches(name, tensor)
            packed[parameter.offset : parameter.offset + parameter.bytes] = _packed(self.name, parameter, argument)
        for extra in (*writes, *poisoned):
            touches(f"tensor {len(tensors)}", extra)
        changed, fresh = {t.data_ptr() for t in (*writes, *poisoned)}, {t.data_ptr() for t in poisoned}
        buffers = [(name, at, extent, at in changed, at in fresh, unit) for at, (name, extent, unit) in tensors.items()]
        buffers += [variable.reset() for variable in self._decoded.variables]
        blocks, size = [*grid, 1, 1][:3], [*block, 1, 1][:3]
        self._check_limits(blocks, size, shared)
        o = self._options(options)
        # what is left unwritten shall not hold what was there, which may be right
        for t in poisoned:
            if t.dtype in _NAN:
                t.fill_(float("nan"))
        sim = current.get()
        before = sim.before if sim and o["early"] and self._arch >= DEPENDENT else []
        found = _ptxsim.run(
            self._decoded.program, blocks, size, bytes(packed), buffers, before, shared, o["check"], o["late"], o["shuffle"],
            o["seed"], STEPS, o["trace"], o["resident"],
        )  # fmt: skip
        passes_on = found.pop("passes_on")
        if sim:  # what that launch met the next one may meet, too, if it need not wait for it
            touched = [(name, at, extent, at in changed) for at, (name, extent, _) in tensors.items()]
            sim.before = touched + (before if passes_on else [])
        if found["errors"] and not o["tolerant"]:
            raise SimulationError(f"{self.name}:\n" + "\n".join(found["errors"]))
        if sim:
            sim.launches += 1
            sim.counters.update(found["counters"])
            sim.by_opcode.update(found["by_opcode"])
            sim.trace += found["trace"]
            sim.ends.append(len(sim.trace))
        return Run(**found)

    def _check_limits(self, grid: list[int], block: list[int], shared: int) -> None:
        threads, most = block[0] * block[1] * block[2], self._decoded.kernel.most_threads or 1024
        if not 1 <= threads <= most:
            raise ValueError(f"{self.name}: a block has 1 to {most} threads, found {block}")
        for what, limits, found in (("grid", GRID, grid), ("block", BLOCK, block)):
            if not all(1 <= size <= limit for size, limit in zip(found, limits, strict=True)):
                raise ValueError(f"{self.name}: the {what} must be 1 to {limits}, found {found}")
        static = self._decoded.kernel.shared_bytes
        if not 0 <= shared <= self._most_shared - static:
            raise ValueError(
                f"{self.name}: shared memory must be 0 to {self._most_shared} bytes a block, found {shared} and {static} static"
            )

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        sim = current.get()
        chosen = {**OPTIONS, **(sim.options if sim else {}), **given}
        if unknown := set(chosen) - set(OPTIONS):
            raise TypeError(f"{self.name}: launch has no option {', '.join(sorted(unknown))}")
        for option, value in chosen.items():
            least, last = {"seed": (0, 2**64 - 1), "resident": (1, 2**31 - 1)}.get(option, (0, 1))
            if not isinstance(value, int) or not least <= value <= last:
                wanted = "True or False" if last == 1 else f"an integer from {least} to {last}"
                raise ValueError(f"{self.name}: {option} must be {wanted}, found {value!r}")
        return chosen


def _bytes_from(t: Tensor) -> int:
    """What the tensor spans, from its first element."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return (last + 1) * t.element_size()


def struct_of(fields: tuple[Any, ...]) -> bytes:
    """A struct as C++ lays it out: pointers and integers of 64 bits, floats of 32, each at a
    multiple of its size; maps of tensors at multiples of 64."""
    made, most = bytearray(), 8
    for value in fields:
        if isinstance(value, TensorMap):
            most = MAP_ALIGNMENT
            made += bytes(-len(made) % most) + value.encoded()
            continue
        if isinstance(value, float):
            made += struct.pack("<f", value)
            continue
        number = value.data_ptr() if isinstance(value, Tensor) else int(value or 0)
        made += bytes(-len(made) % 8) + (number & (2**64 - 1)).to_bytes(8, "little")
    return bytes(made) + bytes(-len(made) % most)


def _packed(kernel: str, parameter: Any, argument: Any) -> bytes:
    size = parameter.bytes
    argument = argument.encoded() if isinstance(argument, TensorMap) else argument
    if isinstance(argument, Tensor):
        if size != 8:
            raise TypeError(f"{kernel}: {parameter.name} is .{parameter.type}, found a tensor")
        return argument.data_ptr().to_bytes(8, "little")
    if isinstance(argument, tuple):
        argument = struct_of(argument)
    if isinstance(argument, bytes):
        if len(argument) != size:
            raise ValueError(f"{kernel}: {parameter.name} has {size} bytes, found {len(argument)}")
        return argument
    if parameter.type in _FORMATS:
        return struct.pack(_FORMATS[parameter.type], argument)
    if isinstance(argument, float):
        raise TypeError(f"{kernel}: {parameter.name} is .{parameter.type}, found the float {argument}")
    return (int(argument) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
