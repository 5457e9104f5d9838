"""Times a few tiles around those of the table: the neighbours of each kernel of the fastest
candidate of a problem.

A neighbour has one number of the tile doubled, halved, or one stage more or less. It is left out
before it is timed where it is not sound (the launch takes other warps or stages), where it is
another one's launch, and where it does not compile, spills or wants more than the GPU has. One that
is faster by MARGIN is kept for just those answers, and holds outside of the deterministic mode
alone, where a row's bits must not depend on m.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from lora_kernels.ops.launch import Launch, compiled_on, recorded
from lora_kernels.ops.tables.tiles import MeasuredTile, Tile, TileRequest, seen, tried

Call = Callable[[], object]
Clock = Callable[[dict[str, Call]], dict[str, float]]
Refuse = Callable[[Launch], str | None]

# of a candidate the kernels whose tiles matter, in this order; the others take what is left
KERNELS = {
    "two launches": ("forward", "shrink"), "one pass": ("forward",), "fused": ("input_gradient", "both_sides", "outer"),
    "addmm": ("shrink", "expand", "both_sides", "outer"),
    "codes": ("quantised_forward", "quantised_input_gradient", "shrink", "both_sides", "outer"),
}  # fmt: skip
LIMITS = {"rows": (16, 256), "columns": (16, 512), "depth": (16, 256), "warps": (1, 16), "stages": (1, 6)}
MARGIN = 0.97  # of the table's time: below is faster, and no noise
TABLE = "table"  # the name of its tile among those that are timed


def neighbours(t: Tile) -> Iterator[Tile]:
    """What is tried beside a tile, the cheapest guess first."""
    for name in ("warps", "stages", "rows", "columns", "depth"):
        number = getattr(t, name)
        least, most = LIMITS[name]
        for other in (number + 1, number - 1) if name == "stages" else (2 * number, number // 2):
            if number and least <= other <= most:
                yield replace(t, **{name: other})


def tune_tiles(winner: str, call: Call, clock: Clock, refuse: Refuse, until: float) -> list[MeasuredTile]:
    """The tiles that are faster than the table's for a call, which runs the candidate `winner`, as
    far as there is time."""
    found: list[MeasuredTile] = []
    with ExitStack() as better:
        for name in KERNELS.get(winner, ()):
            for asked in _tile_requests(call, name):
                measured = _best(asked, call, clock, refuse, until)
                if measured is not None:
                    found.append(measured)
                    better.enter_context(tried(asked._replace(tile=measured.tile)))
    return found


def _tile_requests(call: Call, kernel: str) -> list[TileRequest]:
    with seen() as looks, recorded():
        call()
    return list({one.answers: one for one in looks if one.kernel == kernel}.values())


def _best(asked: TileRequest, call: Call, clock: Clock, refuse: Refuse, until: float) -> MeasuredTile | None:
    known, others = {_key(_launches(call, asked))}, {}
    for other in neighbours(asked.tile):
        if time.monotonic() > until:
            break
        launches = _launches(call, asked._replace(tile=other))
        if _key(launches) in known or any((one.warps, one.stages) != (other.warps, other.stages) for one in launches):
            continue
        known.add(_key(launches))
        if not any(refuse(one) for one in launches):
            others[str(other)] = other
    if not others or time.monotonic() > until:
        return None
    seconds = clock({TABLE: call} | {text: _with(asked._replace(tile=other), call) for text, other in others.items()})
    seconds = {name: float(f"{value:.4g}") for name, value in seconds.items()}
    best = min(others, key=seconds.__getitem__)
    if seconds[best] > MARGIN * seconds[TABLE]:
        return None
    return MeasuredTile(asked.kernel, dict(asked.answers), others[best], {name: seconds[name] for name in (TABLE, best)})


def _with(asked: TileRequest, call: Call) -> Call:
    def run() -> object:
        with tried(asked):
            return call()

    return run


def _launches(call: Call, asked: TileRequest) -> list[Launch]:
    """What a call launches of a kernel with that tile."""
    with tried(asked), recorded() as found:
        call()
    return [one for one in found if one.name == f"{asked.kernel}_kernel"]


def _key(launches: list[Launch]) -> str:
    return str([(one.grid, one.options(), sorted(_sizes(one).items())) for one in launches])


def _sizes(one: Launch) -> dict[str, Any]:
    return {name: value for name, value in one.args.items() if name.isupper()}


def refuse_on(device: torch.device) -> Refuse:
    """Why a launch is not to be taken on a GPU: it does not compile, wants more than there is, or
    spills registers."""

    def refuse(one: Launch) -> str | None:
        try:
            made = compiled_on(one, device)
        # each compiler has its own, and Triton's are no base class of each other
        except Exception as error:
            return f"does not compile: {type(error).__name__}: {error}"
        return f"spills {made.n_spills} bytes" if made.n_spills else None

    return refuse


def words(found: Sequence[MeasuredTile]) -> list[str]:
    """A line for each tile: the kernel, what it is for, the tile, and its time beside that of the
    table's."""
    lines = []
    for one in found:
        answers = ", ".join(f"{name} {value}" for name, value in one.answers.items() if value not in (False, None))
        times = ", ".join(f"{'here' if name != TABLE else name} {1e6 * seconds:.1f}" for name, seconds in one.seconds.items())
        lines.append(f"{one.kernel} of {answers}: {one.tile} (µs: {times})")
    return lines
