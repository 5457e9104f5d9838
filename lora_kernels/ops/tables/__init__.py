"""One JSON file an architecture: which share of its peaks our kernels reach, and what was measured to be the fastest.

Until `python -m bench.tune` fills a file on a GPU, its figures are predictions ("measured": false): a vendor's GEMM by
published measurements (0.67 of the peak on the H100, 0.82 on the A100; elsewhere a guess), ours at 0.90 to 0.95 of that;
CUDA C++ by mma.sync at 0.9 of ours in Triton, which uses wgmma on sm_90 and tcgen05 on sm_100: there at 0.55 and 0.2 of it.
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels.ops.chips import nearest

FOLDER = str(Path(__file__).parent)
SIZES = {"small": 64, "medium": 1024, "large": math.inf}  # the most rows of each class
SHARES = ("fused", "vendor", "one_pass", "thin", "stream", "mma")


class Choice(NamedTuple):
    """The fastest candidate at one measured shape. `n` and `r` have a number for each layer that shares x."""

    direction: str
    dtype: str
    m: int
    k: int
    n: tuple[int, ...]
    r: tuple[int, ...]
    winner: str
    seconds: dict[str, float]


class Table(NamedTuple):
    """What one file says."""

    arch: int
    gpu: str | None
    """Which it was measured on."""
    measured: bool
    stamp: dict[str, Any] | None
    efficiency: dict[str, dict[str, dict[str, float]]]
    """By kind of dtype ("half" is 16 bits, "single" the others) and class of m in SIZES. "fused", "vendor", "one_pass", "mma":
    the share of the peak operations a second that such a GEMM reaches; "thin", "stream": the share of the memory's bandwidth
    that a kernel with a thin matrix and a GEMM reach."""
    choices: tuple[Choice, ...] = ()

    def shares(self, half: bool, m: int) -> dict[str, float]:
        """The efficiencies for m rows."""
        size = next(name for name, most in SIZES.items() if m <= most)
        return self.efficiency["half" if half else "single"][size]


@lru_cache
def table(arch: int, folder: str = FOLDER) -> Table:
    """The table of the nearest architecture that has one in the folder, or else in the package."""
    known = {int(path.stem.removeprefix("sm_")): path for path in Path(folder).glob("sm_*.json")}
    if not known:
        return table(arch)
    found = json.loads(known[nearest(arch, known)].read_text(encoding="utf-8"))
    choices = [Choice(**{**row, "n": tuple(row["n"]), "r": tuple(row["r"])}) for row in found.pop("choices")]
    return Table(**found, choices=tuple(choices))


def write(made: Table, folder: str | Path) -> Path:
    """Writes sm_<arch>.json, a line for each class and each choice."""
    kinds = {kind: _lines(classes) for kind, classes in made.efficiency.items()}
    rows = [json.dumps(choice._asdict()) for choice in made.choices]
    parts = [f'"{name}": {json.dumps(getattr(made, name))}' for name in ("arch", "gpu", "measured", "stamp")]
    parts += ['"efficiency": {\n  ' + ",\n  ".join(f'"{kind}": {text}' for kind, text in kinds.items()) + "\n }"]
    parts += ['"choices": [' + ",".join(f"\n  {row}" for row in rows) + ("\n ]" if rows else "]")]
    path = Path(folder) / f"sm_{made.arch}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")
    table.cache_clear()
    return path


def _lines(classes: dict[str, dict[str, float]]) -> str:
    return "{\n   " + ",\n   ".join(f'"{name}": {json.dumps(shares)}' for name, shares in classes.items()) + "\n  }"


def nearest_choice(choices: Sequence[Choice], direction: str, dtype: str, shape: tuple[Any, ...]) -> list[Choice]:
    """Those measured within a factor of two of each of `shape`'s numbers (m, k, n, r), the nearest first, in log space."""
    wanted = _numbers(*shape)
    found = []
    for choice in choices:
        if (choice.direction, choice.dtype, len(choice.n)) == (direction, dtype, len(shape[2])):
            pairs = zip(_numbers(choice.m, choice.k, choice.n, choice.r), wanted, strict=True)
            apart = [abs(math.log2(max(one, 1) / max(other, 1))) for one, other in pairs]
            if max(apart) <= 1:
                found.append((math.hypot(*apart), choice))
    return [choice for _, choice in sorted(found, key=lambda pair: pair[0])]


def _numbers(m: int, k: int, n: Sequence[int], r: Sequence[int]) -> tuple[int, ...]:
    return (m, k, *n, *r)
