"""The tile of every launch: block sizes, warps, stages and registers, from tiles.json beside this
file.

    t = tile("forward", x, dtype=x.dtype, m=len(x), …)      # at a launch: of the GPU that holds x
    t = tile("forward", 90, dtype=x.dtype, m=4096, …)       # in the cost model: of sm_90

A kernel has a list of rows; a row has conditions ("if") and some of the numbers of a `Tile`. Each
number is that of the first row that has it and whose conditions hold: what is special stands above
what is usual, and one line above them all changes one case. A number has a condition as text: "64",
"-64" (at most), "65-", "100-109", "0,80"; a flag true or false; a dtype names. Every kernel knows
"arch" (90 is sm_90, 0 an AMD GPU) and "deterministic"; the others stand in "asks". m, k, n and
`entries` count as the next power of two. What a row says is what is wanted: at the launch
`sound_schedule` (triton_compiler.py) has the last word. Kernels whose names end in ".cu" have their
tile compiled in; tests compare their rows with the sources.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops import launch, tables
from lora_kernels.ops.registry import note_tile

FILE = Path(__file__).parent / "tiles.json"
ALWAYS = ("arch", "deterministic")  # asked of every kernel
SIZES = ("m", "k", "n", "entries")  # of which only the next power of two counts
ENDLESS = 2**62
MOST = 2**14  # answers that are remembered


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel takes; 0 where the kernel has no such number. A launch takes
    less of what is smaller."""

    rows: int = 0
    columns: int = 0
    depth: int = 0
    """Of a step of the main loop."""
    ranks: int = 0
    """Of a step of the loop over the adapter's ranks; of `shrink` of all layers together."""
    part: int = 0
    """How much of the depth, or of the rows, a program sums at most."""
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    """Of a thread, at most; None: as many as ptxas likes."""
    maps: bool = True
    """Whether tiles are loaded through tensor maps, where the GPU and the tensors allow it."""

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def __str__(self) -> str:
        sizes = " × ".join(f"{name} {getattr(self, name)}" for name in NUMBERS[:4] if getattr(self, name))
        more = [f"part {self.part}"] * bool(self.part) + [f"{self.warps} warps", f"{self.stages} stages"]
        more += [f"{self.registers} registers"] if self.registers else []
        return ", ".join([sizes, *more, *["no maps"] * (not self.maps)])


NUMBERS = tuple(field.name for field in fields(Tile))


class Row(NamedTuple):
    """One line of the file."""

    conditions: Mapping[str, Any]
    numbers: Mapping[str, Any]
    why: str = ""

    def holds(self, answers: Mapping[str, Any]) -> bool:
        return all(_holds(wanted, answers[name]) for name, wanted in self.conditions.items())

    def line(self) -> str:
        entries = {"if": self.conditions, "tile": self.numbers, "why": self.why}
        return json.dumps({name: part for name, part in entries.items() if part}, ensure_ascii=False)


class Kernel(NamedTuple):
    asks: tuple[str, ...]
    rows: tuple[Row, ...]


class TileRequest(NamedTuple):
    """One look into the table."""

    kernel: str
    answers: tuple[tuple[str, Any], ...]
    """As they count: sizes are powers of two, dtypes names."""
    tile: Tile


class MeasuredTile(NamedTuple):
    """What `ops.tuning` found to be the fastest for just these answers, on one GPU."""

    kernel: str
    answers: dict[str, Any]
    tile: Tile
    seconds: dict[str, float]
    """Of the tile, and of that of the table, by their words."""


_trial: ContextVar[tuple[TileRequest, ...]] = ContextVar("trial", default=())
_seen: ContextVar[list[TileRequest] | None] = ContextVar("seen", default=None)


def tile(kernel: str, on: Tensor | int, **answers: Any) -> Tile:
    """The tile of a kernel on the GPU that holds, or simulates, a tensor, or on an architecture.

    What was measured on that very GPU comes first, unless torch is deterministic: there a row's
    bits must not depend on m.

    Raises:
        KeyError: there is no such kernel.
        TypeError: the answers are not those that the kernel asks for.
    """
    deterministic, gpu = False, None
    trial: tuple[TileRequest, ...] = ()
    if isinstance(on, int):
        arch = on
    else:
        arch, deterministic, trial = launch.architecture(on), torch.are_deterministic_algorithms_enabled(), _trial.get()
        gpu = None if deterministic else launch.gpu_name(on)
    key = (kernel, torch.version.hip, arch, deterministic, gpu, trial, *answers, *answers.values())
    held = _found.get(key)
    if held is None:
        if len(_found) >= MOST:
            _found.clear()
        held = _found[key] = _tile(kernel, arch, deterministic, gpu, trial, answers)
    here, found, measured = held
    if (seen := _seen.get()) is not None:
        seen.append(TileRequest(kernel, here, found))
    if measured:
        note_tile(f"{kernel}: {found}, measured here")
    return found


@lru_cache(maxsize=1024)
def compiled(kernel: str, **answers: Any) -> Tile:
    """That of a kernel whose name ends in ".cu": it is the same on all GPUs, since its sources have
    it compiled in."""
    return _tile(kernel, 0, False, None, (), answers)[1]


_found: dict[tuple[Any, ...], tuple[tuple[tuple[str, Any], ...], Tile, bool]] = {}


def _tile(
    kernel: str, arch: int, deterministic: bool, gpu: str | None, trial: tuple[TileRequest, ...], given: dict[str, Any]
) -> tuple[tuple[tuple[str, Any], ...], Tile, bool]:
    arch, known = 0 if torch.version.hip is not None else arch, read()[kernel]
    if set(given) != set(known.asks):
        raise TypeError(f"tile: {kernel} asks for {', '.join(known.asks) or 'nothing'}, found {', '.join(given) or 'nothing'}")
    found = {name: counted(name, value) for name, value in given.items()}
    here = tuple(sorted(found.items()))
    for tried in trial:
        if (tried.kernel, tried.answers) == (kernel, here):
            return here, tried.tile, False
    for measured in local(gpu) if gpu else ():
        if (measured.kernel, measured.answers) == (kernel, found):
            return here, measured.tile, True
    return here, resolve(known.rows, found | {"arch": arch, "deterministic": deterministic}), False


@lru_cache
def local(gpu: str) -> tuple[MeasuredTile, ...]:
    """What was measured on this machine's GPU of that name; a file with rows that are none is left
    aside."""
    try:
        return tuple(MeasuredTile(**row | {"tile": Tile(**row["tile"])}) for row in tables.user_table(gpu).tiles)
    except (TypeError, KeyError) as error:
        warnings.warn(f"lora_kernels: {tables.user_file(gpu)}: its tiles are none ({error}) and are left aside", stacklevel=2)
        return ()


def as_row(measured: MeasuredTile) -> dict[str, Any]:
    """As it stands in the user's file."""
    return measured._asdict() | {"tile": asdict(measured.tile)}


def counted(name: str, value: Any) -> Any:
    """An answer as it counts."""
    if isinstance(value, torch.dtype):
        return str(value)[6:]
    return 1 << max(value - 1, 0).bit_length() if name in SIZES else value


def resolve(rows: Sequence[Row], answers: Mapping[str, Any]) -> Tile:
    """Each number of the first row that has it and holds."""
    numbers: dict[str, Any] = {}
    for row in rows:
        if row.holds(answers):
            numbers = {**row.numbers, **numbers}
    return Tile(**numbers)


def _holds(wanted: Any, answer: Any) -> bool:
    if isinstance(wanted, bool) or isinstance(answer, bool):
        return wanted is answer
    if isinstance(answer, str):
        return answer in wanted.split()
    return any(first <= answer <= last for first, last in ranges(wanted))


def ranges(text: str) -> list[tuple[int, int]]:
    """ "64", "-64", "65-" and "100-109", with commas between."""
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        found.append((int(first or 0), int(last or ENDLESS) if dash else int(first)))
    return found


@lru_cache
def read(path: Path = FILE) -> dict[str, Kernel]:
    """The rows of each kernel.

    Raises:
        ValueError: a row has a condition that its kernel does not ask for, a number that no tile
            has, or text that is none of the forms above.
    """
    kernels = {}
    for name, found in json.loads(path.read_text(encoding="utf-8")).items():
        asks = tuple(found["asks"].split())
        rows = tuple(Row(row.get("if", {}), row["tile"], row.get("why", "")) for row in found["rows"])
        for row in rows:
            _check(name, asks, row, path)
        kernels[name] = Kernel(asks, rows)
    return kernels


def _check(kernel: str, asks: tuple[str, ...], row: Row, path: Path) -> None:
    for condition, wanted in row.conditions.items():
        if condition not in (*asks, *ALWAYS):
            raise ValueError(f"{path.name}: {kernel} does not ask for {condition!r}: {row.line()}")
        if isinstance(wanted, str) and wanted[:1] in "-0123456789":
            ranges(wanted)
    for name, number in row.numbers.items():
        if name not in NUMBERS or (name in SIZED and (number <= 0 or number & (number - 1))):
            raise ValueError(f"{path.name}: {kernel} has {name} {number!r}, and a tile {', '.join(NUMBERS)}: {row.line()}")


SIZED = ("rows", "columns", "depth", "ranks", "part")  # powers of two


def write(kernels: Mapping[str, Kernel], path: Path) -> None:
    """A line for each row."""
    parts = []
    for name, kernel in kernels.items():
        rows = ",\n".join(f"  {row.line()}" for row in kernel.rows)
        parts.append(f' "{name}": {{"asks": "{" ".join(kernel.asks)}", "rows": [\n{rows}\n ]}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    forget()


@contextmanager
def tried(asked: TileRequest) -> Iterator[None]:
    """Inside it launches that ask just that take that tile."""
    token = _trial.set((asked, *_trial.get()))
    try:
        yield
    finally:
        _trial.reset(token)


@contextmanager
def seen() -> Iterator[list[TileRequest]]:
    """Inside it each look into the table is noted."""
    found: list[TileRequest] = []
    token = _seen.set(found)
    try:
        yield found
    finally:
        _seen.reset(token)


def forget() -> None:
    """Drops what was found: the files have changed."""
    read.cache_clear()
    local.cache_clear()
    compiled.cache_clear()
    _found.clear()
