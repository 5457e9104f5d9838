"""What a PTX text has outside of its kernels: variables with their initial values, and functions.
PTX ISA §5.4 and §7."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, empty, frombuffer, uint8

WIDTH = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
    "s32": 32, "f32": 32, "tf32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip
GAP = 256  # bytes around a variable that belong to nobody
_VARIABLE = re.compile(r"(?m)^\s*(?:\.(?:visible|weak|common)\s+)*\.(global|const)\b([^;]*);")
_DECLARED = re.compile(
    r"(?:\s*\.align\s+(\d+))?\s*(?:\.v([24]))?\s*\.(\w+)\s+([\w$.]+)((?:\[\d+\])*)\s*(?:=\s*(.*))?", re.S
)
_FUNCTION = re.compile(r"\.func\b\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?([^{};]*)\{")


class Unsupported(NotImplementedError):
    """The text holds something that the simulator does not know; the message names the line."""


@dataclass
class Variable:
    """A module's variable in `.global` or `.const`, at an address of this process; each launch
    starts from `image`."""

    name: str
    constant: bool
    unit: int
    """Bytes of an element: what two threads may write at a time."""
    memory: Tensor
    image: bytearray
    pointers: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Where in it addresses of other variables lie: their name and an offset."""

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    def reset(self) -> tuple[str, int, int, bool, bool, int]:
        """What the simulator is told of it, with its initial value."""
        self.memory.copy_(frombuffer(self.image, dtype=uint8))
        return self.name, self.address, len(self.image), not self.constant, False, self.unit


@dataclass
class Function:
    results: list[str]
    parameters: list[str]
    begin: int
    """Where its body begins in the text."""


def functions(text: str) -> dict[str, Function]:
    """Those that have a body and take memory of `.param`, not registers."""
    found = {}
    for head in _FUNCTION.finditer(text):
        results, name, parameters = head[1] or "", head[2], head[3] or ""
        if ".reg" not in results + parameters:
            given, taken = (re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", part) for part in (results, parameters))
            found[name] = Function(given, taken, head.end())
    return found


def variables(text: str, body: str) -> dict[str, Variable]:
    """Those that `body` names, and those whose addresses they hold."""
    declared = dict(_declarations(text))
    wanted = [name for name in declared if re.search(rf"(?<![\w$.]){re.escape(name)}(?![\w$])", body)]
    made: dict[str, Variable] = {}
    for name in wanted:  # which grows
        if name not in made:
            made[name] = _variable(name, *declared[name])
            wanted += [other for other, _ in made[name].pointers.values() if other in declared]
    for variable in made.values():
        for at, (other, offset) in variable.pointers.items():
            if other not in made:
                raise Unsupported(f"ptxsim: line {declared[variable.name][0]}: the address of {other}")
            variable.image[at : at + 8] = (made[other].address + offset).to_bytes(8, "little")
    return made


def _declarations(text: str) -> Iterator[tuple[str, tuple[int, str, re.Match[str]]]]:
    for each in _VARIABLE.finditer(text):
        found = _DECLARED.fullmatch(each[2].rstrip())
        # others are textures and the like: unknown where they are named
        if found and found[3] in WIDTH:
            yield found[4], (text.count("\n", 0, each.start(1)) + 1, each[1], found)


def _variable(name: str, line: int, space: str, found: re.Match[str]) -> Variable:
    align, vector, kind, _, sizes, initial = found.groups()
    unit = WIDTH[kind] // 8
    size = unit * int(vector or 1)
    for count in re.findall(r"\d+", sizes):
        size *= int(count)
    image, pointers = bytearray(size), {}
    values = [each.strip() for each in re.sub(r"[{}]", "", initial or "").split(",")]
    for i, value in enumerate(value for value in values if value):
        number = re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?|0[fFdD]([0-9a-fA-F]+)", value)
        pointer = re.fullmatch(r"(?:generic\()?([A-Za-z_$%][\w$.]*)\)?\s*(?:\+\s*(\d+))?", value)
        if number:
            bits = int(number[1], 0) if number[1] else int(number[2], 16)
            image[i * unit : (i + 1) * unit] = (bits & ((1 << 8 * unit) - 1)).to_bytes(unit, "little")
        elif pointer and unit == 8:
            pointers[i * unit] = (pointer[1], int(pointer[2] or 0))
        else:
            raise Unsupported(f"ptxsim: line {line}: the initial value {value} of {name}")
    if len(image) != size:
        raise Unsupported(f"ptxsim: line {line}: {name} has {size} bytes and {len(image)} of initial values")
    step = int(align or unit * int(vector or 1))
    held = empty(size + 2 * GAP + step, dtype=uint8)
    first = GAP + -(held.data_ptr() + GAP) % step
    return Variable(name, space == "const", unit, held[first : first + size], image, pointers)
