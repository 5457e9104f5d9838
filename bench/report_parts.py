"""What the parts of `bench.report` share: names, tables, pictures."""

from typing import Any

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def grid(heading: list[str], lines: list[list[str]]) -> str:
    """A markdown table, nothing without lines."""
    rule = ["---"] + ["---:"] * (len(heading) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in [heading, rule, *lines]) if lines else ""


def pyplot() -> Any:
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


def sign(figure: Any, stamp: dict[str, Any], more: str) -> None:
    """Writes where it was measured below a picture."""
    note = f"{stamp['processor']}, {stamp['level']}; torch {stamp['torch']}, peft {stamp['peft']}; {more}"
    figure.supxlabel(note, fontsize=9, color="0.4")
