"""`python -m bench.report FILE...` draws each JSON file of `python -m bench --out` beside it and writes README's tables.

    FILE       in the order in which README shows them; those that README names already if none is given
    --check    writes nothing; exit status 1 if README is not what the files yield
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from bench import report_many
from bench.report_parts import DTYPES, grid, pyplot, sign

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"
THREADS, RANK = 2, 16  # what tables and pictures show
NAMES = DTYPES | {
    "lora": "LoRA", "dora": "DoRA",
    "ours": "ours", "peft": "PEFT", "linear": "nn.Linear alone",
}  # fmt: skip
RIVALS = {"peft": "PEFT", "torch": "the best plain PyTorch", "compile": "torch.compile of that"}
INTRO = f"""\
Written by `python -m bench.report` from the JSON files. A cell is ours / PEFT's, each divided by the time of `nn.Linear`
alone (below 1: faster than the layer without an adapter); the machine is shared, so absolute times mean nothing. Shapes
are K×N (in × out features), M tokens, r = {RANK}, {THREADS} threads. In the forward (no gradients) our DoRA keeps its norm
between calls; with the backward the norm is computed each time. PEFT computes it in every forward. –: not measured.
"""


def main(argv: list[str] | None = None, readme: Path = README) -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.report")
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="JSON; those that README names if none is given")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if README is not what the files yield")
    options = parser.parse_args(argv)
    old = readme.read_text(encoding="utf-8")
    files = options.files or [readme.parent / name for name in named(old)]
    if not files:
        parser.error(f"no FILE given, and {readme} names none")
    # under the paths by which README links them
    results = {Path(os.path.relpath(file, readme.parent)).as_posix(): json.loads(file.read_text("utf-8")) for file in files}
    for name, result in results.items():
        if "stages" in result:
            parser.error(f"{name} is of a GPU, by python -m bench.gpu, which drew its picture; README's tables are of CPUs")
    new = between(old, tables(results))
    if options.check:
        if new != old:
            print(f"{readme} is not what {', '.join(results)} yield: run python -m bench.report", file=sys.stderr)
        return int(new != old)
    for file, result in zip(files, results.values(), strict=True):
        kind = report_many if pick(result["rows"], op="multi_lora") else sys.modules[__name__]
        kind.draw(result, file.with_suffix(".png"))
    readme.write_text(new, encoding="utf-8")
    return 0


def between(readme: str, text: str) -> str:
    """`readme` with `text` in place of what stands between the markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README needs one line {BEGIN.strip()} and after it one line {END.strip()}")
    before, rest = readme.split(BEGIN)
    return before + BEGIN + text + END + rest.split(END)[1]


def named(readme: str) -> list[str]:
    """The JSON files that README's tables came from."""
    return re.findall(r"\(([^()\s]+\.json)\)", readme[readme.find(BEGIN) : readme.find(END)])


def tables(results: dict[str, dict[str, Any]]) -> str:
    """README's text between the markers, from the content of each JSON file by its path."""
    parts = [INTRO]
    for path, result in results.items():
        rows = pick(result["rows"], threads=THREADS)
        adapters, many = [row for row in rows if row["op"] != "multi_lora"], pick(rows, op="multi_lora")
        shown = pick(adapters, r=RANK)
        parts.append(circumstances(path, result))
        parts += filter(None, [layers(shown), norms(shown), memory(result["rows"]), losses(adapters), report_many.table(many)])
    return "\n".join(parts)


def circumstances(path: str, result: dict[str, Any]) -> str:
    """Links to the file and its picture, the machine and the versions."""
    stamp = result["stamp"]
    threads = " and ".join(str(count) for (count,) in distinct(result["rows"], "threads"))
    variables = [f"{name} {stamp[name] or 'not set'}" for name in ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA")]
    return (
        f"**[{Path(path).stem}]({path})** ([picture]({Path(path).with_suffix('.png').as_posix()})):\n"
        f"{stamp['processor']}, {stamp['cores']} cores with {', '.join(stamp['instructions'])}, our level {stamp['level']};\n"
        f"torch {stamp['torch']}, peft {stamp['peft']}, Python {stamp['python']}, commit {stamp['commit']};\n"
        f"threads {threads}, {', '.join(variables)}.\n"
    )


def layers(rows: list[dict[str, Any]]) -> str:
    """Ours and PEFT's over nn.Linear's: a line for each dtype, kind and shape, a column for each direction and M."""
    rows = pick(rows, op="lora_linear")
    columns = sorted(distinct(rows, "what", "M"))
    lines = [
        [f"{NAMES[dtype]} {NAMES[kind]} {k}×{n}"]
        + [cell(pick(rows, dtype=dtype, kind=kind, K=k, N=n, what=what, M=tokens)) for what, tokens in columns]
        for (dtype,) in distinct(rows, "dtype")
        for (kind,) in distinct(rows, "kind")
        for k, n in distinct(pick(rows, dtype=dtype, kind=kind), "K", "N")
    ]
    return grid(["ours / PEFT's"] + [f"{what}, M={tokens}" for what, tokens in columns], lines)


def cell(found: list[dict[str, Any]]) -> str:
    """Both ratios of the one row in `found`."""
    return " / ".join(f"{found[0]['ratios'][name]:.2f}" for name in ("ours / linear", "peft / linear")) if found else "–"


def norms(rows: list[dict[str, Any]]) -> str:
    """The norm's time over PEFT's."""
    rows = pick(rows, op="weight_norm")
    shapes = distinct(rows, "K", "N")
    lines = [[NAMES[dtype]] + [against_peft(pick(rows, dtype=dtype, K=k, N=n)) for k, n in shapes]
             for (dtype,) in distinct(rows, "dtype")]  # fmt: skip
    return grid(["DoRA's norm, our time over PEFT's"] + [f"{k}×{n}" for k, n in shapes], lines)


def against_peft(found: list[dict[str, Any]]) -> str:
    """Ours over PEFT's in the one row in `found`; three decimals, for the norm's ratios are small."""
    return f"{found[0]['ratios']['ours / peft']:.3f}" if found else "–"


def memory(rows: list[dict[str, Any]]) -> str:
    """A line for each memory row."""
    text = ""
    for row in (row for row in rows if "bytes" in row):
        sizes = ", ".join(f"{NAMES[name]} {size / 2**20:.1f} MiB" for name, size in row["bytes"].items())
        what = f"{row['what'].capitalize()}, {NAMES[row['dtype']]} {NAMES[row['kind']]}"
        text += f"{what} {place(row)}, norm computed: {sizes}.\n"
    return text


def losses(rows: list[dict[str, Any]]) -> str:
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
        for op, dtype, kind, what in distinct(lost, "op", "dtype", "kind", "what"):
            found = pick(lost, op=op, dtype=dtype, kind=kind, what=what)
            places = [f"{place(row)} {row['ratios'][key]:.3f}" for row in found]
            text += f"* {NAMES[dtype]} {NAMES[kind]} {what}: {'; '.join(places)}\n"
        text += "\n" if lost else ""
    return text


def place(row: dict[str, Any]) -> str:
    """A row's shape; the norm has no M."""
    return " ".join([f"{row['K']}×{row['N']}"] + [f"{key}={row[key]}" for key in ("M", "r") if key in row])


def pick(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def distinct(rows: list[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    """The values of these keys, each combination once, in the order of the rows; rows without them are left out."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows if set(keys) <= set(row)))


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each dtype and direction (rows) and shape (columns): ours and PEFT's over nn.Linear alone, over M."""
    plt = pyplot()
    rows = pick(result["rows"], op="lora_linear", threads=THREADS, r=RANK)
    across, down = distinct(rows, "K", "N"), [(d, w) for (d,) in distinct(rows, "dtype") for (w,) in distinct(rows, "what")]
    if not rows:
        raise SystemExit(f"{path.with_suffix('.json')} has no row of lora_linear with {THREADS} threads and r={RANK} to draw")
    size = (max(8.5, 1 + 3.4 * len(across)), 1.2 + 2.5 * len(down))
    figure, panels = plt.subplots(len(down), len(across), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for line, (dtype, what) in zip(panels, down, strict=True):
        for panel, (k, n) in zip(line, across, strict=True):
            curves(panel, pick(rows, dtype=dtype, what=what, K=k, N=n))
            panel.set_title(f"{NAMES[dtype]} {what}, {k}×{n}", fontsize=10)
        line[0].set_ylabel("time / nn.Linear's")
    for panel in panels[-1]:
        panel.set_xlabel("M (tokens)")
    handles = {label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, frameon=False)
    sign(figure, result["stamp"], f"r={RANK}, {THREADS} threads")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curves(panel: Any, rows: list[dict[str, Any]]) -> None:
    """One panel's lines: a colour for each kind, ours solid, PEFT's dashed, and a line at 1."""
    from matplotlib.ticker import LogLocator

    panel.axhline(1, color="0.5", linewidth=1, label="nn.Linear alone")
    for kind, colour in (("lora", "#00798c"), ("dora", "#d1495b")):
        found = sorted(pick(rows, kind=kind), key=lambda row: row["M"])
        for name, style, filled in (("ours", "o-", colour), ("peft", "o--", "white")):
            ratios = [row["ratios"][f"{name} / linear"] for row in found]
            panel.plot([row["M"] for row in found], ratios, style, color=colour, markerfacecolor=filled, markersize=5,
                       label=f"{NAMES[kind]}, {NAMES[name]}")  # fmt: skip
    panel.set(xscale="log", yscale="log", xlim=(0.7, 740))
    panel.set_xticks([1, 4, 16, 64, 512], ["1", "4", "16", "64", "512"], minor=False)
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_yticks([], minor=True)
    panel.grid(color="0.9")


if __name__ == "__main__":
    sys.exit(main())
