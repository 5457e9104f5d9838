"""What `bench.report` says of the JSON files of `python -m bench.multi_lora --out`: a batch with an adapter for each row."""

from pathlib import Path
from typing import Any

from bench.report_parts import DTYPES, grid, pyplot, sign

RIVALS = {
    "peft": "PEFT", "loop": "loop over segments", "gather": "gathered bmm", "vllm": "vLLM's way", "sglang": "SGLang's way",
}  # fmt: skip
INTRO = """\
Many adapters in one batch, each contender's time over that of `nn.Linear` alone; Punica's workloads. *adapters alone*:
`multi_lora_add_` on a product that is there.
"""


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each batch; then every rival that was faster."""
    if not rows:
        return ""
    heading = ["rows, K×N, ranks, workload", "ours", "adapters alone", *RIVALS.values()]
    lines = [[title(row), *(f"{over_linear(row, name):.2f}" for name in ("ours", "ours, add", *RIVALS))] for row in rows]
    lost = [
        f"{title(row)}, {what} {row['ratios'][f'ours / {rival}']:.3f}"
        for row in rows for rival, what in RIVALS.items() if row["ratios"][f"ours / {rival}"] > 1
    ]  # fmt: skip
    told = f"Where a rival is faster, our time over its: {'; '.join(lost) or 'nowhere'}.\n"
    return "\n".join([INTRO, grid(heading, lines), told])


def title(row: dict[str, Any]) -> str:
    ranks = "–".join(str(r) for r in dict.fromkeys((min(row["ranks"]), max(row["ranks"]))))
    return f"{DTYPES[row['dtype']]} {row['M']}, {row['K']}×{row['N']}, r={ranks}, {row['kind']}"


def over_linear(row: dict[str, Any], name: str) -> float:
    return float(row["seconds"][name] / row["seconds"]["linear"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars: each contender's time over nn.Linear's, a group for each batch."""
    plt, rows, names = pyplot(), result["rows"], {"ours": "ours", **RIVALS}
    figure, panel = plt.subplots(figsize=(10, 1.5 + 0.62 * len(rows)), layout="constrained")
    colours = ("#00798c", "#d1495b", "#edae49", "#66a182", "#8d96a3", "#30638e")
    for i, ((name, label), colour) in enumerate(zip(names.items(), colours, strict=True)):
        places = [line + (i - (len(names) - 1) / 2) * 0.13 for line in range(len(rows))]
        panel.barh(places, [over_linear(row, name) for row in rows], 0.13, label=label, color=colour)
    panel.axvline(1, color="0.3", linewidth=1)
    panel.set(xscale="log", yticks=range(len(rows)), yticklabels=[title(row) for row in rows], xlabel="time / nn.Linear's")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.invert_yaxis()
    panel.margins(y=0.01)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    sign(figure, result["stamp"], f"{rows[0]['threads']} threads")
    figure.savefig(path, dpi=110)
    plt.close(figure)
