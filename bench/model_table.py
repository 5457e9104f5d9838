"""`python -m bench.model_table [FILE]` writes README's first table from the JSON of `python -m
bench.model --out`.

    FILE       that which README names already if none is given
    --check    writes nothing; exit status 1 if the table is not what the file yields
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from bench.palette import three_digits
from bench.report import between
from bench.report_tables import DTYPES, distinct, markdown_table, measured, select_rows

PAGE = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- model:begin -->\n", "<!-- model:end -->\n"
KINDS = {"lora": "LoRA", "dora": "DoRA"}


def main(argv: list[str] | None = None, page: Path = PAGE) -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.model_table")
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="that which README names if none is given")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the table is not what the file yields")
    options = parser.parse_args(argv)
    old = page.read_text(encoding="utf-8")
    file = options.file or named_file(old, page.parent)
    if file is None:
        parser.error(f"no FILE given, and {page} names none")
    path = Path(os.path.relpath(file, page.parent)).as_posix()
    new = between(old, model_table(path, json.loads(file.read_text("utf-8"))), BEGIN, END)
    if options.check:
        if new != old:
            print(f"{page} is not what {path} yields: run python -m bench.model_table", file=sys.stderr)
        return int(new != old)
    page.write_text(new, encoding="utf-8")
    return 0


def named_file(page: str, root: Path) -> Path | None:
    """The JSON file that the page's table came from."""
    found = re.search(r"`([^`\s]+\.json)`", page[page.find(BEGIN) : page.find(END)])
    return root / found[1] if found else None


def model_table(path: str, result: dict[str, Any]) -> str:
    """A line for each model, kind and dtype, a column for each pass and batch."""
    rows = select_rows(result["rows"], op="model")
    columns = sorted(distinct(rows, "what", "batch"), key=lambda column: (column[0] != "training step", column[1]))
    lines = [
        [f"{KINDS[kind]} {DTYPES[dtype]}, {model}"]
        + [cell(select_rows(rows, model=model, kind=kind, dtype=dtype, what=what, batch=batch)) for what, batch in columns]
        for model, kind, dtype in distinct(rows, "model", "kind", "dtype")
    ]
    heading = ["Llama, hidden × layers"] + [f"{what}, batch {batch}" for what, batch in columns]
    said = "Whole models: our time over PEFT's, and in brackets over that of the model without an adapter.\n"
    (threads,), (rank,) = distinct(rows, "threads")[0], distinct(rows, "r")[0]
    return f"{said}\n{markdown_table(heading, lines)}\n{measured(result['stamp'], f'r={rank}, {threads} threads')}: `{path}`.\n"


def cell(found: list[dict[str, Any]]) -> str:
    """Ours over PEFT's and over the base model's in the one row in `found`."""
    ratios = [three_digits(found[0]["ratios"][f"ours / {rival}"]) for rival in ("peft", "base")] if found else []
    return f"{ratios[0]} ({ratios[1]})" if ratios else "–"


if __name__ == "__main__":
    sys.exit(main())
