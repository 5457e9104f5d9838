"""`python -m bench.report FILE...` draws each JSON file of `python -m bench --out` and writes the
tables of docs/benchmarks.md.

    FILE       in the order in which the page shows them; those that it names already if none is
               given
    --check    writes nothing; exit status 1 if the page is not what the files yield
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from bench import report_many, report_picture
from bench.palette import three_digits
from bench.report_tables import DTYPES, RANK, THREADS, distinct, markdown_table, select_rows

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"
NAMES = DTYPES | {
    "lora": "LoRA", "dora": "DoRA",
    "ours": "ours", "peft": "PEFT", "linear": "nn.Linear alone",
}  # fmt: skip
SLOW = "Below 0.1: torch's own product is slow in this dtype and direction, so `nn.Linear` and PEFT are slow alike.\n"
RIVALS = {"peft": "PEFT", "torch": "the best plain PyTorch", "compile": "torch.compile of that"}
INTRO = f"""\
`python -m bench.report` writes this part from the JSON files. A cell is ours / PEFT's.
Both are divided by the time of `nn.Linear` alone; below 1 is faster than the layer without an adapter.
The machine is shared, so absolute times mean nothing.
Shapes are K×N (in × out features), M tokens, r = {RANK}, {THREADS} threads.
In the forward (no gradients) our DoRA keeps its norm between calls; with the backward it computes the norm each time.
PEFT computes the norm in every forward. A dash: not measured.
"""


def main(argv: list[str] | None = None, page: Path = PAGE) -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.report")
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="JSON; those that the page names if none is given")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page is not what the files yield")
    options = parser.parse_args(argv)
    old, root = page.read_text(encoding="utf-8"), page.parents[1]
    files = options.files or [root / name for name in result_paths(old)]
    if not files:
        parser.error(f"no FILE given, and {page} names none")
    results = {Path(os.path.relpath(file, root)).as_posix(): json.loads(file.read_text("utf-8")) for file in files}
    for name, result in results.items():
        if "stages" in result:
            parser.error(f"{name} is of a GPU, by python -m bench.gpu, which drew its picture; these tables are of CPUs")
    new = between(old, benchmark_tables(results))
    if options.check:
        if new != old:
            print(f"{page} is not what {', '.join(results)} yield: run python -m bench.report", file=sys.stderr)
        return int(new != old)
    (page.parent / "images").mkdir(exist_ok=True)
    for file, result in zip(files, results.values(), strict=True):
        kind = report_many if select_rows(result["rows"], op="multi_lora") else report_picture
        kind.draw_picture(result, page.parent / "images" / f"{file.stem}.png")
    page.write_text(new, encoding="utf-8")
    return 0


def between(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """`page` with `text` in place of what stands between the markers."""
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page needs one line {begin.strip()} and after it one line {end.strip()}")
    before, rest = page.split(begin)
    return before + begin + text + end + rest.split(end)[1]


def result_paths(page: str) -> list[str]:
    """The JSON files that the page's tables came from."""
    return re.findall(r"^Data: `([^`\s]+\.json)`", page[page.find(BEGIN) : page.find(END)], re.MULTILINE)


def benchmark_tables(results: dict[str, dict[str, Any]]) -> str:
    """The page's text between the markers, from the content of each JSON file by its path."""
    parts = [INTRO]
    for path, result in results.items():
        rows = select_rows(result["rows"], threads=THREADS)
        adapters, many = [row for row in rows if row["op"] != "multi_lora"], select_rows(rows, op="multi_lora")
        shown = select_rows(adapters, r=RANK)
        parts.append(circumstances(path, result))
        parts += filter(
            None,
            [
                layer_table(shown),
                norm_table(shown),
                memory_lines(result["rows"]),
                losing_rows(adapters),
                report_many.multi_lora_table(many),
            ],
        )
    return "\n".join(parts)


def circumstances(path: str, result: dict[str, Any]) -> str:
    """The picture, the file it came from, the machine and the versions."""
    stamp, name = result["stamp"], Path(path).stem
    threads = " and ".join(str(count) for (count,) in distinct(result["rows"], "threads"))
    variables = [f"{name} {stamp[name] or 'not set'}" for name in ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA")]
    return (
        f"### {name}\n\n![{name}: time over nn.Linear's, ours and the rivals'](images/{name}.png)\n\n"
        f"Data: `{path}`.\n"
        f"Machine: {stamp['processor']}, {stamp['cores']} cores with {', '.join(stamp['instructions'])},"
        f" our level {stamp['level']}.\n"
        f"Versions: torch {stamp['torch']}, peft {stamp['peft']}, Python {stamp['python']}, commit {stamp['commit']}.\n"
        f"Settings: threads {threads}, {', '.join(variables)}.\n"
    )


def layer_table(rows: list[dict[str, Any]]) -> str:
    """Ours and PEFT's over nn.Linear's: a line for each dtype, kind and shape, a column for each
    direction and M."""
    rows = select_rows(rows, op="lora_linear")
    columns = sorted(distinct(rows, "what", "M"))
    lines = [
        [f"{NAMES[dtype]} {NAMES[kind]} {k}×{n}"]
        + [ratio_cell(select_rows(rows, dtype=dtype, kind=kind, K=k, N=n, what=what, M=tokens)) for what, tokens in columns]
        for (dtype,) in distinct(rows, "dtype")
        for (kind,) in distinct(rows, "kind")
        for k, n in distinct(select_rows(rows, dtype=dtype, kind=kind), "K", "N")
    ]
    table = markdown_table(["ours / PEFT's"] + [f"{what}, M={tokens}" for what, tokens in columns], lines)
    return table + ("\n" + SLOW if any(row["ratios"]["ours / linear"] < 0.1 for row in rows) else "")


def ratio_cell(found: list[dict[str, Any]]) -> str:
    """Both ratios of the one row in `found`."""
    return " / ".join(three_digits(found[0]["ratios"][name]) for name in ("ours / linear", "peft / linear")) if found else "–"


def norm_table(rows: list[dict[str, Any]]) -> str:
    """Our norm's time over PEFT's."""
    rows = select_rows(rows, op="weight_norm")
    shapes = distinct(rows, "K", "N")
    lines = [[NAMES[dtype]] + [against_peft(select_rows(rows, dtype=dtype, K=k, N=n)) for k, n in shapes]
             for (dtype,) in distinct(rows, "dtype")]  # fmt: skip
    return markdown_table(["DoRA's norm, our time over PEFT's"] + [f"{k}×{n}" for k, n in shapes], lines)


def against_peft(found: list[dict[str, Any]]) -> str:
    """Ours over PEFT's in the one row in `found`."""
    return three_digits(found[0]["ratios"]["ours / peft"]) if found else "–"


def memory_lines(rows: list[dict[str, Any]]) -> str:
    """A line for each memory row."""
    text = ""
    for row in (row for row in rows if "bytes" in row):
        sizes = ", ".join(f"{NAMES[name]} {size / 2**20:.1f} MiB" for name, size in row["bytes"].items())
        what = f"{row['what'].capitalize()}, {NAMES[row['dtype']]} {NAMES[row['kind']]}"
        text += f"{what} {shape_label(row)}, norm computed: {sizes}.\n"
    return text


def losing_rows(rows: list[dict[str, Any]]) -> str:
    """Every row in which ours took longer than a rival that computes the same."""
    text = ""
    for rival, name in RIVALS.items():
        key = f"ours / {rival}"
        met = [row for row in rows if key in row.get("ratios", ())]
        lost = [row for row in met if row["ratios"][key] > 1]
        if not met:
            continue
        text += f"Where we lose to {name} ({THREADS} threads, every rank): {len(lost) or 'none'} of {len(met)} rows"
        text += ", our time over its:\n\n" if lost else ".\n"
        lines = []
        for op, dtype, kind, what in distinct(lost, "op", "dtype", "kind", "what"):
            found = select_rows(lost, op=op, dtype=dtype, kind=kind, what=what)
            places = [f"{shape_label(row)}: {row['ratios'][key]:.3f}" for row in found]
            lines.append([f"{NAMES[dtype]} {NAMES[kind]} {what}", "; ".join(places)])
        text += markdown_table(["", "shape: our time over its"], lines, "---") + "\n" if lost else ""
    return text


def shape_label(row: dict[str, Any]) -> str:
    """A row's shape; the norm has no M."""
    return " ".join([f"{row['K']}×{row['N']}"] + [f"{key}={row[key]}" for key in ("M", "r") if key in row])


if __name__ == "__main__":
    sys.exit(main())
