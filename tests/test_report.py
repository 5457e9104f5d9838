"""The benchmark tables and pictures of docs/ come from the JSON files in bench/results, not from
anybody's hand."""

import json
import re
import subprocess
import sys

import pytest

from bench import cost_picture
from bench.palette import digest_of, three_digits
from bench.report import BEGIN, END, PAGE, benchmark_tables, between, main, result_paths

STAMP = {
    "processor": "A processor", "instructions": ["avx2"], "cores": 2, "level": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": None, "torch": "2", "peft": "0", "python": "3", "commit": "abc",
}  # fmt: skip


def row(ours, peft, kind="lora", m=4, r=16, threads=2):
    """A forward of `ours` and `peft` times nn.Linear's time."""
    ratios = {"ours / linear": ours, "ours / peft": ours / peft, "peft / linear": peft}
    shape = {"M": m, "K": 1024, "N": 2048, "r": r, "threads": threads}
    return {"op": "lora_linear", "kind": kind, "dtype": "bfloat16", "what": "forward", **shape, "ratios": ratios}


def text(*rows):
    return benchmark_tables({"a.json": {"stamp": STAMP, "rows": rows}})


def picture_data(path):
    """The digest of the data that a picture was drawn from."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.text["Data"]


@pytest.fixture
def page(tmp_path):
    """A page, written from a JSON file of its repository that it names."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"stamp": STAMP, "rows": [row(0.5, 1.25), row(1.5, 1.25, m=64)]}), encoding="utf-8")
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text(
        between(f"above\n{BEGIN}old\n{END}below\n", benchmark_tables({"a.json": json.loads(file.read_text())})), "utf-8"
    )
    return path


def test_the_page_is_what_the_files_yield():
    names = result_paths(PAGE.read_text(encoding="utf-8"))
    assert len(names) == len(list((PAGE.parents[1] / "bench" / "results").glob("xeon*.json")))
    assert main(["--check"]) == 0, "run python -m bench.report"


def test_the_pictures_are_of_the_files():
    pytest.importorskip("PIL")
    for name in result_paths(PAGE.read_text(encoding="utf-8")):
        file = PAGE.parents[1] / name
        drawn = picture_data(PAGE.parent / "images" / f"{file.stem}.png")
        assert drawn == digest_of(json.loads(file.read_text("utf-8"))), "run python -m bench.report"
    drawn = picture_data(cost_picture.OUT)
    assert drawn == digest_of(json.loads(cost_picture.FILE.read_text("utf-8"))), "run python -m bench.cost_picture"


def test_readmes_picture_shows_the_ratios_and_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for i, (what, m) in enumerate([("forward + backward", 512), ("forward", 1)]):
        for j, (kind, dtype) in enumerate([(k, d) for k in ("lora", "dora") for d in ("float32", "bfloat16")]):
            each = row(1 + i + j / 8, 8, kind=kind, m=m)
            rows.append({**each, "what": what, "dtype": dtype, "K": 4096, "N": 4096})
    result = {"stamp": STAMP, "rows": rows}
    assert cost_picture.cost_ratios(result, what="forward", M=1)[-1] == ("DoRA\nbf16", 2.375, 8)
    for name in ("a.png", "b.png"):
        cost_picture.draw_picture(result, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert picture_data(tmp_path / "a.png") == digest_of(result) != digest_of({"stamp": STAMP, "rows": rows[1:]})
    with pytest.raises(SystemExit, match="one row of dora bfloat16 .* found 0"):
        cost_picture.cost_ratios({"stamp": STAMP, "rows": rows[:-1]}, what="forward", M=1)


def test_three_digits():
    shown = {117.2: "117", 99.96: "100", 84.42: "84.4", 1.6: "1.60", 0.6249: "0.625", 0.00512: "0.00512"}
    assert {value: three_digits(value) for value in shown} == shown


def test_cells_are_ours_and_pefts_and_a_row_that_is_missing_is_a_dash():
    got = text(row(0.5, 1.25), row(0.625, 20, kind="dora", m=64))
    assert "| ours / PEFT's | forward, M=4 | forward, M=64 |\n" in got
    assert "| bf16 LoRA 1024×2048 | 0.500 / 1.25 | – |\n" in got
    assert "| bf16 DoRA 1024×2048 | – | 0.625 / 20.0 |\n" in got
    assert "Machine: A processor, 2 cores with avx2, our level avx2.\n" in got
    assert "Settings: threads 2, OMP_NUM_THREADS not set, ONEDNN_MAX_CPU_ISA AVX2." in got


def test_a_row_that_loses_is_listed_whatever_its_rank():
    assert "none of 1 rows.\n" in text(row(1.25, 1.25))
    got = text(row(0.5, 1.25), row(1.5, 1.25, m=64, r=8), row(9, 1, threads=1))
    table = "|  | shape: our time over its |\n| --- | --- |\n| bf16 LoRA forward | 1024×2048 M=64 r=8: 1.200 |\n"
    assert f"1 of 2 rows, our time over its:\n\n{table}" in got
    norm = {"op": "weight_norm", "kind": "dora", "dtype": "float32", "what": "norm", "K": 8, "N": 9, "r": 16, "threads": 2}
    assert "| fp32 DoRA norm | 8×9 r=16: 1.500 |\n" in text({**norm, "ratios": {"ours / peft": 1.5}})


def many(kind, **seconds):
    """A batch of many adapters, nn.Linear's time 1."""
    usual = {"linear": 1.0, "ours": 1.5, "ours, add": 0.25, "peft": 6, "loop": 2, "gather": 5, "vllm": 4, "sglang": 8}
    seconds = usual | seconds
    ratios = {f"ours / {name}": seconds["ours"] / seconds[name] for name in seconds if name != "ours"}
    shape = {"M": 64, "K": 1024, "N": 1024, "ranks": [8, 64, 16], "threads": 2}
    return {"op": "multi_lora", "kind": kind, "dtype": "float32", **shape, "seconds": seconds, "ratios": ratios}


def test_batches_of_many_adapters_have_a_table_of_their_own():
    got = text(row(0.5, 1.25), many("distinct"), many("identical", loop=1.25))
    assert "| fp32 64, 1024×1024, r=8–64, distinct | 1.50 | 0.250 | 6.00 | 2.00 | 5.00 | 4.00 | 8.00 |\n" in got
    lost = "Where a rival is faster, our time over its: fp32 64, 1024×1024, r=8–64, identical, loop over segments 1.200."
    assert lost in got and "Where we lose to PEFT (2 threads, every rank): none of 1 rows.\n" in got
    assert "Many adapters" not in text(row(0.5, 1.25)) and "nowhere." in text(many("distinct"))


def test_pictures_of_both(tmp_path):
    pytest.importorskip("matplotlib")
    for name, rows in {"a": [row(0.5, 1.25), row(0.5, 1.25, kind="dora")], "b": [many("distinct")]}.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"stamp": STAMP, "rows": rows}), encoding="utf-8")
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"{BEGIN}{END}", encoding="utf-8")
    assert main([str(tmp_path / "a.json"), str(tmp_path / "b.json")], page) == 0
    assert sorted(path.name for path in (page.parent / "images").iterdir()) == ["a.png", "b.png"]
    assert result_paths(page.read_text(encoding="utf-8")) == ["a.json", "b.json"]


def test_check_fails_when_a_digit_is_changed(page, capsys):
    assert main(["--check"], page) == 0
    right = page.read_text(encoding="utf-8")
    assert right.startswith("above\n") and right.endswith("below\n") and "old" not in right
    wrong = right.replace("1.50 / 1.25", "1.40 / 1.25")
    assert wrong != right
    page.write_text(wrong, encoding="utf-8")
    assert main(["--check", str(page.parents[1] / "a.json")], page) == 1
    assert "is not what a.json yield" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == wrong and not list(page.parents[1].rglob("*.png"))


def test_a_page_without_markers_is_refused():
    for bad in ("", BEGIN, END + BEGIN, BEGIN + END + BEGIN):
        with pytest.raises(ValueError, match=re.escape("bench:begin")):
            between(bad, "text")


def test_the_report_needs_no_torch():
    code = "import sys, bench.report; assert not {'torch', 'peft', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PAGE.parents[1], check=True)
