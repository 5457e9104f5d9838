"""The colours and the manners of every picture: ours teal, PEFT grey, all others muted; the
headline says the result."""

from pathlib import Path
from typing import Any

OURS, PEFT, BARE = "#00798c", "#8c8c8c", "0.35"
OTHERS = ("#c9a66b", "#9fb8a0", "#b9a3c2", "#c58f86")
DPI = 130


def load_pyplot() -> Any:
    """matplotlib's, for pictures in files.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f"the picture needs matplotlib (requirements-dev.txt; `make install` sets it up): {error}") from None

    matplotlib.use("Agg")  # a picture in a file needs no display
    from matplotlib import pyplot

    return pyplot


def draw_headline(figure: Any, title: str, note: str, columns: int = 5) -> None:
    """The result and one legend of all panels above the picture, where it was measured below it.

    Strips are kept free for them, and both texts are broken into lines that fit the width: no text
    is cut or lies on another.
    """
    from textwrap import wrap

    width, height = figure.get_size_inches()
    titles, notes = wrap(title, int(9 * width)), wrap(note, int(13 * width))
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, line)
    rows = -(-len(handles) // columns)
    above, below = 0.1 + 0.26 * len(titles) + 0.26 * rows, 0.1 + 0.19 * len(notes)
    figure.get_layout_engine().set(rect=(0, below / height, 1, 1 - (above + below) / height))
    figure.text(0.5, 1 - 0.08 / height, "\n".join(titles), fontsize=13, fontweight="bold", ha="center", va="top")
    top = 1 - (0.04 + 0.26 * len(titles)) / height
    figure.legend(handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, top), ncols=columns, frameon=False)
    figure.text(0.5, 0.08 / height, "\n".join(notes), fontsize=9, color="0.4", ha="center", va="bottom")


def tidy_axes(panel: Any, *, grid: str = "both") -> None:
    """No frame but the two axes, a faint grid behind the data."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis=grid, color="0.92")
    panel.set_axisbelow(True)


def save_picture(figure: Any, path: Path, digest: str = "") -> None:
    """Writes the PNG, the same bytes each time; `digest` says which data it was drawn from
    (`digest_of`)."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None, "Data": digest} if digest else {"Software": None})
    load_pyplot().close(figure)


def digest_of(result: Any) -> str:
    """What a picture of this result carries, so that a test sees a picture that is older than its
    data."""
    import hashlib
    import json

    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def three_digits(value: float) -> str:
    """Three significant digits: 117, 1.60, 0.00512."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
