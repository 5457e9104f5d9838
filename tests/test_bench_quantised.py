"""bench.quantised without its clocks: what is measured, what counts as missed."""

import argparse
import json
import sys

import pytest

from bench import quantised


def row(ours, kind="lora", what="step", tokens=512, **rivals):
    case = {"format": "nf4", "dtype": "bfloat16", "size": 4096, "kind": kind, "what": what, "M": tokens}
    return {**case, "level": "avx2", "seconds": {"ours": ours, **rivals}}


def test_every_case_of_the_targets():
    everything = argparse.Namespace(
        formats=quantised.FORMATS, dtypes=quantised.DTYPES, sizes=quantised.SIZES, kinds=quantised.KINDS,
        forward=quantised.FORWARD, step=quantised.STEP,
    )  # fmt: skip
    found = list(quantised.cases(everything))
    assert len(found) == 3 * 2 * 5 * (2 * 2 + 1)
    assert not [case for case in found if (case["format"], case["kind"]) == ("int8", "dora")]


def test_goals_that_are_missed_are_named():
    kept = row(0.44, peft=1.0, dense=0.40, linear=0.4)
    assert not list(quantised.missed([kept]))
    late = list(quantised.missed([row(0.47, peft=1.0, dense=0.40, linear=0.4)]))
    assert [text.split(":")[0] for text in late] == ["goal 0.455 of peft", "goal 1.150 of dense"]
    [slower] = quantised.missed([row(1.1, kind="dora", peft=1.0, dense=1.0)])
    assert slower.startswith("PEFT is faster: ")
    [eval_mode] = quantised.missed([row(0.2, what="forward", tokens=64, peft=1.0, **{"peft eval": 0.1})])
    assert eval_mode.startswith("PEFT is faster: ")
    [both] = quantised.missed([kept, row(0.49, kind="dora", peft=9.0, dense=1.0)])
    assert both.startswith("goal 1.1 of a QLoRA step") and both.endswith("1.11")


def test_what_is_printed_and_written(monkeypatch, capsys, tmp_path):
    rows = [row(0.1, peft=1.0, dense=0.1, linear=0.1)]
    monkeypatch.setattr(quantised, "rows_of", lambda level, argv: rows)
    monkeypatch.setattr(quantised, "memory", lambda *of: {"ours": 9 * 2**20, "peft": 2**27})
    monkeypatch.setitem(sys.modules, "bitsandbytes", argparse.Namespace(__version__="0"))
    out = tmp_path / "found.json"
    assert quantised.main(["--levels", "avx2", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("100000 µs  / peft 0.100  / dense 1.000  / linear 1.000")
    assert said[-1] == "goal 8 MiB: 9.0"
    assert json.loads(out.read_text())["rows"] == rows


def test_quick():
    """A level in a process of its own."""
    pytest.importorskip("bitsandbytes")
    [level] = __import__("lora_kernels")._cpu.levels()[-1:]
    found = list(quantised.rows_of(level, ["--quick", "--threads", "1", "--formats", "nf4"]))
    assert {each["format"] for each in found} == {"nf4", "int8"}
    for each in found:
        assert {"ours", "peft", "dense", "linear"} <= set(each["seconds"])
