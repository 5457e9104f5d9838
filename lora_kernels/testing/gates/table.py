"""The checked-in results: one row for each configuration and chip."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from lora_kernels.testing.gates.configuration import BY, Configuration
from lora_kernels.testing.gates.measure import Row, broken, instructions_per_unit, measure
from lora_kernels.testing.gates.occupancy import CHIPS
from lora_kernels.testing.gates.versions import Other

Key = tuple[str, str]
Reasons = dict[Key, list[str]]


@dataclass
class Table:
    """Rows by configuration and chip, each with its fingerprint and the compiler that made it."""

    rows: dict[Key, Row] = field(default_factory=dict)
    others: dict[Other, Row] = field(default_factory=dict)
    """By the version of Triton, too: what other Tritons than the installed one made, as far as it
    is not zero."""

    @staticmethod
    def read(path: Path) -> "Table":
        """An empty one where there is no file."""
        text = json.loads(path.read_text()) if path.exists() else {}
        table = Table()
        for name, rows in text.items():
            for place, row in rows.items():
                arch, _, version = place.partition(BY)
                if version:
                    table.others[name, arch, version] = row
                else:
                    table.rows[name, arch] = row
        return table

    def write(self, path: Path) -> None:
        """A row a line, so that a change is read in the difference."""
        names = sorted({name for name, _ in self.rows})
        entries = []
        for name in names:
            mine = [(arch, self.rows[name, arch]) for arch in CHIPS if (name, arch) in self.rows]
            others = [(version, arch, self.others[name, arch, version]) for one, arch, version in self.others if one == name]
            mine += [(f"{arch}{BY}{version}", row) for version, arch, row in sorted(others, key=lambda other: other[:2])]
            lines = ",\n".join(f"  {json.dumps(place)}: {json.dumps(row)}" for place, row in mine)
            entries.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
        path.write_text("{\n" + ",\n".join(entries) + "\n}\n")

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
            cells = [
                name,
                arch,
                f"{row['registers']}{spilled}",
                row["shared"],
                warps,
                row["limit"],
                loop,
                f"{instructions_per_unit(row):.2f}",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} | {row['wide']} of {row['loads']} |")
        return "\n".join(lines + self._of_others())

    def _of_others(self) -> list[str]:
        groups: dict[tuple[str, str], list[Row]] = {}
        for (_, arch, version), row in self.others.items():
            groups.setdefault((version, arch), []).append(row)
        head = ("Triton", "chip", "ptxas", "kernels", "with hazards", "with spills", "do not compile")
        lines = ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for (version, arch), rows in sorted(groups.items()):
            by = ", ".join(sorted({row["ptxas"] for row in rows if "ptxas" in row}))
            gates = (["hazards"], ["spills", "stack"], ["error"])
            counts = [sum(any(row.get(name) for name in names) for row in rows) for names in gates]
            lines.append(f"| {' | '.join(map(str, [version, arch, by, len(rows), *counts]))} |")
        return lines if groups else []


def current(configuration: Configuration, arch: str, table: Table) -> tuple[Row, bool]:
    """The row as it is now, and whether it was in the table with this fingerprint and needed no
    compiler.

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
    """What the table has otherwise, in words. Nothing where it is of another version of the
    compiler."""
    if known is None:
        return ["not in the table"]
    if known["made"] != found["made"]:
        return []
    names = sorted((known.keys() | found.keys()) - {"fingerprint"})
    return [f"{n}: {known.get(n)} in the table, {found.get(n)} now" for n in names if known.get(n) != found.get(n)]


def recompute(configurations: Sequence[Configuration], jobs: int, cache: str) -> tuple[Table, Reasons, Reasons]:
    """All rows anew; the gates that are broken, and the rows for which a tool is not here, both in
    words.

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
