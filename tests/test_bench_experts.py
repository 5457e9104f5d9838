"""bench.expert_lora_linear without its clocks: that all contenders compute one thing, and what
counts as missed."""

import argparse
import json
import sys

import pytest
import torch

from bench import expert_lora_linear as experts


def row(ours, shape="qwen", **rivals):
    return {"shape": shape, "dtype": "bfloat16", "tokens": 64, "seconds": {"ours": ours, **rivals}}


@pytest.mark.parametrize("codes", [False, True], ids=["", "codes"])
def test_contenders_compute_one_thing(codes, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    found, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda y, dy: found.append(y.detach()) or backward(y, dy))
    case = {"shape": "quick", "dtype": "float32", "tokens": 4, "codes": codes}
    calls = experts.contenders(case)
    assert {"ours", "op", "split", "loop", "peft eager", "peft grouped_mm", "peft batched_mm", "frozen eager"} <= calls.keys()
    assert ("op mxfp4" in calls) is codes
    for call in calls.values():
        call()
    results = dict(zip(calls, found, strict=True))
    for name, y in results.items():
        if not name.startswith("frozen"):
            torch.testing.assert_close(y, results["loop"])
        elif name != "frozen eager":
            torch.testing.assert_close(y, results["frozen eager"])
    assert not torch.allclose(results["frozen eager"], results["loop"], atol=1e-4)


def test_goals_that_are_missed_are_named():
    assert not list(experts.missed([row(0.1, **{"peft eager": 1.0, "frozen eager": 0.1})]))
    late = list(experts.missed([row(0.14, **{"peft eager": 2.0, "peft grouped_mm": 1.0, "frozen eager": 0.11})]))
    assert [text.split(":")[0].split(" qwen")[0] for text in late] == ["goal 0.125 of PEFT", "goal 1.187 without an adapter"]
    assert not list(experts.missed([row(0.39, "mixtral", **{"peft eager": 1.0, "frozen eager": 1.0})]))


def test_what_is_printed_and_written(monkeypatch, capsys, tmp_path):
    taken = {"ours": 0.2, "peft eager": 1.0, "frozen eager": 0.2}
    monkeypatch.setattr(experts, "measure", lambda case, *_: taken)
    peaks = {"outputs": 2**20, "ours": 2**28, "peft eager": 2**30, "peft grouped_mm": 2**31}
    monkeypatch.setattr(experts, "memory", lambda case: peaks)
    monkeypatch.setitem(sys.modules, "transformers", argparse.Namespace(__version__="0"))
    out = tmp_path / "found.json"
    options = {"--shapes": "qwen", "--dtypes": "bfloat16", "--tokens": "64", "--threads": "1", "--out": str(out)}
    assert experts.main([text for option in options.items() for text in option]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "qwen     bfloat16 tokens=64: 200.0 ms  / peft eager 0.200  / frozen eager 1.000"
    assert said[-2].startswith("goal 0.125 of PEFT") and said[-1] == "goal 0.05 of PEFT's memory beyond the outputs: 0.2493"
    assert json.loads(out.read_text())["rows"][0]["seconds"] == taken
