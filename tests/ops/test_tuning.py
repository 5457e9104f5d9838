"""What a user's GPU is timed for, and what is made of it: without a GPU, with a clock that reads
planted times."""

import json

import pytest
import torch

from lora_kernels import explain, lora_linear, use_backend
from lora_kernels.commands.tune import tune as command
from lora_kernels.ops import dispatch, launch, missing_backends, tables, tuning
from lora_kernels.ops.cost import Problem
from lora_kernels.testing import make_problem
from tests.ops.interpreted import deterministic, interpreted

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

BF16 = torch.bfloat16
PLAIN = Problem("forward", 200, 32, (24,), (4,), BF16)
DROPPED = PLAIN._replace(m=20, gain=True, drop_base=True, dropout=True)
GROUP = PLAIN._replace(m=20, n=(24, 8), r=(4, 2))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A GPU of a name, simulated, and a cache directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "gpu_name", lambda t: "Planted GPU 80GB")
    with deterministic(False):
        yield
    dispatch.clear_caches()


def planted(winner):
    def clock(calls):
        return {name: 1e-6 if name == winner else 2e-6 for name in calls}

    return clock


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("problem", [
    PLAIN._replace(m=20), DROPPED, GROUP, DROPPED._replace(n=(24, 8), r=(4, 2)), PLAIN._replace(m=20, codes=400),
    PLAIN._replace(m=20, codes=800, gain=True),
], ids=str)  # fmt: skip
def test_each_candidate_runs_by_its_name_and_gives_the_same(problem, direction):
    problem = problem._replace(direction=direction)
    with interpreted(80):
        torch.manual_seed(0)
        made = tuning.candidate_calls(problem, "cpu")
        triton = {name: call() for name, call in made.items() if name != "cuda"}
    assert len(triton) >= 2
    first, *others = [[t for t in _flat(result) if t is not None] for result in triton.values()]
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one.shape == two.shape and (one - two).norm() <= 0.02 * one.norm()


def test_each_candidate_that_the_plan_knows_is_timed():
    """Also those of a backend that leaves the call to another one unless it is forced."""
    for p in (PLAIN._replace(m=20, k=64, n=(64,)), PLAIN._replace(k=64, n=(64,))):
        with use_backend("triton", simulate=True):
            made = tuning.candidate_calls(p, "cpu")
        able = [c.name for c in dispatch.choose_plan(p, 80, backends=("triton", "cuda")).candidates if c.refused is None]
        assert "cuda" in able and list(made) == able


def test_what_was_measured_before_an_interruption_is_kept():
    def clock(calls, asked=[]):  # noqa: B006
        asked.append(calls)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return dict.fromkeys(calls, 1e-6)

    with interpreted(80), pytest.raises(KeyboardInterrupt):
        tuning.tune([PLAIN, DROPPED], "cpu", clock=clock)
    assert [choice.flags for choice in tables.user_choices("Planted GPU 80GB")] == [()]


def test_a_home_that_is_not_there_changes_nothing(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tables.Path, "home", nobody)
    assert dispatch.choose_plan(PLAIN, 80, gpu="Another GPU").winner == "addmm"


def _flat(result):
    return [t for each in result for t in (_flat(each) if isinstance(each, list | tuple) else [each])]


def test_another_candidate_than_its_name_is_an_error():
    with interpreted(80), pytest.raises(RuntimeError, match="tune: one pass was forced, and the backend that ran noted"):
        with dispatch.forced_candidate("two launches"):
            tuning.checked("one pass", lambda: lora_linear(*make_problem(3, 16, 16, 2, BF16).arguments()))()


def test_what_was_measured_here_decides_here_alone():
    with interpreted(80):
        (found,) = tuning.tune([PLAIN], "cpu", clock=planted("two launches"))
    assert found.winner == "two launches" and set(found.seconds) >= {"two launches", "addmm"}
    made = dispatch.choose_plan(PLAIN, 80, gpu="Planted GPU 80GB")
    assert made.winner == "two launches" and made.why.startswith("measured here at m 200, k 32, n 24, r 4: ")
    assert dispatch.choose_plan(PLAIN._replace(m=399), 80, gpu="Planted GPU 80GB").winner == "two launches"
    for other in (PLAIN._replace(m=401), PLAIN._replace(gain=True), PLAIN._replace(direction="backward")):
        assert dispatch.choose_plan(other, 80, gpu="Planted GPU 80GB").winner == "addmm", other
    assert dispatch.choose_plan(PLAIN, 80).winner == dispatch.choose_plan(PLAIN, 80, gpu="Another").winner == "addmm"
    assert dispatch.choose_plan(PLAIN, 80, True, gpu="Planted GPU 80GB") == dispatch.choose_plan(PLAIN, 80, True)


def test_explain_says_measured_here(monkeypatch):
    from lora_kernels.ops.lora_linear import triton as backend

    monkeypatch.setattr(backend, "gpu_name", lambda t: "Planted GPU 80GB")
    arguments = make_problem(200, 32, 24, 4, BF16).arguments()
    with interpreted(80):
        assert "nothing was measured" in str(explain(lora_linear, *arguments))
        tuning.tune([PLAIN], "cpu", clock=planted("two launches"))
        assert "won: measured here at m 200" in str(explain(lora_linear, *arguments))


def test_a_later_measurement_takes_the_place_of_an_older_one():
    with interpreted(80):
        tuning.tune([PLAIN, PLAIN, DROPPED], "cpu", clock=planted("two launches"))
        tuning.tune([PLAIN], "cpu", clock=planted("addmm"))
    held = tables.user_choices("Planted GPU 80GB")
    assert [(choice.winner, choice.flags) for choice in held] == [
        ("addmm", ()), ("two launches", ("gain", "drop_base", "dropout")),
    ]  # fmt: skip
    found = json.loads(tables.user_file("Planted GPU 80GB").read_text())
    assert (found["gpu"], found["arch"], found["measured"]) == ("Planted GPU 80GB", 80, True)
    assert torch.__version__ in found["stamp"]["torch"] and not list(tables.user_file("x").parent.glob("*.json.*"))


def test_the_time_is_kept(monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(now))
    problems = [PLAIN._replace(m=m) for m in (100, 1000, 10000)]
    with interpreted(80):
        found = tuning.tune(problems, "cpu", seconds=25, clock=planted("addmm"))
    assert [choice.m for choice in found] == [100, 1000]


@pytest.mark.parametrize("text", ["{", "[]", '{"choices": [{"m": 1}]}', '{"choices": []}'])
def test_a_file_that_is_no_table_is_left_aside(text):
    path = tables.user_file("Planted GPU 80GB")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="is no table .* and is left aside"):
        assert dispatch.choose_plan(PLAIN, 80, gpu="Planted GPU 80GB").winner == "addmm"


def test_the_file_is_by_the_gpu_and_the_versions(monkeypatch):
    one = tables.user_file("NVIDIA H100 80GB HBM3")
    assert one.name.startswith("nvidia-h100-80gb-hbm3-torch-") and f"torch-{torch.__version__}" in one.name
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert tables.user_file("NVIDIA H100 80GB HBM3") != one


def test_without_a_gpu_nothing_is_timed(capsys):
    with use_backend("triton", simulate=True), pytest.raises(RuntimeError, match="tune: it measures on a GPU, .* is cpu"):
        tuning.tune([PLAIN], "cpu")
    assert command() == 2 and "torch finds none here; nothing was written" in capsys.readouterr().err


def test_usual_problems_begin_with_those_of_many_rows():
    found = tuning.common_problems(BF16, 16)
    assert [p.m > 64 for p in found] == sorted((p.m > 64 for p in found), reverse=True) and len(found) == len(set(found))
    words = tuning.describe_choices([tuning.measured_choice(found[0], {"addmm": 1e-3, "two launches": 2e-3})])
    assert words == ["forward m 512, k 4096, n 4096, r 16, bfloat16: addmm (µs: addmm 1000.0, two launches 2000.0)"]
