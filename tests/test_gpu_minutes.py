"""`make gpu ARGS="--minutes N"` without a GPU: order, shares and deadline, what a kill leaves; and
what the folder for a machine without a network wants."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import tune
from bench.gpu import ceilings, offline, ready, rivals, rows, speed, timed, tuned
from bench.gpu.__main__ import TIMED_STAGES, main
from bench.gpu.record import Record
from bench.gpu.running import ROOT, Work, run_in_processes
from bench.gpu.setting import GpuLostError, Refused, Setting, StageFindings, backends_used
from lora_kernels.ops import cost, missing_backends, registry
from lora_kernels.testing import make_problem, rms, run

TINY = ["--minutes", "5", "--dry-run", "--tiny"]
needs_triton = pytest.mark.skipif("triton" in missing_backends(), reason=missing_backends().get("triton", ""))


@pytest.fixture
def record(tmp_path):
    made = Record(tmp_path / "found.json")
    made.start_file(minutes=8)
    return made


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def __call__(self):
        return self.now


@needs_triton
@pytest.mark.slow
def test_the_tiny_dry_run_of_a_timed_run(tmp_path):
    """Each part in its processes, on kernels for sm_90; the bench on one core, as others are at
    work."""
    file = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *TINY, "--arch", "90", "--only", "ceilings", "rows", "--out", str(file)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    found = json.loads(file.read_text(encoding="utf-8"))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert found["minutes"] == 5 and found["stamp"]["gpu"] == "none: sm_90 simulated"
    assert list(found["stages"])[:2] == ["ceilings", "rows"] and found["stages"]["ceilings"]["status"] == "passed"
    assert found["stages"]["rows"]["checked"] == 1, found["stages"]["rows"]
    assert {row["op"] for row in found["rows"]} >= {"ceiling", "lora_linear"}
    for row in found["rows"]:  # a simulator's times are nobody's speed
        assert not row["seconds"] or set(row["seconds"].values()) == {None}
    layer = next(row for row in found["rows"] if row["op"] == "lora_linear")
    assert set(layer["seconds"]) == {"ours", "linear", "peft", "addmm", "compile"}
    assert layer["ran"][0].startswith("lora_linear_forward: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.png"]


def test_the_parts_in_order_each_with_its_share(record):
    clock, seen = Clock(), []

    def each(work, record, seconds, words, processes, environment=None):
        seen.append((work.name, work.form, round(seconds), processes, environment))
        clock.now += seconds
        record.add_entry(work.name, "passed", "a check")

    two = {"bundled": {"TRITON_PTXAS_PATH": None}, "13.3": {"TRITON_PTXAS_PATH": "/there/ptxas"}}
    timed.run_stages(record, 8, [], 16, two, each=each, clock=clock)
    assert list(dict.fromkeys(name for name, *_ in seen)) == list(TIMED_STAGES)
    assert [s for name, form, s, *_ in seen if name == "ceilings"] == [20]
    assert [(s, e) for name, _, s, _, e in seen if name == "witness"] == [(30, each) for each in two.values()]
    assert [(form, s, n) for name, form, s, n, _ in seen if name == "rows"] == [("warm", 75, 16), ("", 75, 1)]
    assert {n for name, form, _, n, _ in seen if name in ("essentials", "witness", "repeats") or form == "warm"} == {16}
    assert clock.now == pytest.approx(100 + 480)
    assert record.read()["stages"]["essentials"]["share_seconds"] == 90


def test_the_deadline_holds_whatever_a_part_takes(record):
    clock, seen = Clock(), {}

    def late(work, record, seconds, words, processes, environment=None):
        seen[work.name] = seconds
        clock.now += 300 if work.name == "essentials" else seconds

    timed.run_stages(record, 8, [], 1, {"bundled": {}}, each=late, clock=clock)
    assert seen["witness"] == 60, "who begins late has his share"
    assert seen["rows"] == pytest.approx(480 - 20 - 300 - 60), "but no more than is left"
    assert clock.now <= 100 + 480 and "repeats" not in seen
    assert record.read()["stages"]["more"]["not_run"] == ["time"]


def test_what_a_part_leaves_the_next_may_use():
    clock = Clock()
    left = {}
    for part, seconds in timed.schedule(480, clock):
        left[part.name] = seconds
        clock.now += 10 if part.name == "essentials" else seconds
    assert left["essentials"] == 90 and left["witness"] == 60 + 80


def test_a_stage_stops_between_checks(record):
    clock = Clock()
    found = StageFindings(record, "essentials", until=110, clock=clock)

    def takes(seconds):
        clock.now += seconds

    found.check("first", lambda: takes(9))
    found.check("second", lambda: takes(9))
    found.check("third", lambda: takes(9))
    stage = record.read()["stages"]["essentials"]
    assert stage["passed"] == ["first", "second"] and stage["not_run"] == ["third: time"] and clock.now == 118


def test_the_file_has_each_check_as_it_ends(record):
    found = StageFindings(record, "essentials", process=(1, 2), skipped=frozenset({"fourth"}))

    def look():
        assert record.read()["stages"]["essentials"]["running"] == {"1": "second"}

    def refuses():
        raise Refused("not here")

    for name, call in {"first": look, "second": look, "third": look, "fourth": look, "fifth": look, "sixth": refuses}.items():
        found.check(name, call)
    stage = record.read()["stages"]["essentials"]
    assert (stage["passed"], stage["not_run"], stage["failed"]) == (["second"], ["sixth: not here"], 0)
    assert stage["running"] == {} and record.tried_checks("essentials") == {"second", "sixth"}


def test_a_lost_gpu_ends_the_process_and_not_the_stage(record, monkeypatch):
    """The check that did it has failed, and another process goes on behind it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (_ for _ in ()).throw(RuntimeError("an illegal memory access")))
    with pytest.raises(GpuLostError, match="illegal memory access"):
        StageFindings(record, "essentials").check("first", lambda: [][0])
    stage = record.read()["stages"]["essentials"]
    assert stage["failures"] == ["first: IndexError: list index out of range"] and stage["running"] == {}
    begun = []

    class Process:
        def __init__(self, words, **_):
            begun.append(words)

        def poll(self):
            return 3 if len(begun) == 1 else 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    run_in_processes(Work("essentials", "essentials"), record, 10, [])
    assert len(begun) == 2 and record.read()["stages"]["essentials"]["failed"] == 1


@needs_triton
def test_a_kill_leaves_what_was_found(tmp_path):
    file = tmp_path / "found.json"
    words = [sys.executable, "-m", "bench.gpu", *TINY, "--only", "ceilings", "witness", "--out", str(file)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(3600):
            time.sleep(0.05)
            if file.is_file() and Record(file).read()["stages"].get("ceilings", {}).get("passed"):
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["stages"]["ceilings"]["passed"] and found["stamp"]["torch"] == torch.__version__ and found["rows"]


@needs_triton
def test_the_reference_is_a_failure_of_its_row_and_no_abort(record, monkeypatch):
    monkeypatch.setattr(registry, "PREFERENCE", {"cpu": ("cpu", "reference"), "cuda": ("reference",)})
    monkeypatch.setattr(rows, "MAIN_ROWS", rows.MAIN_ROWS[:1])
    rows.measure(Setting(dry=True), StageFindings(record, "rows"), speed.run_untimed)
    stage = record.read()["stages"]["rows"]
    assert stage["failed"] == 2 and all("ran on the reference" in why for why in stage["failures"])
    assert [row["op"] for row in record.read()["rows"]] == ["lora_linear", "multi_lora"], "its times are kept"
    assert record.read()["rows"][0]["ran"] == ["lora_linear_forward: reference"]


@needs_triton
def test_what_a_dry_run_chooses_is_what_the_gpu_would():
    problem = make_problem(2, 64, 64, 16, torch.bfloat16)
    with Setting(dry=True, arch=90).as_dispatched():
        ran, slow = backends_used(lambda: run(problem))
    assert not slow and all(": reference" not in each and ": cpu" not in each for each in ran), ran
    assert registry.PREFERENCE["cpu"] == ("cpu", "reference") and not registry.simulates()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_rivals_compute_what_is_compared(dora, p):
    """y and the gradients of both forms in plain PyTorch, on one mask of dropout."""
    problem = make_problem(6, 20, 12, 4, torch.float64, gain=True)
    magnitude = torch.rand(12, dtype=torch.float64) + 0.5 if dora else None
    leaves = [t.requires_grad_() for t in (problem.x, problem.a, problem.b, magnitude) if t is not None]
    found = []
    for function in (rivals.lora_by_addmm, rivals.lora_as_written):
        torch.manual_seed(0)
        y = function(problem.x, problem.w, problem.a, problem.b, 2.0, magnitude, p)
        found.append([y, *torch.autograd.grad(y, leaves, problem.dy)])
    for one, other in zip(*found, strict=True):
        assert rms(one - other) <= 1e-12 * rms(other)


def test_flags_that_do_not_belong_together(capsys):
    for words, wanted in (
        (["--arch", "90"], "--arch is for --dry-run"), (["--minutes", "0", "--dry-run"], "--minutes must be above 0"),
        (["--minutes", "1", "--only", "speed"], "--only knows ceilings"), (["--only", "rows"], "--only knows environment"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(words)
        assert wanted in capsys.readouterr().err


def program(path, says="", status=0):
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def test_assemblers(tmp_path, monkeypatch):
    monkeypatch.setattr(ready, "find_spec", lambda name: None)
    old, new = (program(tmp_path / v, f"Cuda compilation tools, release {v}, V{v}.1") for v in ("12.9", "13.3"))
    assert ready.release(old) == (12, 9, 1) and ready.release(str(tmp_path / "none")) == ()
    monkeypatch.setenv("TRITON_PTXAS_PATH", old)
    assert list(ready.assemblers()) == ["bundled"]
    monkeypatch.setenv("TRITON_PTXAS_PATH", new)
    both = {"bundled": {"TRITON_PTXAS_PATH": None}, "13.3.1": {"TRITON_PTXAS_PATH": new}}
    assert ready.assemblers() == both


def test_the_offline_folder_wants_a_python_and_nvcc(tmp_path, monkeypatch, capsys):
    """Nothing is built or fetched before all that it needs is there."""
    monkeypatch.setattr(offline, "nvcc_path", lambda: None)
    monkeypatch.setattr(offline, "run_or_raise", lambda *_, **__: pytest.fail("something was run"))
    assert offline.main([str(tmp_path / "made"), "--python", program(tmp_path / "python", status=1)]) == 2
    said = capsys.readouterr().err
    assert "a Python 3.12 with headers and venv" in said and "does not run" in said and "nvcc" in said
    wrong = "{}.{}".format(*sys.version_info[:2])
    other = "3.9" if wrong != "3.9" else "3.8"
    assert offline.main([str(tmp_path / "made"), "--python", sys.executable, "--version", other]) == 2
    assert f"is Python {wrong}" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_the_offline_folder_takes_no_assembler_with_the_hazard(tmp_path):
    with pytest.raises(offline.MissingToolError, match=r"--ptxas: .* is 12.9.1, wanted 13.3 or later"):
        offline.assembler(program(tmp_path / "ptxas", "release 12.9, V12.9.1"), tmp_path)


def test_the_offline_folder_is_unpacked_if_it_is_whole(tmp_path, monkeypatch):
    folder, scratch, tree = tmp_path / "gpu", tmp_path / "scratch", tmp_path / "tree"
    for each in (scratch, tree / "lora_kernels", tree / "csrc", tree / "cmake", folder / "lib" / "lora_kernels"):
        each.mkdir(parents=True)
    monkeypatch.setattr(offline, "ROOT", tree)
    (tree / "CMakeLists.txt").write_text("how")
    (tree / "csrc" / "kernel.cu").write_text("what")
    (folder / "lib" / "lora_kernels" / "_cuda.so").write_bytes(b"a module")
    (folder / "ptxas.xz").write_bytes(offline.lzma.compress(b"an assembler"))
    of = {str(path.relative_to(folder)): offline.size_and_digest(path) for path in offline.files_below(folder)}
    made = {"files": of, "made_for": {"python": "3.12"}, "sources": offline.sources()}
    (folder / "manifest.json").write_text(json.dumps(made))
    path = Path(offline.unpack_folder(folder, scratch))
    assert path.read_bytes() == b"an assembler" and path.stat().st_mode & 0o111
    assert (tree / "lora_kernels" / "_cuda.so").read_bytes() == b"a module"
    (tree / "csrc" / "kernel.cu").write_text("something else")
    with pytest.raises(offline.MissingToolError, match="csrc has changed since"):
        offline.unpack_folder(folder, scratch)
    (folder / "ptxas.xz").write_bytes(b"half of it")
    with pytest.raises(offline.MissingToolError, match="was not copied whole"):
        offline.unpack_folder(folder, scratch)


class Pretended(Setting):
    """CPU tensors where a GPU's are meant: for the branches that a dry run leaves out."""

    device = property(lambda self: "cpu")


@pytest.fixture
def pretended(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **more: empty(*size, device=device and "cpu", **more))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
    # for the CPU it would call a C++ compiler
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for module in (ceilings, sys.modules[tune.median_event_seconds.__module__]):
        monkeypatch.setattr(module, "FLUSH", 1)
    return Pretended(timed=True)


def test_what_a_dry_run_leaves_out_of_the_speed(record, pretended, monkeypatch):
    monkeypatch.setattr(ceilings, "GEMMS", [(32, 24, 16)])
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **more: zeros(min(size[0], 64) if size else (), **more))
    ceilings.run_stage(pretended, StageFindings(record, "ceilings"))
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(rows, "FURTHER_ROWS", [row._replace(m=5, k=64, n=48) for row in rows.FURTHER_ROWS[2:6:3]])
    rows.measure(pretended, StageFindings(record, "more"), tune.median_event_seconds)
    found = record.read()
    assert {stage["failed"] for stage in found["stages"].values()} == {0}, found["stages"]
    made = {row["what"]: row for row in found["rows"]}
    for kind in ("bfloat16", "float16"):
        assert made[f"addmm 32×24×16 {kind}"]["flops_per_second"] > 0
    assert made["copy"]["bytes_per_second"] > 0 and made["launch"]["host_seconds"] > 0
    layer = made["forward + backward"]
    assert set(layer["seconds"]) == {"ours", "linear", "peft", "addmm", "compile"} and layer["ratios"]["ours / addmm"] > 0
    assert layer["ran"] == ["lora_linear_forward: cpu", "lora_linear_backward: cpu"]


def test_the_table_is_written_after_each_shape(record, pretended, monkeypatch):
    shapes = [tuned.Problem(what, 16, 256, (128,), (16,), torch.bfloat16) for what in ("forward", "backward")]
    names, library = {"forward": cost.FORWARD[0], "backward": cost.BACKWARD[0]}, cost.BACKWARD[-1]
    monkeypatch.setattr(tuned, "problems_to_measure", lambda setting: iter(shapes))
    monkeypatch.setattr(tuned, "candidate_calls", lambda setting, p: {names[p.direction]: int, library: int, tune.BASE: int})
    monkeypatch.setattr(tuned, "able_backends", lambda: ("triton",))
    monkeypatch.setattr(tuned.launch, "architecture", lambda t: 90)
    planned = tuned.dispatch.choose_plan

    def only(*args, **more):  # the others would have to be timed, too
        made = planned(*args, **more)
        return replace(made, candidates=tuple(c for c in made.candidates if c.name in (*names.values(), library)))

    monkeypatch.setattr(tuned.dispatch, "choose_plan", only)
    seen = []
    write = tuned.write_table

    def watched(measured, able, folder):
        write(measured, able, folder)
        seen.append(len(json.loads((folder / "sm_90.json").read_text())["choices"]))

    monkeypatch.setattr(tuned, "write_table", watched)
    tuned.run_stage(pretended, StageFindings(record, "tuned"))
    assert seen == [1, 2] and record.read()["stages"]["tuned"]["status"] == "passed", record.read()["stages"]
    assert [row["op"] for row in record.read()["rows"]] == ["tune", "tune"]


def test_a_folder_of_somebody_else_is_left(tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(offline.MissingToolError, match="holds what this command did not make; name another folder"):
        offline.prepare(argparse.Namespace(folder=tmp_path), "", {})
    assert (tmp_path / "letters.txt").read_text() == "mine"
