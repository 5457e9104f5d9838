"""`make gpu` without a GPU: its stages in the simulator, its file, its exit status, and a failure
that it must see."""

import json
import sys

import pytest
import torch

from bench import report
from bench.gpu.__main__ import STAGES, kebab_case, main
from bench.gpu.record import Record
from bench.gpu.running import Work, run_in_processes
from bench.gpu.setting import StageFindings, any_bit_differs
from lora_kernels.ops import missing_backends

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops.lora_linear import triton as backend


def dry(folder, *more):
    """The exit status and the JSON of the smallest dry run."""
    file = folder / "found.json"
    status = main(["--dry-run", "--tiny", "--out", str(file), *more], here=True)
    return status, json.loads(file.read_text(encoding="utf-8"))


def test_a_dry_run_goes_through_every_stage(tmp_path, capsys):
    status, found = dry(tmp_path)
    assert status == 0, capsys.readouterr().out
    assert found["dry_run"] and found["stamp"]["torch"] == torch.__version__
    assert found["stamp"]["gpu"] == "none: sm_80 simulated"
    assert list(found["stages"]) == list(STAGES)
    states = {name: stage["status"] for name, stage in found["stages"].items()}
    assert states == dict.fromkeys(STAGES, "passed") | {"sanitizer": "not run"}
    assert all("needs a GPU" in found["stages"][name]["not_run"][0] for name in ("sanitizer", "graphs"))
    assert {row["op"] for row in found["rows"]} == {"lora_linear", "weight_norm", "merged_weight"}
    for row in found["rows"]:  # a simulator's times are nobody's speed
        assert set(row["seconds"].values()) == {None} and not row["ratios"] and "floor_bytes_per_second" not in row
    assert (tmp_path / "found.png").is_file()


def test_a_wrong_kernel_fails_the_correctness(tmp_path, monkeypatch, capsys):
    right = backend._forward

    def wrong(*args):
        ys, hs, zs = right(*args)
        ys[0][-1, -1] += 1
        return ys, hs, zs

    monkeypatch.setattr(backend, "_forward", wrong)
    status, found = dry(tmp_path, "--only", "environment", "correctness")
    assert status == 1 and "FAILED lora_linear dora, bias" in capsys.readouterr().out
    assert found["stages"]["environment"]["status"] == "passed"
    stage = found["stages"]["correctness"]
    assert stage["status"] == "failed" and stage["failed"] == len(stage["failures"]) > 1


def test_bits_that_change_fail_the_determinism(tmp_path, monkeypatch):
    right, calls = backend._forward, []

    def wrong(*args):
        ys, hs, zs = right(*args)
        calls.append(None)
        ys[0][0, 0] += len(calls) % 2
        return ys, hs, zs

    monkeypatch.setattr(backend, "_forward", wrong)
    status, found = dry(tmp_path, "--only", "determinism")
    assert status == 1 and "repetitions gave other bits" in found["stages"]["determinism"]["failures"][0]


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "found.json")]) == 2
    assert "finds none here; nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_stage_whose_process_dies_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    record = Record(tmp_path / "found.json")
    record.start_file()
    run_in_processes(Work("environment", "environment"), record, 10, ["--dry-run"])
    stage = record.read()["stages"]["environment"]
    assert stage["status"] == "failed" and stage["failures"] == ["its process ended with 1 between checks"]


def test_the_report_of_cpus_refuses_a_file_of_a_gpu(tmp_path, capsys):
    file = tmp_path / "nvidia-h100.json"
    file.write_text(json.dumps({"dry_run": False, "stages": {}, "stamp": {}, "rows": []}), encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main([str(file)])
    assert "nvidia-h100.json is of a GPU" in capsys.readouterr().err


def test_what_is_found():
    found = StageFindings()
    assert found.status == "not run"
    found.check("fine", lambda: None)
    assert found.status == "passed"
    found.check("broken", lambda: [][0])
    assert found.status == "failed" and found.failures == ["broken: IndexError: list index out of range"]
    nan, zero = torch.tensor([torch.nan]), torch.tensor([0.0])
    assert not any_bit_differs([nan], [nan.clone()]) and any_bit_differs([zero], [-zero])
    assert kebab_case("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
