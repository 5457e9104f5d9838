"""README's benchmark tables come from the JSON files in bench/results, not from anybody's hand."""

import json
import re
import subprocess
import sys

import pytest

from bench.report import BEGIN, END, README, between, main, named, tables

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
    return tables({"a.json": {"stamp": STAMP, "rows": rows}})


@pytest.fixture
def readme(tmp_path):
    """A README, written from a JSON file beside it that it names."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"stamp": STAMP, "rows": [row(0.5, 1.25), row(1.5, 1.25, m=64)]}), encoding="utf-8")
    path = tmp_path / "README.md"
    path.write_text(between(f"above\n{BEGIN}old\n{END}below\n", tables({"a.json": json.loads(file.read_text())})), "utf-8")
    return path


def test_readme_is_what_the_files_yield():
    names = named(README.read_text(encoding="utf-8"))
    assert names
    for name in names:
        assert (README.parent / name).with_suffix(".png").is_file(), "run python -m bench.report"
    assert main(["--check"]) == 0, "run python -m bench.report"


def test_cells_are_ours_and_pefts_and_a_row_that_is_missing_is_a_dash():
    got = text(row(0.5, 1.25), row(0.625, 20, kind="dora", m=64))
    assert "| ours / PEFT's | forward, M=4 | forward, M=64 |\n" in got
    assert "| bf16 LoRA 1024×2048 | 0.50 / 1.25 | – |\n" in got
    assert "| bf16 DoRA 1024×2048 | – | 0.62 / 20.00 |\n" in got
    assert "A processor, 2 cores with avx2, our level avx2;" in got
    assert "threads 2, OMP_NUM_THREADS not set, ONEDNN_MAX_CPU_ISA AVX2." in got


def test_a_row_that_loses_is_listed_whatever_its_rank():
    assert "none of 1 rows.\n" in text(row(1.25, 1.25))
    got = text(row(0.5, 1.25), row(1.5, 1.25, m=64, r=8), row(9, 1, threads=1))
    assert "1 of 2 rows, our time over its:\n\n* bf16 LoRA forward: 1024×2048 M=64 r=8 1.200\n" in got
    norm = {"op": "weight_norm", "kind": "dora", "dtype": "float32", "what": "norm", "K": 8, "N": 9, "r": 16, "threads": 2}
    assert "* fp32 DoRA norm: 8×9 r=16 1.500\n" in text({**norm, "ratios": {"ours / peft": 1.5}})


def many(kind, **seconds):
    """A batch of many adapters, nn.Linear's time 1."""
    usual = {"linear": 1.0, "ours": 1.5, "ours, add": 0.25, "peft": 6, "loop": 2, "gather": 5, "vllm": 4, "sglang": 8}
    seconds = usual | seconds
    ratios = {f"ours / {name}": seconds["ours"] / seconds[name] for name in seconds if name != "ours"}
    shape = {"M": 64, "K": 1024, "N": 1024, "ranks": [8, 64, 16], "threads": 2}
    return {"op": "multi_lora", "kind": kind, "dtype": "float32", **shape, "seconds": seconds, "ratios": ratios}


def test_batches_of_many_adapters_have_a_table_of_their_own():
    got = text(row(0.5, 1.25), many("distinct"), many("identical", loop=1.25))
    assert "| fp32 64, 1024×1024, r=8–64, distinct | 1.50 | 0.25 | 6.00 | 2.00 | 5.00 | 4.00 | 8.00 |\n" in got
    lost = "Where a rival is faster, our time over its: fp32 64, 1024×1024, r=8–64, identical, loop over segments 1.200."
    assert lost in got and "Where we lose to PEFT (2 threads, every rank): none of 1 rows.\n" in got
    assert "Many adapters" not in text(row(0.5, 1.25)) and "nowhere." in text(many("distinct"))


def test_pictures_of_both(tmp_path):
    pytest.importorskip("matplotlib")
    for name, rows in {"a": [row(0.5, 1.25), row(0.5, 1.25, kind="dora")], "b": [many("distinct")]}.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"stamp": STAMP, "rows": rows}), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}{END}", encoding="utf-8")
    assert main([str(tmp_path / "a.json"), str(tmp_path / "b.json")], readme) == 0
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file()
    assert named(readme.read_text(encoding="utf-8")) == ["a.json", "b.json"]


def test_check_fails_when_a_digit_is_changed(readme, capsys):
    assert main(["--check"], readme) == 0
    right = readme.read_text(encoding="utf-8")
    assert right.startswith("above\n") and right.endswith("below\n") and "old" not in right
    wrong = right.replace("1.50 / 1.25", "1.40 / 1.25")
    assert wrong != right
    readme.write_text(wrong, encoding="utf-8")
    assert main(["--check", str(readme.parent / "a.json")], readme) == 1
    assert "is not what a.json yield" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == wrong and not list(readme.parent.glob("*.png"))


def test_a_readme_without_markers_is_refused():
    for bad in ("", BEGIN, END + BEGIN, BEGIN + END + BEGIN):
        with pytest.raises(ValueError, match=re.escape("bench:begin")):
            between(bad, "text")


def test_the_report_needs_no_torch():
    code = "import sys, bench.report; assert not {'torch', 'peft', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=README.parent, check=True)
