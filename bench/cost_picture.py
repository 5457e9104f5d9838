"""`python -m bench.cost_picture` draws README's picture from bench/results: what LoRA and DoRA
cost, ours beside PEFT's.

    FILE       the JSON of `python -m bench --out`; bench/results/xeon-amx.json if none is given
    OUT        the PNG; docs/images/cost.png if none is given
"""

import json
import sys
from pathlib import Path
from typing import Any

from bench.palette import BARE, OURS, PEFT, digest_of, draw_headline, load_pyplot, save_picture, three_digits, tidy_axes
from bench.report_tables import DTYPES, RANK, THREADS, measured, select_rows

ROOT = Path(__file__).parents[1]
FILE, OUT = ROOT / "bench" / "results" / "xeon-amx.json", ROOT / "docs" / "images" / "cost.png"
SHAPE = {"K": 4096, "N": 4096, "r": RANK, "threads": THREADS}
PANELS = {
    "a training step: forward + backward, 512 tokens": {"what": "forward + backward", "M": 512},
    "one token: forward": {"what": "forward", "M": 1},
}


def main(argv: list[str]) -> int:
    """Draws; returns the exit status."""
    file, out = (Path(given) for given in (argv + [str(FILE), str(OUT)][len(argv) :]))
    draw_picture(json.loads(file.read_text("utf-8")), out)
    return 0


def cost_ratios(result: dict[str, Any], **where: Any) -> list[tuple[str, float, float]]:
    """(label, ours, PEFT's) over nn.Linear alone, for LoRA and DoRA in each dtype.

    Raises:
        SystemExit: the result has no such row.
    """
    found = []
    for dtype in ("float32", "bfloat16"):
        for kind, name in (("lora", "LoRA"), ("dora", "DoRA")):
            rows = select_rows(result["rows"], op="lora_linear", kind=kind, dtype=dtype, **SHAPE, **where)
            if len(rows) != 1:
                raise SystemExit(f"the picture needs one row of {kind} {dtype} {SHAPE | where}, found {len(rows)}")
            both = rows[0]["ratios"]
            found.append((f"{name}\n{DTYPES[dtype]}", both["ours / linear"], both["peft / linear"]))
    return found


def draw_picture(result: dict[str, Any], path: Path) -> None:
    """Bars from zero on linear axes, a panel for training and one for decoding."""
    figure, panels = load_pyplot().subplots(1, len(PANELS), figsize=(10, 4.3), layout="constrained")
    for panel, (title, where) in zip(panels, PANELS.items(), strict=True):
        found = cost_ratios(result, **where)
        for offset, index, colour, label in ((-0.2, 1, OURS, "lora_kernels"), (0.2, 2, PEFT, "PEFT")):
            heights = [row[index] for row in found]
            bars = panel.bar([i + offset for i in range(len(found))], heights, 0.38, color=colour, label=label)
            panel.bar_label(bars, list(map(three_digits, heights)), fontsize=9, padding=2)
        panel.axhline(1, color=BARE, linewidth=1, linestyle="--", label="nn.Linear without an adapter", zorder=0)
        panel.set_xticks(range(len(found)), [row[0] for row in found])
        panel.set_title(title, fontsize=10)
        panel.set_ylabel("time over nn.Linear's")
        panel.margins(y=0.1)
        tidy_axes(panel, grid="y")
    _, ours, theirs = cost_ratios(result, **next(iter(PANELS.values())))[-1]
    said = f"A DoRA step in bf16 costs {three_digits(ours)} times the bare layer, with PEFT {three_digits(theirs)} times"
    draw_headline(figure, said, "One layer of 4096×4096 on a CPU: " + measured(result["stamp"], f"r={RANK}, {THREADS} threads"))
    save_picture(figure, path, digest_of(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
