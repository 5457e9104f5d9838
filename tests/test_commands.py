"""`python -m lora_kernels`: what each command says, and that `bench` times what it says it does."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import __version__
from lora_kernels.commands import bench, doctor, main, paired
from lora_kernels.ops import missing_backends

COMMANDS = ("doctor", "bench", "tune", "serve-demo")


@pytest.fixture
def without_typer(monkeypatch):
    monkeypatch.delitem(sys.modules, "lora_kernels.commands.app", raising=False)
    for name in ("typer", "rich"):
        monkeypatch.setitem(sys.modules, name, None)


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(re.search(rf"\b{command}\b", told) for command in COMMANDS) and "--version" in told
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"
    assert main(["bench", "--help"]) == 0 and "MODEL_OR_SHAPE" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["bench"], ["doctor", "--nonsense"], ["tune", "--dtype", "int8"]])
def test_what_is_no_command_is_refused(arguments, capsys):
    assert main(arguments) == 2 and capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["lora_kernels"] == __version__ and found["packages"]["torch"] == torch.__version__
    assert found["forwards"][0]["device"] == "cpu" and found["forwards"][0]["error"] < 1e-6
    assert found["backends"]["cpu"]["runs"] == ("cpu" not in missing_backends())
    if not torch.cuda.is_available():
        assert not found["backends"]["triton"]["runs"]
        assert all(found["backends"][each]["what"].startswith("torch finds no GPU here") for each in ("triton", "cuda"))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"lora_kernels {__version__}, Python ")
    assert lines[-1].startswith("OK: lora_linear on cpu: relative error ")


def test_doctor_says_once_what_is_missing(monkeypatch, capsys):
    """Also where no kernel was built, and a result is wrong or an error."""
    cure = "not built: no C++17 compiler: apt install g++, then pip install --force-reinstall --no-deps ."
    monkeypatch.setattr(doctor, "missing_backends", lambda: {"cpu": cure})
    monkeypatch.setattr(doctor, "cuda_build", lambda: cure)
    monkeypatch.setattr(doctor, "lora_linear", lambda x, w, *_: x @ w.T)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert told.count("C++17") == 1 and "backend cuda: absent: torch finds no GPU here; as cpu" in told and "\nWRONG: " in told

    def fails(*_):
        raise OSError("no such luck")

    monkeypatch.setattr(doctor, "lora_linear", fails)
    assert main(["doctor"]) == 1 and "WRONG: lora_linear on cpu: OSError: no such luck" in capsys.readouterr().out


def test_without_typer(without_typer, capsys):
    assert main(["doctor"]) == 0 and "\nOK: " in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0 and json.loads(capsys.readouterr().out)["ok"]
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"
    for command in ("bench", "tune", "serve-demo"):
        assert main([command, "--help"]) == 2
        told = "typer or rich is not installed: pip install typer rich (or lora_kernels[cli])"
        assert capsys.readouterr().err == f"{command}: {told}\n"
    assert main(["--help"]) == 0 and "doctor [--json]" in capsys.readouterr().err
    assert main([]) == 2


def test_another_module_that_is_missing_is_no_excuse(monkeypatch):
    monkeypatch.delitem(sys.modules, "lora_kernels.commands.app", raising=False)
    monkeypatch.delattr("lora_kernels.commands.tune")
    monkeypatch.setitem(sys.modules, "lora_kernels.commands.tune", None)
    with pytest.raises(ImportError, match="tune"):
        main(["doctor"])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(paired, "MIN_ROUNDS", 2)


def test_bench_of_a_shape(quick, capsys, tmp_path):
    picture = tmp_path / "bench.png"
    assert main(["bench", "24x40", "--tokens", "3", "--rank", "4", "--seconds", "0", "--plot", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "24x40, one layer, 3 tokens, rank 4, float32" in told and "A step beside PEFT's: LoRA " in told
    for row in ("LoRA forward", "LoRA step", "DoRA forward", "DoRA step"):
        assert re.search(rf"{row}.*\d.*\d.*\d.*(faster|slower|as fast).*[+-]\d+%", told)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_of_a_model(quick, capsys, tmp_path):
    from tests.integrations.fuse_helpers import llama

    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert main(["bench", str(tmp_path), "--tokens", "5", "--seconds", "0"]) == 0
    assert re.search(r"14 layers, 5 tokens, rank 16, bfloat16", capsys.readouterr().out)


@pytest.mark.parametrize("method", bench.METHODS)
def test_contenders_share_weights_and_compute_the_same(method):
    shape = bench.SHAPE.fullmatch("24x40")
    base = bench._make_layer(shape, None, torch.device("cpu"))
    job = bench._make_job("", base, True, method, 7, 4)
    names = {name: {p.data_ptr() for p in module.parameters()} for name, module in job.modules.items()}
    assert names["base"] < names["PEFT"] == names["ours"] and job.layers == "one layer"
    grads = {}
    for name, module in job.modules.items():
        x = job.x.clone().requires_grad_()
        y = job.call(module, x)
        trained = [p for p in module.parameters() if p.requires_grad]
        grads[name] = y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])
    torch.testing.assert_close(grads["ours"], grads["PEFT"])
    assert not torch.allclose(grads["base"][0], grads["PEFT"][0]), "B is zero"


def test_layers_that_are_left_to_peft_are_told(monkeypatch):
    report = SimpleNamespace(fused=["a", "b"], left={"c": "because"})
    monkeypatch.setattr(bench, "fuse", lambda model: report)
    base = bench._make_layer(bench.SHAPE.fullmatch("8x8"), None, torch.device("cpu"))
    assert bench._make_job("", base, True, "LoRA", 2, 2).layers == "2 layers and 1 left to PEFT"


def test_bench_leaves_no_gradients():
    job = bench._make_job("", bench._make_layer(bench.SHAPE.fullmatch("8x8"), None, torch.device("cpu")), True, "LoRA", 2, 2)
    assert set(bench.measure(job, True, 0)) == set(bench.CONTENDERS)
    assert job.x.grad is None and all(p.grad is None for p in job.modules["ours"].parameters())


@pytest.mark.parametrize(("ours", "words"), [(1, "2.00x faster"), (4, "2.00x slower"), (1.99, "as fast"), (2.01, "as fast")])
def test_words(ours, words):
    assert bench.speedup_label({"base": 1.0, "PEFT": 2.0, "ours": ours}) == words


def test_bench_says_what_it_cannot(monkeypatch, capsys, tmp_path):
    assert main(["bench", str(tmp_path / "nothing")]) == 2
    assert "is neither a shape such as 4096x4096 nor a model that loads: " in capsys.readouterr().err
    assert main(["bench", "8x8", "--plot", str(tmp_path / "nothing" / "x.png")]) == 2
    assert "is no folder for the picture" in capsys.readouterr().err
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "8x8", "--plot", "x.png"]) == 2
    assert capsys.readouterr().err == "bench: peft and matplotlib not installed: pip install peft matplotlib\n"


def test_rounds_are_interleaved_in_random_orders():
    order, waits = [], []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = paired.interleaved_medians(calls, seconds=0, wait=lambda: waits.append(0))
    assert set(times) == set("abc") and order[:6] == list("aabbcc") and len(waits) == 2 * 30
    rounds = [tuple(order[i : i + 3]) for i in range(6, len(order), 3)]
    assert len(rounds) == paired.MIN_ROUNDS and all(sorted(each) == list("abc") for each in rounds) and len(set(rounds)) > 3
