"""The checked-in results: one row for each configuration and chip."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from lora_kernels.testing.gates.configuration import Configuration
from lora_kernels.testing.gates.measure import Row, broken, measure, per
from lora_kernels.testing.gates.occupancy import CHIPS

Key = tuple[str, str]
Reasons = dict[Key, list[str]]


@dataclass
class Table:
    """Rows by configuration and chip, each with its fingerprint and the compiler that made it."""

    rows: dict[Key, Row] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> "Table":
        """An empty one where there is no file."""
        text = json.loads(path.read_text()) if path.exists() else {}
        return Table({(name, arch): row for name, rows in text.items() for arch, row in rows.items()})

    def write(self, path: Path) -> None:
        """A row a line, so that a change is read in the difference."""
        names = sorted({name for name, _ in self.rows})
        parts = []
        for name in names:
            mine = [(arch, self.rows[name, arch]) for arch in CHIPS if (name, arch) in self.rows]
            lines = ",\n".join(f"  {json.dumps(arch)}: {json.dumps(row)}" for arch, row in mine)
            parts.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n")

    def markdown(self) -> str:
        """For people."""
        lines = [
            "| kernel | chip | registers | shared | blocks (warps) | limited by | main loop | for each | 16-byte loads |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for (name, arch), row in sorted(self.rows.items(), key=lambda item: (item[0][0], list(CHIPS).index(item[0][1]))):
            if "error" in row:
                lines.append(f"| {name} | {arch} | {row['error'][:80]} |||||||")
                continue
            spilled = f", {row['spills']} spilled, {row['stack']} B stack" if row["spills"] or row["stack"] else ""
            copies = f", {row['copies']} copy loops" if row["copies"] else ""
            loop = f"{row['instructions']}: {row['units']} {row['unit']}{copies}"
            warps = f"{row['blocks']} ({row['warps']} of {CHIPS[arch].warps})"
            cells = [name, arch, f"{row['registers']}{spilled}", row["shared"], warps, row["limit"], loop, f"{per(row):.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} | {row['wide']} of {row['loads']} |")
        return "\n".join(lines)


def current(configuration: Configuration, arch: str, table: Table) -> tuple[Row, bool]:
    """The row as it is now, and whether it was in the table with this fingerprint and needed no compiler.

    Raises:
        FileNotFoundError: a tool is not here; the message says which.
    """
    gone = configuration.kernel.missing(arch)
    if gone:
        raise FileNotFoundError(gone)
    known = table.rows.get((configuration.name, arch))
    fingerprint = configuration.fingerprint(arch)
    if known and known["fingerprint"] == fingerprint:
        return known, True
    return measure(configuration, arch) | {"made": configuration.kernel.version(), "fingerprint": fingerprint}, False


def differences(known: Row | None, found: Row) -> list[str]:
    """What the table has otherwise, in words. Nothing where it is of another version of the compiler."""
    if known is None:
        return ["not in the table"]
    if known["made"] != found["made"]:
        return []
    names = sorted((known.keys() | found.keys()) - {"fingerprint"})
    return [f"{n}: {known.get(n)} in the table, {found.get(n)} now" for n in names if known.get(n) != found.get(n)]


def recompute(configurations: Sequence[Configuration], jobs: int, cache: str) -> tuple[Table, Reasons, Reasons]:
    """All rows anew; the gates that are broken, and the rows for which a tool is not here, both in words.

    `cache` is Triton's; an old one would hide what this Triton makes.
    """
    table = Table()
    failed: Reasons = {}
    skipped: Reasons = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), _use_cache, (cache,)) as pool:
        asked = {(c.name, arch): (c, pool.submit(current, c, arch, Table())) for c in configurations for arch in c.chips}
        for (name, arch), (configuration, answer) in asked.items():
            try:
                row, _ = answer.result()
            except FileNotFoundError as error:
                skipped[name, arch] = [str(error)]
                continue
            table.rows[name, arch] = row
            reasons = broken(row, configuration.budget(arch), arch)
            if reasons:
                failed[name, arch] = reasons
    return table, failed, skipped


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder
