"""What is shipped: a kernel with its tiles, the chips it is for, and what its code must be like on
each."""

import functools
import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import torch
from torch import Tensor

from lora_kernels.ptxsim import nvcc
from lora_kernels.ptxsim.triton_ptx import map_leaves
from lora_kernels.testing.gates import occupancy, sass
from lora_kernels.testing.gates.occupancy import CHIPS

NVIDIA = tuple(arch for arch in CHIPS if arch.startswith("sm_"))
BY = ", triton "  # between a chip and the version of another Triton than the one installed
_ANALYSIS = ("code.py", "sass.py", "amdgcn.py", "occupancy.py", "hazards.py")


@dataclass(frozen=True)
class Budget:
    """What a person found good enough, recorded by hand. The main loop is that of
    `code.MainLoop`."""

    per: float
    """At most so many instructions of the main loop for each matrix instruction, or for each load
    where there is none."""
    matrix: str = ""
    """The matrix instruction that the main loop must have."""
    units: int = 1
    """At least so many of them, which are fewer where a loop was not unrolled."""
    wide: int = 0
    """At least so many loads of 16 bytes or whole tiles in the kernel."""
    blocks: int = 1
    """At least so many blocks on a multiprocessor."""
    copies: int = 0
    """At most so many loops inside the main loop that touch memory."""
    spilled: int = 0
    """At most so many loads and stores of spilled registers, which cost time alone."""


class Change(TypedDict, total=False):
    """The fields of a case's default `Budget` that a chip has otherwise."""

    per: float
    matrix: str
    units: int
    wide: int
    blocks: int
    copies: int
    spilled: int


@dataclass(frozen=True)
class Map:
    """Stands for a map of a matrix, a `TensorDescriptor`, among the arguments."""

    dtype: torch.dtype
    box: tuple[int, ...]


@dataclass(frozen=True)
class Triton:
    """A `@triton.jit` function, as "module:name", which is imported only where Triton is
    installed."""

    function: str
    args: Mapping[str, Any]
    """As for a launch; a dtype stands for a tensor of it whose address divides by 16, a `Map` for a
    map."""
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    """Of a thread, at most; None: as many as ptxas likes."""

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def chips(self) -> tuple[str, ...]:
        return tuple(CHIPS)

    def load(self) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)

    def launch_arguments(self) -> dict[str, Any]:
        """The arguments as tensors and numbers."""
        return {name: map_leaves(value, _stand_in_tensor) for name, value in self.args.items()}

    def sources(self) -> Iterator[str]:
        """The text of the function and of all it calls, with the constants they read."""
        todo, seen = [self.load()], set()
        while todo:
            function = todo.pop()
            if function.fn in seen:
                continue
            seen.add(function.fn)
            yield function.src
            names = function.fn.__code__.co_names
            places = [vars(v) for v in _bound_names(names, function.fn.__globals__).values() if isinstance(v, ModuleType)]
            for place in [function.fn.__globals__, *places]:
                for name, value in _bound_names(names, place).items():
                    if hasattr(value, "src") and hasattr(value, "fn"):
                        todo.append(value)
                    elif isinstance(value, (bool, int, float, str)) or type(value).__name__ == "constexpr":
                        yield f"{name}={value}"

    def arguments_text(self) -> str:
        """The rest of what decides about the code."""
        args = {name: map_leaves(value, _tensor_text) for name, value in self.args.items()}
        limit = "" if self.registers is None else f" {self.registers}"
        return f"{self.function} {args} {self.warps} {self.stages}{limit}"

    def version(self) -> str:
        import triton

        return f"triton {triton.__version__}"

    def assembler(self, arch: str) -> str:
        """The version of ptxas that this Triton takes for a chip of NVIDIA's, as 12.9."""
        from lora_kernels.ops.triton_compiler import ptxas_release

        return ptxas_release(int(arch[3:]))

    def missing(self, arch: str) -> str | None:
        """What is not here, in words."""
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"triton is not installed ({error}); requirements-dev.txt has it for Linux on x86-64"
        return sass.missing() or occupancy.missing() if arch in NVIDIA else None


@dataclass(frozen=True)
class Cuda:
    """A `__global__` function with C linkage in a file."""

    source: Path
    kernel: str
    threads: int
    options: tuple[str, ...] = ()
    shared: int = 0
    """Dynamic shared memory in bytes."""

    @property
    def warps(self) -> int:
        return -(-self.threads // 32)

    @property
    def chips(self) -> tuple[str, ...]:
        return NVIDIA

    def sources(self) -> Iterator[str]:
        """The text of the file and of all that it includes in quotes."""
        folders = [Path(option[2:]) for option in self.options if option.startswith("-I")]
        todo, seen = [self.source], set()
        while todo:
            file = todo.pop().resolve()
            if file in seen:
                continue
            seen.add(file)
            text = file.read_text()
            yield text
            for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
                todo += [path / name for path in (file.parent, *folders) if (path / name).is_file()][:1]

    def arguments_text(self) -> str:
        options = [option for option in self.options if not option.startswith("-I")]
        architectures = [nvcc.source_architecture(arch) for arch in NVIDIA]
        return f"{self.kernel} {self.threads} {options} {self.shared} {nvcc.OPTIONS} {architectures}"

    def version(self) -> str:
        return f"nvcc {nvcc.version()}"

    def missing(self, arch: str) -> str | None:
        """What is not here, in words."""
        gone = f"{nvcc.MISSING}; requirements-dev.txt has the wheel for Linux on x86-64" if nvcc.find_nvcc() is None else None
        return gone or sass.missing() or occupancy.missing()


@dataclass(frozen=True)
class Configuration:
    """A kernel, and its budget: a default, and a row for each chip that differs from it.

    Raises:
        ValueError: `rows` and `without` name a chip twice, or one that the language or the case has
            not.
    """

    name: str
    kernel: Triton | Cuda
    default: Budget
    rows: Mapping[str, Change] = field(default_factory=dict)
    """By chip, "sm_80 sm_86" for several at once; and for a chip under another Triton, "sm_90,
    triton 3.6.0", which inherits from the chip's row."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Chips this is not shipped for, and why."""
    special: Mapping[str, Triton] = field(default_factory=dict)
    """What is launched in the place of `kernel` on some chips, or under another Triton: "sm_90,
    triton 3.6.0"."""

    def __post_init__(self) -> None:
        named = " ".join([*(row for row in self.rows if BY not in row), *self.without]).split()
        if len(set(named)) < len(named) or not set(named) <= set(self.kernel.chips):
            raise ValueError(f"{self.name}: rows and without name {' '.join(named)}, not once {' '.join(self.kernel.chips)}")
        if stray := [row for row in self.rows if BY in row and row.partition(BY)[0] not in self.chips]:
            raise ValueError(f"{self.name}: rows name {'; '.join(stray)}; it is shipped for {' '.join(self.chips)}")

    @property
    def chips(self) -> tuple[str, ...]:
        return tuple(chip for chip in self.kernel.chips if chip not in " ".join(self.without).split())

    def kernel_on(self, arch: str, version: str = "") -> Triton | Cuda:
        """What is launched on a chip, by another Triton than the one installed if `version` names
        it."""
        return self.special.get(f"{arch}{BY}{version}", self.special.get(arch, self.kernel))

    def budget(self, arch: str, version: str = "") -> Budget:
        """Of a chip, under another Triton than the one installed if `version` names it."""
        own = next((change for chips, change in self.rows.items() if arch in chips.split()), Change())
        return replace(self.default, **(own | self.rows.get(f"{arch}{BY}{version}", Change())))

    def fingerprint(self, arch: str = "", version: str = "") -> str:
        """Of all that decides about the numbers: the source, these arguments, the compiler, how
        code is read. `version`: of Triton, if it is another than the one installed."""
        kernel = self.kernel_on(arch, version)
        parts = [
            *kernel.sources(),
            kernel.arguments_text(),
            f"triton {version}" if version else kernel.version(),
            *_how_code_is_read(),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@functools.cache
def _how_code_is_read() -> list[str]:
    return [(Path(__file__).parent / name).read_text() for name in _ANALYSIS]


def _tensor_text(value: Any) -> Any:
    return f"{value.dtype} at {value.data_ptr() % 16}" if isinstance(value, Tensor) else value


def _stand_in_tensor(value: Any) -> Any:
    if isinstance(value, Map):
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(torch.empty(value.box, dtype=value.dtype), list(value.box))
    return torch.empty(0, dtype=value) if isinstance(value, torch.dtype) else value


def _bound_names(names: tuple[str, ...], place: Mapping[str, Any]) -> dict[str, Any]:
    return {name: place[name] for name in names if name in place}
