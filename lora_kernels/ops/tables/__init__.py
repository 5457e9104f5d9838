"""One JSON file an architecture: which share of its peaks our kernels reach, and what was measured
to be the fastest.

Until `python -m bench.tune` fills a file on a GPU, its figures are predictions ("measured": false),
at the pessimistic end of what was published: the library's GEMM at 0.67 of the peak on the H100 and
0.82 on the A100; ours at 0.51 of that on sm_90 (370 of 722 TFLOP/s in triton-lang/triton#2339, a
GEMM by wgmma without specialised warps) and, by the same lack, on sm_100; at 0.68 on sm_86, 89 and
120 (75 of 110 TFLOP/s in triton-lang/triton#319, an RTX 3090), and at 0.9 on sm_80. CUDA C++ by
mma.sync at 0.9 of ours where Triton uses it, too; on sm_90 at 0.45 of the library, on sm_100 at a
fifth. They decide for few rows alone. "specialised" at 0.8 of the library on sm_90 (635 of 798
TFLOP/s at 8192³ for a producer and consumers without a persistent grid, 658 with one, in
pranjalssh/fast.cu, an H100); elsewhere, where there is none, it stands as "mma" does.
"""

import json
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels._version import __version__
from lora_kernels.ops.chips import nearest_architecture

FOLDER = str(Path(__file__).parent)
SIZES = {"small": 64, "medium": 1024, "large": math.inf}  # the most rows of each class
SHARES = ("fused", "library", "one_pass", "thin", "stream", "mma", "specialised")


class Choice(NamedTuple):
    """The fastest candidate at one measured shape. `n` and `r` have a number for each layer that
    shares x."""

    direction: str
    dtype: str
    m: int
    k: int
    n: tuple[int, ...]
    r: tuple[int, ...]
    winner: str
    seconds: dict[str, float]
    flags: tuple[str, ...] = ()
    """Those of `cost.Problem`."""


class Table(NamedTuple):
    """What one file says."""

    arch: int
    gpu: str | None
    """Which it was measured on."""
    measured: bool
    stamp: dict[str, Any] | None
    efficiency: dict[str, dict[str, dict[str, float]]]
    """By kind of dtype ("half" is 16 bits, "single" the others) and class of m in SIZES. "fused",
    "library", "one_pass", "mma", "specialised": the share of the peak operations a second that such
    a GEMM reaches; "thin", "stream": the share of the memory's bandwidth that a kernel with a thin
    matrix and a GEMM reach."""
    choices: tuple[Choice, ...] = ()
    tiles: tuple[dict[str, Any], ...] = ()
    """The fastest tiles that were measured, in a user's file: each a `tiles.MeasuredTile`."""

    def has_measured(self, dtype: str) -> bool:
        """Whether calls of a dtype were measured on such a GPU."""
        return self.measured and any(choice.dtype == dtype for choice in self.choices)

    def efficiencies(self, half: bool, m: int) -> dict[str, float]:
        """The efficiencies for m rows."""
        size = next(name for name, most in SIZES.items() if m <= most)
        return self.efficiency["half" if half else "single"][size]


@lru_cache
def table_for(arch: int, folder: str = FOLDER) -> Table:
    """The table of the nearest architecture that has one in the folder, or else in the package."""
    known = {int(path.stem.removeprefix("sm_")): path for path in Path(folder).glob("sm_*.json")}
    if not known:
        return table_for(arch)
    return _read_table(known[nearest_architecture(arch, known)])


def _read_table(path: Path) -> Table:
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [{**row, **{name: tuple(row.get(name, ())) for name in ("n", "r", "flags")}} for row in found.pop("choices")]
    known = {name: each for name, each in found.items() if name in Table._fields}
    return Table(**known | {"tiles": tuple(found.get("tiles", ()))}, choices=tuple(Choice(**row) for row in rows))


def user_file(gpu: str) -> Path:
    """The file in the user's cache directory that holds what was measured on a GPU of that name
    with these versions."""
    triton = sys.modules.get("triton")
    names = [gpu, f"torch {torch.__version__}", f"triton {triton.__version__ if triton else 'none'}", __version__]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels" / "tables"
    return folder / (re.sub(r"[^a-z0-9.+]+", "-", " ".join(names).lower()) + ".json")


@lru_cache
def user_table(gpu: str) -> Table:
    """What `lora_kernels.ops.tuning` measured on this machine's GPU of that name; a file that
    cannot be read is none."""
    none = Table(0, gpu, False, None, {})
    try:
        path = user_file(gpu)
        if not path.is_file():
            return none
    except (OSError, RuntimeError):  # nobody's home, or not to be read
        return none
    try:
        return _read_table(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"lora_kernels: {path} is no table ({type(error).__name__}: {error}) and is left aside", stacklevel=2)
        return none


def user_choices(gpu: str) -> tuple[Choice, ...]:
    """The choices among it."""
    return user_table(gpu).choices


def keep_choices(gpu: str, arch: int, found: Sequence[Choice], tiles: Sequence[dict[str, Any]] = ()) -> Path:
    """Adds choices and tiles to the user's file for a GPU, in the place of older ones of the same
    problems."""
    path = user_file(gpu)
    choices = tuple({(choice[:6], choice.flags): choice for choice in (*user_choices(gpu), *found)}.values())
    answers = {(row["kernel"], json.dumps(row["answers"], sort_keys=True)): row for row in (*user_table(gpu).tiles, *tiles)}
    stamp = {"torch": torch.__version__, "lora_kernels": __version__}
    made = table_for(arch)._replace(
        arch=arch, gpu=gpu, measured=True, stamp=stamp, choices=choices, tiles=tuple(answers.values())
    )
    _write_json(made, path)
    user_table.cache_clear()
    return path


def write_table(made: Table, folder: str | Path) -> Path:
    """Writes sm_<arch>.json, a line for each class and each choice."""
    path = Path(folder) / f"sm_{made.arch}.json"
    _write_json(made, path)
    table_for.cache_clear()
    return path


def _write_json(made: Table, path: Path) -> None:
    classes_of = {kind: _class_lines(classes) for kind, classes in made.efficiency.items()}
    rows = [json.dumps(choice._asdict()) for choice in made.choices]
    entries = [f'"{name}": {json.dumps(getattr(made, name))}' for name in ("arch", "gpu", "measured", "stamp")]
    entries += ['"efficiency": {\n  ' + ",\n  ".join(f'"{kind}": {text}' for kind, text in classes_of.items()) + "\n }"]
    for name, lines in (("choices", rows), ("tiles", list(map(json.dumps, made.tiles)))):
        if lines or name == "choices":
            entries += [f'"{name}": [' + ",".join(f"\n  {row}" for row in lines) + ("\n ]" if lines else "]")]
    path.parent.mkdir(parents=True, exist_ok=True)
    # another process may read it meanwhile
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text("{\n " + ",\n ".join(entries) + "\n}\n", encoding="utf-8")
    beside.replace(path)


def _class_lines(classes: dict[str, dict[str, float]]) -> str:
    return "{\n   " + ",\n   ".join(f'"{name}": {json.dumps(shares)}' for name, shares in classes.items()) + "\n  }"


def nearest_choice(
    choices: Sequence[Choice], direction: str, dtype: str, shape: tuple[Any, ...], flags: tuple[str, ...] = ()
) -> list[Choice]:
    """Those with the same flags that were measured within a factor of two of each of `shape`'s
    numbers (m, k, n, r), the nearest first, in log space."""
    wanted = _numbers(*shape)
    found = []
    for choice in choices:
        if (choice.direction, choice.dtype, choice.flags, len(choice.n)) == (direction, dtype, flags, len(shape[2])):
            pairs = zip(_numbers(choice.m, choice.k, choice.n, choice.r), wanted, strict=True)
            apart = [abs(math.log2(max(one, 1) / max(other, 1))) for one, other in pairs]
            if max(apart) <= 1:
                found.append((math.hypot(*apart), choice))
    return [choice for _, choice in sorted(found, key=lambda pair: pair[0])]


def _numbers(m: int, k: int, n: Sequence[int], r: Sequence[int]) -> tuple[int, ...]:
    return (m, k, *n, *r)
