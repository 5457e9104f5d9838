"""The pictures of the demos: drawn from results made up here, with a headline that says what these
show."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
DEMO = Path(__file__).parents[1] / "examples" / "demo"


@pytest.fixture
def said(monkeypatch):
    """The headline and the axes of each picture that is saved."""
    from bench import palette

    kept = []
    head, save = palette.draw_headline, palette.save_picture

    def keep_title(figure, title, *more, **named):
        kept.append(title)
        head(figure, title, *more, **named)

    def keep_axes(figure, path):
        kept.append(figure.axes)
        save(figure, path)

    monkeypatch.setattr(palette, "draw_headline", keep_title)
    monkeypatch.setattr(palette, "save_picture", keep_axes)
    monkeypatch.syspath_prepend(str(DEMO))
    return kept


def comparison(name, ratio, losses):
    stock = {"losses": [3.5, 3.25, 3.0], "median_step_seconds": 2.0, "peak_bytes": 100 << 20}
    fused = {"losses": losses, "median_step_seconds": 2.0 * ratio, "peak_bytes": 75 << 20}
    return {
        "name": name, "stock": stock, "fused": fused, "time_ratio": ratio,
        "rounding_bound": 1e-4, "largest_loss_difference": 1e-5, "backends": {"lora_linear_forward": ["cpu"]},
    }  # fmt: skip


def test_finetune(said, tmp_path):
    summary = runpy.run_path(str(DEMO / "summary.py"))
    comparisons = [comparison("lora-float32", 0.8, [3.5, 3.25001, 3.0]), comparison("dora-float32", 0.5, [3.5, 3.25, 3.0])]
    result = {"comparisons": comparisons, "machine": {"threads": 2}, "quick": True, "passed": True}
    summary["draw_picture"](result, tmp_path / "summary.png")
    title, (lora, dora, *bars) = said
    assert title == "dora-float32: a step 2.00 times as fast as stock PEFT's, 25 % less memory, losses equal but for rounding"
    assert (tmp_path / "summary.png").stat().st_size > 10_000 and len(bars) == 2
    allowed, apart, equal = lora.get_lines()
    assert list(allowed.get_ydata()) == [1e-4, 1e-4] and apart.get_ydata()[1] == pytest.approx(1e-5, rel=1e-3)
    assert list(equal.get_xdata()) == [1, 3] and list(dora.get_lines()[2].get_xdata()) == [1, 2, 3]
    assert all(tick == int(tick) for tick in lora.get_xticks())
    slower = {**result, "comparisons": [comparison("lora-bfloat16", 1.25, [3.5, 3.25, 3.0])], "passed": False}
    title = "lora-bfloat16: a step 1.25 times as long as stock PEFT's, 25 % less memory, a check FAILED"
    assert summary["headline"](slower) == title


def test_serve(said, tmp_path):
    serve = runpy.run_path(str(DEMO / "serve.py"))
    speeds = {"base only": 100.0, "ours": 95.0, "PEFT": 40.0, "merged": 20.0}
    rows = [{"workload": "distinct", "adapters": 8, "contender": name, "tokens_per_second": s} for name, s in speeds.items()]
    result = {"rows": rows, "requests": 8, "dtype": "float32", "threads": 2, "torch": "2"}
    serve["draw_picture"](result, tmp_path / "serve.png")
    assert said[0] == "8 adapters in one batch keep 95% of the base's speed, with PEFT 40%"
    assert (tmp_path / "serve.png").stat().st_size > 10_000
