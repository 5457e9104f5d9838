"""The harness of `make test-peft`, on a folder of tests in the place of PEFT's."""

from collections import Counter

import pytest

from tests.peft_suite import __main__ as suite
from tests.peft_suite.files import CHEAPER, LEFT_OUT, RUN

TESTS = """
import peft, pytest, torch
from huggingface_hub.errors import OfflineModeIsEnabled
from torch import nn
from .testing_utils import hub_online_once

def make(**more):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], **more))

def test_fast_disabled_merged():
    model = make()
    model.add_adapter("other", peft.LoraConfig(target_modules=["1"]))
    x = torch.randn(2, 8)
    for _ in range(3):
        model(x)                                     # "1" has no active adapter
    with model.disable_adapter():
        model(x)
    model.eval()
    model(x, adapter_names=["__base__", "__base__"])
    model.merge_adapter()
    model(x)

def test_left():
    model = make()
    model.base_model.model[0].base_layer.weight.requires_grad_(True)
    model(torch.randn(2, 8))

def test_raises():
    with pytest.raises((RuntimeError, ValueError)):
        make()(torch.randn(2, 7))

def test_name():
    assert "lora.Linear" in repr(make())

def test_fails_anyway():
    raise AssertionError

def test_hub():
    with hub_online_once("a model"):
        raise OSError from OfflineModeIsEnabled("no")

@pytest.mark.parametrize("config_cls", [peft.LoraConfig, peft.LoHaConfig])
def test_lora_alone(config_cls):
    assert config_cls is peft.LoraConfig
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Tests in the form of PEFT's, in which the network must be reached by the harness's stand-in
    alone."""
    source = tmp_path_factory.mktemp("peft")
    (source / "tests").mkdir()
    (source / "pytest.ini").write_text("[pytest]\n")
    (source / "tests" / "__init__.py").touch()
    (source / "tests" / "testing_utils.py").write_text("def hub_online_once(model):\n    raise NameError\n")
    (source / "tests" / "test_small.py").write_text(TESTS)
    return source


@pytest.fixture(scope="module")
def outcome(source, tmp_path_factory):
    return suite.run_tests(source, tmp_path_factory.mktemp("fused"), ["tests/test_small.py"], 1)


def test_calls_are_counted_by_how_they_ran(outcome):
    assert outcome.calls == Counter({suite.FAST: 3, "the base weight requires grad": 1})
    assert suite.table(outcome.calls) == "\n".join(
        ["      3  75.0%  fast", "      1  25.0%  PEFT's: the base weight requires grad"]
    )


NAME, ANYWAY = "tests/test_small.py::test_name", "tests/test_small.py::test_fails_anyway"


def test_failures_and_skips(outcome):
    assert outcome.failed == [ANYWAY, NAME]
    assert "2 failed, 4 passed, 1 skipped, 1 deselected" in outcome.summary


@pytest.mark.slow
def test_a_run_on_stock_layers_tells_what_fails_anyway(source, outcome, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "FOLDER", tmp_path)
    assert suite.failed_on_fused_alone(source, outcome.failed) == [NAME]


def test_a_known_difference_needs_no_run(source, monkeypatch):
    monkeypatch.setitem(suite.KNOWN, NAME, "a reason")
    monkeypatch.setattr(suite, "run_tests", None)
    assert suite.failed_on_fused_alone(source, [NAME]) == []


@pytest.mark.parametrize(
    "calls, failed, minimum, status",
    [
        ({"fast": 9, "a": 1, f"some{CHEAPER}": 5}, [], 0.9, 0),
        ({"fast": 9, "a": 1}, [], 0.91, 1),
        ({"fast": 1}, ["x"], 0.5, 1),
        ({}, [], 0.1, 1),
    ],
)
def test_the_exit_status(monkeypatch, capsys, tmp_path, calls, failed, minimum, status):
    def run_tests(*_, stock=False):
        return suite.Outcome(Counter(calls), [] if stock else failed, "done")

    monkeypatch.setattr("sys.argv", ["peft_suite"])
    monkeypatch.setattr(suite, "unpacked", lambda: tmp_path)
    monkeypatch.setattr(suite, "MINIMUM", minimum)
    monkeypatch.setattr(suite, "run_tests", run_tests)
    assert suite.main() == status
    assert ("FAILED on fused layers alone: x" in capsys.readouterr().out) == bool(failed)


def test_a_file_that_is_neither_run_nor_left_out_is_named(source, tmp_path):
    assert not {*RUN} & {*LEFT_OUT}
    (tmp_path / "tests").mkdir()
    for name in ("test_new.py", RUN[0], next(iter(LEFT_OUT))):
        (tmp_path / "tests" / name).write_text("LoraConfig")
    with pytest.raises(SystemExit, match="neither runs nor leaves out test_new.py$"):
        suite.check_files(tmp_path)
