"""The demo's results: summary.json, summary.png, and a table on the terminal."""

import json
from pathlib import Path
from typing import Any

from plans import largest_difference
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.palette import OURS, PEFT, draw_headline, load_pyplot, save_picture, three_digits, tidy_axes

MIB = 2**20


def write_summary(result: dict[str, Any], folder: Path) -> None:
    """Writes summary.json and summary.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_picture(result, folder / "summary.png")


def draw_picture(result: dict[str, Any], path: Path) -> None:
    """How far the two losses of each comparison lie apart above, the median step times and the peak
    memory below."""
    comparisons = result["comparisons"]
    columns = len(comparisons)
    figure = load_pyplot().figure(figsize=(max(9.0, 3.6 * columns), 7.6), layout="constrained")
    grid = figure.add_gridspec(2, 2 * columns)
    for index, comparison in enumerate(comparisons):
        _plot_loss_difference(figure.add_subplot(grid[0, 2 * index : 2 * index + 2]), comparison)
    times = [(c["stock"]["median_step_seconds"] * 1e3, c["fused"]["median_step_seconds"] * 1e3) for c in comparisons]
    memory = [(c["stock"]["peak_bytes"] / MIB, c["fused"]["peak_bytes"] / MIB) for c in comparisons]
    names = [c["name"].replace("-", "\n") for c in comparisons]
    _plot_bars(figure.add_subplot(grid[1, :columns]), names, times, "median step, ms")
    _plot_bars(figure.add_subplot(grid[1, columns:]), names, memory, "peak of tensors in a step, MiB")
    draw_headline(figure, headline(result), f"SmolLM2-135M-Instruct on HumanEval, r=8: {subtitle(result)}", columns=5)
    save_picture(figure, path)


def headline(result: dict[str, Any]) -> str:
    """The result in one sentence, of the comparison with the largest gain."""
    best = min(result["comparisons"], key=lambda c: c["time_ratio"])
    ratio, less = best["time_ratio"], 1 - best["fused"]["peak_bytes"] / best["stock"]["peak_bytes"]
    speed = f"{three_digits(1 / ratio)} times as fast" if ratio < 1 else f"{three_digits(ratio)} times as long"
    losses = "losses equal but for rounding" if result["passed"] else "a check FAILED"
    return f"{best['name']}: a step {speed} as stock PEFT's, {100 * less:.0f} % less memory, {losses}"


def subtitle(result: dict[str, Any]) -> str:
    """The circumstances, in a few words."""
    threads, plural = result["machine"]["threads"], "" if result["machine"]["threads"] == 1 else "s"
    used = ", ".join(backends(result))
    return f"{threads} thread{plural}, backend {used}" + (" (--quick)" if result["quick"] else "")


def backends(result: dict[str, Any]) -> list[str]:
    """The backends that ran lora_linear, over all comparisons."""
    return sorted({name for c in result["comparisons"] for name in c["backends"].get("lora_linear_forward", [])})


def _plot_loss_difference(axes: Any, comparison: dict[str, Any]) -> None:
    """|fused − stock| of the training loss at each step, under what rounding allows; equal bits
    stand at the bottom."""
    from matplotlib.ticker import MaxNLocator

    allowed = comparison["rounding_bound"]
    stock, fused = comparison["stock"]["losses"], comparison["fused"]["losses"]
    floor = allowed * 1e-4
    apart = {step: abs(one - other) for step, (one, other) in enumerate(zip(stock, fused, strict=True), 1)}
    equal = [step for step, far in apart.items() if not far]
    axes.axhline(allowed, color="0.35", linewidth=1, linestyle="--", label="allowed: rounding")
    line = [max(far, floor) if far else float("nan") for far in apart.values()]
    axes.plot(apart.keys(), line, "o-", color=OURS, markersize=4, label="loss, fused − stock")
    axes.plot(equal, [floor] * len(equal), "o", color=OURS, markerfacecolor="white", markersize=5, label="every bit equal")
    axes.set(yscale="log", ylim=(floor / 2, allowed * 8), xlim=(0.5, len(apart) + 0.5))
    axes.set(xlabel="step", ylabel="difference of the loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{comparison['name']}: at most {comparison['largest_loss_difference']:.1e}", fontsize=10)
    tidy_axes(axes)


def _plot_bars(axes: Any, names: list[str], pairs: list[tuple[float, float]], title: str) -> None:
    positions = range(len(names))
    for offset, index, colour, label in ((-0.2, 0, PEFT, "stock PEFT"), (0.2, 1, OURS, "fused")):
        heights = [pair[index] for pair in pairs]
        bars = axes.bar([p + offset for p in positions], heights, width=0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(list(positions), names)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.15)
    tidy_axes(axes, grid="y")


def print_summary(result: dict[str, Any], folder: Path, console: Console) -> None:
    """Prints the completions, the table and every check that failed."""
    last = result["comparisons"][-1]
    for source, text in last["completions"].items():
        console.print(f"\n[bold]{last['name']}, {source}[/bold], continues a held-out problem:")
        console.print(escape(text), highlight=False)
    console.print(result_table(result))
    for line in table_notes(result):
        console.print(line, highlight=False, soft_wrap=True)
    for comparison in result["comparisons"]:
        for check, held in comparison["checks"].items():
            if not held:
                console.print(f"[red]FAILED[/red] {comparison['name']}: {check}")
    if result["passed"]:
        checks = sum(len(c["checks"]) for c in result["comparisons"])
        console.print(f"[green]All {checks} checks hold[/green] ({result['seconds']:.0f} s).", highlight=False)
    console.print(f"Results: {folder}/summary.json, {folder}/summary.png", highlight=False, soft_wrap=True)


def result_table(result: dict[str, Any]) -> Table:
    """One row per comparison, stock PEFT before fused in each cell."""
    made = Table(title=f"stock PEFT / fused: {subtitle(result)}")
    for heading in ("", "held-out loss before", "after", "largest difference", "allowed"):
        made.add_column(heading)
    for heading in ("step, ms", "fused/stock", "peak, MiB", "checks"):
        made.add_column(heading, justify="right")
    for c in result["comparisons"]:
        stock, fused, checks = c["stock"], c["fused"], c["checks"].values()
        made.add_row(
            c["name"],
            f"{stock['held_out_before']:.4f} / {fused['held_out_before']:.4f}",
            f"{stock['held_out_after']:.4f} / {fused['held_out_after']:.4f}",
            f"{c['largest_loss_difference']:.1e}",
            f"{c['rounding_bound']:.1e}",
            f"{stock['median_step_seconds'] * 1e3:.0f} / {fused['median_step_seconds'] * 1e3:.0f}",
            three_digits(c["time_ratio"]),
            f"{stock['peak_bytes'] / MIB:.0f} / {fused['peak_bytes'] / MIB:.0f}",
            f"{sum(checks)} of {len(checks)}",
        )
    return made


def table_notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know to read the table right."""
    lines = [
        "Steps of the two models alternate in one process; times are medians. Peak: of the tensors made during a step,",
        "weights not counted. Largest difference: of the two training-loss curves, with lora_dropout=0 (with dropout,",
        "the two would draw different masks). Allowed: rounding, 2·loss·√(2·L)·(u + √K·2⁻²⁴), see examples/demo/plans.py.",
    ]
    by_name = {c["name"]: c for c in result["comparisons"]}
    for method in ("lora", "dora"):
        wide, narrow = by_name.get(f"{method}-float32"), by_name.get(f"{method}-bfloat16")
        if wide and narrow and wide["plan"] == narrow["plan"]:
            own = [largest_difference(narrow[run]["losses"], wide["stock"]["losses"]) for run in ("stock", "fused")]
            lines.append(
                f"bfloat16 itself moves the {method} curve away from stock float32 by {own[0]:.1e} (stock), "
                f"{own[1]:.1e} (fused)."
            )
    if "reference" in backends(result):
        lines.append("The fused layers ran on the reference, which is not built for speed: do not judge the times.")
    return lines
