"""`python -m lora_kernels.testing.gates [FOLDER]`: compiles all of FOLDER/configurations.py and
writes FOLDER/table.json.

With --show nothing is compiled, and the table is printed as Markdown. Ends with 1 where a gate is
broken; rows whose tools are not here stay as they were, and so do those of other Tritons with
--installed. These come by pip into .venv/tritons.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from lora_kernels.testing.gates import versions
from lora_kernels.testing.gates.configuration import BY
from lora_kernels.testing.gates.measure import unsound
from lora_kernels.testing.gates.table import Table, differences, recompute


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_kernels.testing.gates", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("tests/gates"))
    parser.add_argument("--show", action="store_true", help="print the table")
    parser.add_argument("--only", default="", metavar="TEXT", help="configurations whose name contains this")
    parser.add_argument("--installed", action="store_true", help="ask the installed Triton alone")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    path = options.folder / "table.json"
    old = Table.read(path)
    if options.show:
        print(Table({key: row for key, row in old.rows.items() if options.only in key[0]}).markdown())
        return 0
    configurations = importlib.import_module(".".join(options.folder.parts) + ".configurations").GATES
    chosen = [c for c in configurations if options.only in c.name]
    with tempfile.TemporaryDirectory() as cache:
        new, failed, skipped = recompute(chosen, options.jobs, cache)
        if not options.installed:
            new.others = versions.recompute(chosen, options.jobs, cache)
    for key, row in new.rows.items():
        for text in differences(old.rows.get(key), row):
            print(f"{key[0]}, {key[1]}: {text}")
    shipped = {(c.name, arch) for c in configurations for arch in c.chips}
    others = {
        (c.name, arch, by) for by in versions.other_versions() for c, arch in versions.configurations_for(configurations, by)
    }
    shipped_rows = {key: row for key, row in (old.rows | new.rows).items() if key in shipped}
    Table(shipped_rows, {key: row for key, row in (old.others | new.others).items() if key in others}).write(path)
    by_name = {c.name: c for c in chosen}
    for (name, arch, version), row in new.others.items():
        if wrong := unsound(row, by_name[name].budget(arch, version).spilled):
            failed[name, f"{arch}{BY}{version}"] = wrong
    for what, reasons in (("not compiled", skipped), ("BROKEN", failed)):
        for key, texts in reasons.items():
            print(*(f"{what}: {key[0]}, {key[1]}: {text}" for text in texts), sep="\n")
    print(f"{len(new.rows) + len(new.others)} rows in {path}, {len(failed)} broken, {len(skipped)} not compiled")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
