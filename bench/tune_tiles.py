"""The part of `python -m bench.tune` that times tiles: rows for lora_kernels/ops/tables/tiles.json.

Around the tile of each kernel of a shape's fastest candidate the neighbours are timed
(lora_kernels.ops.tile_tuning) that pass the gates, without a budget: they compile, spill nothing,
have no hazard and fit. What is faster becomes a row above the others, for this architecture and
that size, and outside of the deterministic mode. To be looked at; `make gates` then compiles what
the gates have of it.
"""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lora_kernels.ops import dispatch
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.tables import tiles
from lora_kernels.ops.tables.tiles import NUMBERS, Kernel, MeasuredTile, Row
from lora_kernels.ops.tile_tuning import Refuse, tune_tiles
from lora_kernels.ops.tuning import Calls, Times


def propose(
    shapes: Iterable[Problem], arch: int, op: Callable[[Problem], Calls], clock: Callable[[Calls], Times], refuse: Refuse,
    folder: str | Path, why: str, seconds: float = 1800.0, backends: tuple[str, ...] = ("triton",),
) -> list[Row]:  # fmt: skip
    """Measures, writes tiles.json of the folder, and gives the new rows; nothing is written where
    no tile is faster. `why` is what each says of itself. With the choices of the folder's table."""
    until, found = time.monotonic() + seconds, []
    for p in shapes:
        with dispatch.tables_from(folder):
            winner = dispatch.choose_plan(p, arch, backends=backends).winner
        call = op(p).get(winner)
        if call is not None:
            found += tune_tiles(winner, call, clock, refuse, until)
    rows = [(one.kernel, row(one, arch, why)) for one in {(one.kernel, str(one.answers)): one for one in found}.values()]
    if rows:
        kernels = tiles.read()
        for kernel, new in rows:
            asks, old = kernels[kernel]
            others = tuple(each for each in old if each.conditions != new.conditions)
            kernels = {**kernels, kernel: Kernel(asks, (new, *others))}
        tiles.write(kernels, Path(folder) / tiles.FILE.name)
    return [new for _, new in rows]


def row(one: MeasuredTile, arch: int, why: str) -> Row:
    """The line for what was measured: all numbers of its tile, for just its answers."""
    conditions = {name: value if isinstance(value, bool | str) else str(value) for name, value in one.answers.items()}
    numbers = {name: getattr(one.tile, name) for name in NUMBERS if getattr(one.tile, name) not in (0, None)}
    return Row({"arch": str(arch), "deterministic": False, **conditions}, numbers, why)


def report(rows: list[Row], folder: str | Path) -> None:
    for each in rows:
        print(each.line())
    place = Path(folder) / tiles.FILE.name
    print(f"bench.tune: {len(rows)} tiles are faster" + (f", in {place}; make gates" if rows else ""), file=sys.stderr)
