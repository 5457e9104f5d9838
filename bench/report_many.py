"""What `bench.report` says of the JSON files of `python -m bench.multi_lora --out`: a batch with an
adapter for each row."""

from pathlib import Path
from typing import Any

from bench.palette import BARE, OTHERS, OURS, PEFT, digest_of, draw_headline, load_pyplot, save_picture, three_digits, tidy_axes
from bench.report_tables import DTYPES, markdown_table, measured

RIVALS = {
    "peft": "PEFT", "loop": "loop over segments", "gather": "gathered bmm", "vllm": "vLLM's way", "sglang": "SGLang's way",
}  # fmt: skip
INTRO = """\
Many adapters in one batch, each contender's time over that of `nn.Linear` alone; Punica's workloads. *adapters alone*:
`multi_lora_add_` on a product that is there.
"""


def multi_lora_table(rows: list[dict[str, Any]]) -> str:
    """A line for each batch; then every rival that was faster."""
    if not rows:
        return ""
    heading = ["rows, K×N, ranks, workload", "ours", "adapters alone", *RIVALS.values()]
    lines = [
        [batch_label(row), *(three_digits(over_linear(row, name)) for name in ("ours", "ours, add", *RIVALS))] for row in rows
    ]
    lost = [
        f"{batch_label(row)}, {what} {row['ratios'][f'ours / {rival}']:.3f}"
        for row in rows for rival, what in RIVALS.items() if row["ratios"][f"ours / {rival}"] > 1
    ]  # fmt: skip
    told = f"Where a rival is faster, our time over its: {'; '.join(lost) or 'nowhere'}.\n"
    return "\n".join([INTRO, markdown_table(heading, lines), told])


def batch_label(row: dict[str, Any]) -> str:
    ranks = "–".join(str(r) for r in dict.fromkeys((min(row["ranks"]), max(row["ranks"]))))
    return f"{DTYPES[row['dtype']]} {row['M']}, {row['K']}×{row['N']}, r={ranks}, {row['kind']}"


def over_linear(row: dict[str, Any], name: str) -> float:
    return float(row["seconds"][name] / row["seconds"]["linear"])


def draw_picture(result: dict[str, Any], path: Path) -> None:
    """Dots: each contender's time over nn.Linear's, a line for each batch, the largest gain over
    PEFT above."""
    from matplotlib.ticker import FixedLocator, NullLocator

    plt = load_pyplot()
    rows = sorted(result["rows"], key=lambda row: row["ratios"]["ours / peft"])
    figure, panel = plt.subplots(figsize=(10, 2.0 + 0.36 * len(rows)), layout="constrained")
    places = range(len(rows))
    for (name, label), colour in zip([item for item in RIVALS.items() if item[0] != "peft"], OTHERS, strict=True):
        panel.scatter([over_linear(row, name) for row in rows], places, s=26, label=label, color=colour)
    theirs, ours = ([over_linear(row, name) for row in rows] for name in ("peft", "ours"))
    panel.hlines(places, ours, theirs, color="0.85", linewidth=3, zorder=0)
    panel.scatter(theirs, places, s=80, label="PEFT", color=PEFT)
    panel.scatter(ours, places, s=80, label="ours", color=OURS)
    panel.axvline(1, color=BARE, linewidth=1, label="nn.Linear alone")
    panel.set(xscale="log", yticks=places, yticklabels=[batch_in_words(row) for row in rows])
    panel.set_xlabel("time over that of nn.Linear without adapters")
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20) if panel.get_xlim()[0] < t < panel.get_xlim()[1]]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:g}")
    panel.invert_yaxis()
    tidy_axes(panel)
    said = f"Mixed adapters in one batch: {three_digits(min(ours))} to {three_digits(max(ours))} times nn.Linear alone"
    said += f", PEFT {three_digits(min(theirs))} to {three_digits(max(theirs))}"
    draw_headline(figure, said, measured(result["stamp"], f"{rows[0]['threads']} threads"), columns=4)
    save_picture(figure, path, digest_of(result))


def batch_in_words(row: dict[str, Any]) -> str:
    """A batch in words, for the picture."""
    ranks = "–".join(str(r) for r in dict.fromkeys((min(row["ranks"]), max(row["ranks"]))))
    tokens = "1 token" if row["M"] == 1 else f"{row['M']} tokens"
    return f"{row['kind']}, {tokens}, {row['K']}×{row['N']}, r={ranks}, {DTYPES[row['dtype']]}"
