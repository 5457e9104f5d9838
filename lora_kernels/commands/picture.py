"""The picture of `bench`."""

from pathlib import Path
from textwrap import fill
from typing import Any

COLOURS = {"base": "#d0d0d0", "PEFT": "#8c8c8c", "ours": "#00857c"}


def draw_picture(times: Any, headline: str, title: str, file: Path) -> None:
    """Bars of each contender's time, the layer without an adapter being 1; written to `file` in the
    format of its ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.8 / len(COLOURS)
    highest = max(t[name] / t["base"] for t in times.values() for name in COLOURS)
    for i, (name, colour) in enumerate(COLOURS.items()):
        places = [group + (i - 1) * width for group in range(len(times))]
        heights = [t[name] / t["base"] for t in times.values()]
        axes.bar(places, heights, width * 0.92, color=colour, label={"base": "without an adapter"}.get(name, name))
        for place, height in zip(places, heights, strict=True):
            axes.annotate(f"{height:.3g}", (place, height), ha="center", va="bottom", fontsize=8, color="#404040")
    axes.set_xticks(range(len(times)), [" ".join(key) for key in times])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.25 * highest)
    axes.set_ylabel("time, without an adapter = 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(COLOURS), loc="upper left", fontsize=9)
    figure.suptitle(headline, x=0.01, ha="left", fontweight="bold")
    axes.set_title(fill(title, 100), loc="left", fontsize=8, color="#606060")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
