"""README's table of whole models comes from a JSON file of `bench.model`."""

import json

import pytest

from bench import model
from bench.model_table import BEGIN, END, PAGE, main, model_table

STAMP = {"processor": "A processor", "level": "avx2", "torch": "2", "peft": "0"}


def row(ours, base, what="decode", batch=1, **more):
    """Times of which PEFT's is 1."""
    ratios = {"ours / peft": ours, "ours / base": ours / base, "peft / base": 1 / base}
    shape = {"model": "576 × 30", "kind": "lora", "dtype": "float32", "r": 16, "threads": 2, "batch": batch}
    return {"op": "model", "what": what, **shape, "ratios": ratios, **more}


def test_the_table_is_what_the_file_yields(tmp_path, capsys):
    file, page = tmp_path / "a.json", tmp_path / "README.md"
    page.write_text(f"above\n{BEGIN}old\n{END}below\n", encoding="utf-8")
    rows = [row(0.5, 0.4), row(0.75, 0.5, "training step", 8), row(0.25, 0.2, kind="dora", dtype="bfloat16")]
    file.write_text(json.dumps({"stamp": STAMP, "rows": rows}), encoding="utf-8")
    assert main([str(file)], page) == 0
    text = page.read_text(encoding="utf-8")
    assert "| Llama, hidden × layers | training step, batch 8 | decode, batch 1 |\n" in text
    assert "| LoRA fp32, 576 × 30 | 0.750 (1.50) | 0.500 (1.25) |\n| DoRA bf16, 576 × 30 | – | 0.250 (1.25) |\n" in text
    assert "A processor, avx2; torch 2, peft 0; r=16, 2 threads: `a.json`.\n" in text and "old" not in text
    assert main(["--check"], page) == 0
    page.write_text(text.replace("0.750", "0.650"), encoding="utf-8")
    assert main(["--check"], page) == 1 and "is not what a.json yields" in capsys.readouterr().err


def test_readme_has_the_table_of_its_file():
    if BEGIN in PAGE.read_text(encoding="utf-8"):
        assert main(["--check"]) == 0, "run python -m bench.model_table"


@pytest.mark.parametrize("what", model.PASSES)
def test_a_row_has_every_ratio(what):
    made = model.measure("quick", "dora", "float32", what, 1, 0.0)
    rivals = {"peft", "base"} | ({"merged"} if what == "decode" else set())
    assert {f"ours / {rival}" for rival in rivals} | {"peft / base"} == set(made["ratios"])
    assert all(value > 0 for value in made["ratios"].values())
    text = model_table("a.json", {"stamp": STAMP, "rows": [made]})
    assert "| DoRA fp32, quick | " in text and "–" not in text
    if what == "training step":
        assert 0 < made["saved_bytes"]["ours"] < made["saved_bytes"]["peft"]


def test_models_that_compute_something_else_are_refused():
    models = model.make_models("quick", "lora", "float32", merged=False)
    calls = model.decode_calls(models, 1)
    model.check_equal(calls, "float32")
    next(p for name, p in models["ours"].named_parameters() if "lora_B" in name).data.mul_(1.5)
    with pytest.raises(SystemExit, match="ours is .* from PEFT's result"):
        model.check_equal(calls, "float32")
