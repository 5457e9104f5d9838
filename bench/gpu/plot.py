"""The picture beside the JSON file: the time of ours and of each rival over the frozen linear's,
and our rate."""

from pathlib import Path
from typing import Any

from bench.palette import BARE, OTHERS, OURS, PEFT, digest_of, draw_headline, load_pyplot, save_picture, three_digits, tidy_axes

RANK = 16
STYLES = {
    "compile": ("^:", OTHERS[0], "torch.compile"), "addmm": ("v-.", OTHERS[1], "addmm"),
    "peft": ("s--", PEFT, "PEFT"), "ours": ("o-", OURS, "ours"),
}  # fmt: skip


def draw_picture(result: dict[str, Any], path: Path) -> None:
    """A panel for each kind and direction (rows) and shape (columns), without dropout but for a
    timed run. A dry run has no times, which its panels say."""
    rows = [row for row in result["rows"] if row["op"] == "lora_linear" and (result.get("minutes") or not row["dropout"])]
    rows = [row for row in rows if row["r"] == RANK] or rows
    first = {tuple(row[key] for key in ("kind", "what", "K", "N", "M")): row for row in reversed(rows)}
    rows = list(first.values())[::-1]  # one curve goes through each M once
    down = list(dict.fromkeys((row["kind"], row["what"]) for row in rows))
    across = list(dict.fromkeys((row["K"], row["N"]) for row in rows))
    if not rows:
        raise ValueError("there is no row of lora_linear to draw")
    size = (max(8.0, 1 + 3.4 * len(across)), 1.5 + 2.6 * len(down))
    figure, panels = load_pyplot().subplots(
        len(down), len(across), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for line, (kind, what) in zip(panels, down, strict=True):
        for panel, (k, n) in zip(line, across, strict=True):
            here = [row for row in rows if (row["kind"], row["what"], row["K"], row["N"]) == (kind, what, k, n)]
            plot_curves(panel, sorted(here, key=lambda row: row["M"]))
            panel.set_title(f"{kind} {what}, {k}×{n}", fontsize=10)
        line[0].set_ylabel("time / nn.Linear's")
    for panel in panels[-1]:
        panel.set_xlabel("M (tokens)")
    stamp = result["stamp"]
    dry = "DRY RUN, no times; " if result["dry_run"] else ""
    versions = ", ".join(f"{name} {stamp[name]}" for name in ("torch", "peft", "triton"))
    note = f"{dry}{stamp['gpu']}; {versions}; bfloat16, r={rows[0]['r']}"
    if dropped := sorted({row["M"] for row in rows if row["dropout"]}):
        note += f", dropout at M={', '.join(map(str, dropped))}"
    draw_headline(figure, headline(rows), note)
    save_picture(figure, path, digest_of(result))


def headline(rows: list[dict[str, Any]]) -> str:
    """The costliest case in one sentence: DoRA before LoRA, a step before a forward, many tokens
    before few."""
    timed = [row for row in rows if "ours / linear" in row["ratios"]]
    if not timed:
        return "Dry run: every stage was tried, nothing was timed"
    row = max(timed, key=lambda row: (row["kind"] == "dora", "backward" in row["what"], row["M"], row["K"] * row["N"]))
    said = (
        f"{row['kind']} {row['what']}, {row['M']} tokens, {row['K']}×{row['N']}: {three_digits(row['ratios']['ours / linear'])}"
    )
    said += " times the frozen layer"
    return said + (f", PEFT {three_digits(row['ratios']['peft / linear'])}" if "peft / linear" in row["ratios"] else "")


def plot_curves(panel: Any, rows: list[dict[str, Any]]) -> None:
    """One panel's lines, and one at 1."""
    from matplotlib.ticker import LogLocator

    panel.axhline(1, color=BARE, linewidth=1, label="nn.Linear alone")
    panel.set(xscale="log", yscale="log")
    if not any(row["ratios"] for row in rows):
        panel.set(xticks=[], yticks=[])
        panel.text(0.5, 0.7, "not timed", color="0.5", ha="center", transform=panel.transAxes)
        return
    for name, (style, colour, label) in STYLES.items():
        points = [(row["M"], row["ratios"][f"{name} / linear"]) for row in rows if f"{name} / linear" in row["ratios"]]
        if points:
            panel.plot(*zip(*points, strict=True), style, color=colour, markersize=5, label=label)
    tokens = sorted({row["M"] for row in rows})
    panel.set_xticks(tokens, list(map(str, tokens)), minor=False)
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_yticks([], minor=True)
    tidy_axes(panel)
