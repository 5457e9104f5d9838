"""bench.never_slower and bench.tune --cpu without their clocks: what is measured, what is printed,
what a table is made of."""

import argparse
import json
from dataclasses import replace

import pytest
import torch

from bench import lora_linear, never_slower, tune, tune_cpu
from lora_kernels.ops.dropout import mask
from lora_kernels.ops.lora_linear import op
from lora_kernels.ops.tables import cpu as table
from lora_kernels.ops.tables.cpu import ALL, CpuRow

CASE = {"dtype": "float32", "size": 64, "M": 2, "r": 8, "kind": "lora", "what": "step", "dropout": 0.0}


def row(ratio, level="avx2"):
    return {**CASE, "level": level, "seconds": {"ours": ratio * 1e-3, "peft": 1e-3, "torch": 2e-3}, "ratio": ratio}


def test_every_case_of_the_rule():
    everything = argparse.Namespace(
        dtypes=never_slower.DTYPES, shapes=never_slower.SHAPES, tokens=never_slower.TOKENS, ranks=never_slower.RANKS,
        kinds=("lora",), what=never_slower.WHAT, dropout=0.1,
    )  # fmt: skip
    found = list(never_slower.cases(everything))
    assert len(found) == 3 * 4 * 6 * 2 * 2 and found[0]["size"] == 576 and found[-1]["size"] == 11008
    assert {case["dropout"] for case in found} == {0.1}


def test_violations_are_printed_and_counted(monkeypatch, capsys, tmp_path):
    rows = {"portable": [row(1.0, "portable"), {**CASE, "level": "portable"}], "avx2": [row(1.5), row(1.02)]}
    asked = []
    monkeypatch.setattr(never_slower, "rows_of", lambda level, argv: asked.append((level, argv)) or rows[level])
    arguments = ["--levels", "portable", "avx2", "--ranks", "8", "--out", str(tmp_path / "found.json")]
    assert never_slower.main(arguments) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "portable: 0 of 1 slower than 1.02, median ratio 1.00; 1 left out",
        "avx2       float32  lora step    64² M=2 r=8: 1.50 × PEFT, 1000 µs",
        "avx2: 1 of 2 slower than 1.02, median ratio 1.26; 0 left out",
    ]
    assert asked == [("portable", arguments), ("avx2", arguments)]
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == [*rows["portable"], *rows["avx2"]]
    rows["avx2"].pop(0)
    assert never_slower.main(arguments[:-2]) == 0


def test_a_case_over_the_limit_is_measured_again_and_the_middle_counts(monkeypatch):
    found = iter([row(ratio)["seconds"] for ratio in (1.3, 0.9, 1.1)])
    monkeypatch.setattr("lora_kernels.commands.paired.interleaved_medians", lambda calls, **_: next(found))
    measured = never_slower.measure(CASE, 0.0, 60.0)
    assert measured["ratio"] == pytest.approx(1.1) and next(found, None) is None
    assert never_slower.measure(CASE, 0.0, 0.0) is None


def test_a_level_is_measured_in_a_process_of_its_own():
    few = "--dtypes float32 --shapes 32 --tokens 2 --ranks 2 --kinds lora --what step --seconds 0 --threads 1 --dropout 0.3"
    [found] = never_slower.rows_of("portable", few.split())
    assert found["level"] == "portable" and set(found["seconds"]) == {"ours", "peft", "torch"}
    assert found["ratio"] == never_slower.ratio(found["seconds"])
    assert found["dropout"] == 0.3 and " r=2 dropout=0.3: " in never_slower.line(found)


def test_dropout_is_that_of_the_layers(monkeypatch):
    asked, contenders = [], lora_linear.contenders
    monkeypatch.setattr(lora_linear, "contenders", lambda *args, **more: asked.append(more) or contenders(*args, **more))
    for dropout in (0.0, 0.3):
        never_slower.measure({**CASE, "dropout": dropout}, 0.0, 60.0)
    assert asked == [{"dropout": 0.0}, {"dropout": 0.3}]
    with pytest.raises(SystemExit):
        never_slower.main(["--dropout", "1"])


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_all_that_is_timed_drops_and_computes_one_thing(monkeypatch, use_dora):
    calls = lora_linear.contenders(40, 24, 6, 4, torch.float32, False, use_dora, dropout=0.4)
    assert not any(torch.equal(calls[name](), calls[name]()) for name in ("ours", "peft", "torch"))
    seed = torch.tensor(5)
    kept = mask(seed, 0.4, 6, 40, torch.float32, seed.device)
    monkeypatch.setattr(op, "draw_seed", lambda: seed)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_: x * kept)
    torch.testing.assert_close(calls["torch"](), calls["ours"]())


def planted(won, names, sizes=(576, 1024)):
    """Times in which `won` of each number of tokens takes half as long as the others."""
    return {
        (size, tokens): {name: size * (1.0 if name == fast else 2.0) for name in names}
        for size in sizes
        for tokens, fast in won.items()
    }


def test_a_row_is_what_won():
    forward = planted({1: "small", 4: "small", 16: "packed", 64: "packed", 256: "gemm"}, ["small", "packed", "gemm"])
    back = {1: "small", 4: "streamed", 16: "streamed", 64: "streamed", 256: "streamed"}
    back = planted(back, ["small", "streamed", "gemm"])
    made = tune_cpu.fit("avx2", "float32", forward, back, "here")
    wanted = CpuRow("avx2", "float32", 8, 9, 128, ALL, 3, ALL, ALL, 64, 0, table.processor(), "here", 0, 2)
    assert made == wanted
    assert tune_cpu.fit_thin(made, planted({1: "library", 4: "library", 16: "own"}, ["own", "library"])).thin == 8
    assert tune_cpu.fit_thin(made, planted({1: "own", 4: "library", 16: "own"}, ["own", "library"])).thin == 0
    streamed = planted({1: "small", 4: "small", 16: "own"}, ["own", "small"])
    assert tune_cpu.fit_codes(made, streamed).small_codes == 8
    assert tune_cpu.fit_codes(made, planted({1: "own", 4: "small"}, ["own", "small"])).small_codes == 0


def test_what_was_dropped_has_lost():
    times = planted({1: "small", 4: "addmm", 16: "addmm"}, ["small", "packed", "gemm", "addmm"])
    for at, taken in times.items():
        if at[1] == 16:
            del taken["small"], taken["packed"], taken["gemm"]
    back = planted({1: "addmm", 16: "gemm"}, ["small", "streamed", "gemm", "addmm"])
    made = tune_cpu.fit("avx512", "bfloat16", times, back, "")
    assert (made.small, made.packed, made.addmm_from, made.addmm_back_from) == (2, 0, 3, ALL)


def test_the_table_is_filled(monkeypatch, tmp_path, capsys):
    """All of it but that few are measured: a process for the level, its rows in the file."""
    monkeypatch.setattr(tune_cpu.subprocess, "run", lambda command, **_: planted_process(command))
    kept = replace(table.row_for("avx2", "float32", ""), small=5)
    table.write([kept], tmp_path / "cpu.json")
    assert tune.main(["--cpu", "--levels", "portable", "--out", str(tmp_path)]) == 0
    assert table.read(tmp_path / "cpu.json") == (kept, *MEASURED)


MEASURED = [replace(table.row_for("portable", dtype, ""), processor="AMD 99") for dtype in ("float32", "bfloat16")]


def planted_process(command):
    assert command[-2:] == ["--held", "portable"] and "--cpu" in command
    text = "".join(json.dumps(vars(each)) + "\n" for each in MEASURED)
    return argparse.Namespace(stdout=text)


def test_each_candidate_runs_in_both_directions():
    from lora_kernels import _cpu

    for direction in ("forward", "backward"):
        rows = tune_cpu.candidates(_cpu.level(), "float32", direction)
        for name, each in rows.items():
            assert tune_cpu.layer_call(each, 64, 3, direction, codes=True)() is not None
            found = tune_cpu.layer_call(each, 32, 3, direction)()
            assert isinstance(found, torch.Tensor if direction == "forward" else tuple), name
