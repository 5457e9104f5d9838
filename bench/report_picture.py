"""The picture of a JSON file of `python -m bench --out`: LoRA and DoRA, ours and PEFT's, over
nn.Linear alone."""

from pathlib import Path
from typing import Any

from bench.palette import BARE, OURS, PEFT, digest_of, draw_headline, load_pyplot, save_picture, three_digits, tidy_axes
from bench.report_tables import DTYPES, RANK, THREADS, distinct, measured, select_rows

STYLES = {
    ("lora", "peft"): ("s:", PEFT, "white", "LoRA, PEFT"), ("dora", "peft"): ("o-", PEFT, PEFT, "DoRA, PEFT"),
    ("lora", "ours"): ("s:", OURS, "white", "LoRA, ours"), ("dora", "ours"): ("o-", OURS, OURS, "DoRA, ours"),
}  # fmt: skip


def draw_picture(result: dict[str, Any], path: Path) -> None:
    """A line of panels for each dtype: a forward panel for each shape over M, and one of all steps
    with a backward.

    Raises:
        SystemExit: the result has no row to draw.
    """
    rows = select_rows(result["rows"], op="lora_linear", threads=THREADS, r=RANK)
    if not rows:
        raise SystemExit(f"{path.stem}.json has no row of lora_linear with {THREADS} threads and r={RANK} to draw")
    dtypes, shapes = distinct(rows, "dtype"), distinct(select_rows(rows, what="forward"), "K", "N")
    steps = distinct(select_rows(rows, what="forward + backward"), "K", "N", "M")
    widths = [1.0] * len(shapes) + ([max(1.0, 0.26 * len(steps))] if steps else [])
    size = (max(9.0, 1 + 3.2 * sum(widths)), 1.9 + 3.0 * len(dtypes))
    figure, panels = load_pyplot().subplots(
        len(dtypes), len(widths), figsize=size, squeeze=False, sharey="row", width_ratios=widths, layout="constrained"
    )
    for line, (dtype,) in zip(panels, dtypes, strict=True):
        here = select_rows(rows, dtype=dtype)
        for panel, (k, n) in zip(line, shapes, strict=False):
            ticks = sorted({row["M"] for row in select_rows(here, what="forward", K=k, N=n)})
            plot_curves(panel, select_rows(here, what="forward", K=k, N=n), {(k, n, m): str(m) for m in ticks})
            panel.set_title(f"{DTYPES[dtype]} forward, {k}×{n}", fontsize=10)
            panel.set_xlabel("M (tokens)")
        if steps:
            labels = {(k, n, m): f"{k}\n×{n}\nM={m}" for k, n, m in steps}
            plot_curves(line[-1], select_rows(here, what="forward + backward"), labels, joined=False)
            line[-1].set_title(f"{DTYPES[dtype]} forward + backward", fontsize=10)
        line[0].set_ylabel("time over nn.Linear's")
    note = measured(result["stamp"], f"r={RANK}, {THREADS} threads")
    if min(row["ratios"]["ours / linear"] for row in rows) < 0.1:
        note += ". Below 0.1: torch's own product is slow in this dtype and direction, nn.Linear's as well as PEFT's"
    draw_headline(figure, headline(rows), note)
    save_picture(figure, path, digest_of(result))


def headline(rows: list[dict[str, Any]]) -> str:
    """The result in one sentence."""
    worst = {
        (kind, name): max((row["ratios"][f"{name} / linear"] for row in select_rows(rows, kind=kind)), default=0.0)
        for kind in ("lora", "dora") for name in ("ours", "peft")
    }  # fmt: skip
    kind = "dora" if worst["dora", "ours"] else "lora"
    name = "DoRA" if kind == "dora" else "LoRA"
    ours, theirs = three_digits(worst[kind, "ours"]), three_digits(worst[kind, "peft"])
    return f"{name} costs at most {ours} times nn.Linear alone, with PEFT {theirs} times"


def plot_curves(
    panel: Any, rows: list[dict[str, Any]], places: dict[tuple[int, int, int], str], *, joined: bool = True
) -> None:
    """One panel's lines over the (K, N, M) of `places`, evenly spaced, and a line at 1."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.axhline(1, color=BARE, linewidth=1, label="nn.Linear alone")
    at = {place: index for index, place in enumerate(places)}
    for (kind, name), (style, colour, filled, label) in STYLES.items():
        found = sorted(
            (at[row["K"], row["N"], row["M"]], row["ratios"][f"{name} / linear"]) for row in select_rows(rows, kind=kind)
        )
        if found:
            style = style if joined else style[0]
            panel.plot(*zip(*found, strict=True), style, color=colour, markerfacecolor=filled, markersize=6, label=label)
    panel.set(yscale="log", xlim=(-0.5, len(places) - 0.5), xticks=list(at.values()))
    panel.set_xticklabels(places.values(), fontsize=9 if joined else 8)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    tidy_axes(panel)
