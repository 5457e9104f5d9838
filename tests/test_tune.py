"""bench.tune, all of it but the GPU: a clock that reads planted efficiencies, and ops that do
nothing."""

import pytest
import torch

from bench import tune as bench
from lora_kernels.ops import cost, dispatch, registry, tables
from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.dispatch import choose_plan, tables_from

ON = nearest_chip(90)
BOTH = ("triton", "cuda")
STAMP = {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "date": "2026-01-01"}
SHARES = {"fused": 0.31, "library": 0.77, "one_pass": 0.41, "thin": 0.66, "stream": 0.83, "mma": 0.27, "specialised": 0.58}


def planted(p, name):
    """The seconds of a candidate where SHARES hold."""
    launches = cost.candidate_launches(p)
    if name == bench.BASE:
        return cost.seconds(name, [cost.gemm_step(p)], p, ON, SHARES)
    return cost.seconds(name, launches[name], p, ON, SHARES)


def run(folder, shapes, op=None, clock=None):
    """tune() with calls that only say what they are and a clock that asks `planted`."""
    def calls(p):
        return {name: lambda name=name: (p, name) for name in (*cost.NAMES[p.direction], bench.BASE)}

    def read(calls):
        return {name: planted(*call()) for name, call in calls.items()}

    return bench.write_measured_table(ON, 90, shapes, op or calls, clock or read, folder, "a GPU", STAMP, BOTH)


def test_the_whole_grid_with_a_planted_clock(tmp_path, capsys):
    shapes = list(bench.problems())
    assert len(shapes) == len(set(shapes)) == 12 * 6 * 4 * 2 * 2
    path = run(tmp_path, shapes)
    assert path == tmp_path / "sm_90.json" and len(capsys.readouterr().out.splitlines()) == len(shapes)
    made = tables.table_for(90, str(tmp_path))
    assert (made.arch, made.gpu, made.measured, made.stamp) == (90, "a GPU", True, STAMP)
    # of which there was no shape
    assert made.efficiency["single"] == tables.table_for(90).efficiency["single"]
    for size in ("medium", "large"):
        for name, share in made.efficiency["half"][size].items():
            # it refuses there; and no GEMM is short of memory
            if size == "medium" or name not in ("one_pass", "stream"):
                assert share == pytest.approx(SHARES[name], rel=0.03), (size, name)
    assert made.efficiency["half"]["small"]["stream"] == pytest.approx(SHARES["stream"], rel=0.03)

    losers = 0
    with tables_from(tmp_path):
        for p, choice in zip(shapes, made.choices, strict=True):
            planned = choose_plan(p, 90, backends=BOTH)
            able = [c.name for c in planned.candidates if c.refused is None]
            best = min(able, key=lambda name: planted(p, name))
            assert choice.winner == planned.winner == best and set(choice.seconds) == set(able)
            assert planned.why.startswith("measured at ") and "measured on a GPU" in planned.source
            with tables_from(tables.FOLDER):
                losers += choose_plan(p, 90, backends=BOTH).winner != best
    assert losers > 100, "the planted world is no other than the predicted one"


def test_a_table_is_of_the_gpu_that_was_measured(tmp_path):
    p = Problem("forward", 8192, 4096, (4096,), (16,), torch.bfloat16)
    path = bench.write_measured_table(nearest_chip(103), 103, [p], lambda p: dict.fromkeys((*cost.FORWARD, bench.BASE)),
                      lambda calls: {name: 1e-3 - 1e-4 * len(name) for name in calls}, tmp_path, "B300", STAMP)  # fmt: skip
    assert path.name == "sm_103.json"
    with tables_from(tmp_path):
        assert choose_plan(p, 103).winner == "two launches" and "measured on B300" in choose_plan(p, 103).source


def test_a_candidate_that_refuses_is_not_timed(tmp_path):
    timed = []

    def clock(calls):
        timed.append(set(calls))
        return dict.fromkeys(calls, 1e-3)

    run(tmp_path, [Problem(d, 8192, 64, (64,), (16,), torch.bfloat16) for d in cost.NAMES], clock=clock)
    assert timed == [{"two launches", "addmm", "cuda", "specialised", "base"}, {"fused", "addmm", "specialised", "base"}]


def test_nothing_is_written_when_a_measurement_fails(tmp_path):
    def clock(calls):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, bench.problems(quick=True), clock=clock)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("direction", cost.NAMES)
def test_the_calls_are_what_their_names_say(direction, monkeypatch):
    p = Problem(direction, 3, 8, (8,), (2,), torch.bfloat16)
    # which refuses few rows
    names = [name for name in cost.NAMES[direction] if name != cost.SPECIALISED]
    asks, ran, other = True, [], None

    def backend(*args):
        made = other or choose_plan(p, 90, backends=BOTH)
        ran.append(made.winner)
        if asks:
            registry.note_plan(made)
        return tuple(torch.zeros(1) for _ in range(3 if direction == "forward" else 5))

    implementation = registry.Implementation(backend, lambda *_: None)
    for name in BOTH:
        monkeypatch.setitem(registry._implementations[f"lora_linear_{direction}"], name, implementation)
    calls = bench.on_device("cpu")(p)
    assert set(calls) == {*names, bench.BASE} and calls[bench.BASE]().shape == (3, 8)
    for name in names:
        calls[name]()
        calls[name]()
    assert ran == [name for name in names for _ in range(3)]  # once more, to look

    with dispatch.forced_candidate(cost.NAMES[direction][0]):  # a backend that takes another one
        other = choose_plan(p, 90, backends=BOTH)
    with pytest.raises(RuntimeError, match="tune: addmm was forced, and the backend that ran noted .*forced"):
        bench.on_device("cpu")(p)["addmm"]()
    asks = False  # a backend that does not choose
    with pytest.raises(RuntimeError, match=r"tune: addmm was forced, and the backend that ran noted \[None\]"):
        bench.on_device("cpu")(p)["addmm"]()


def test_events_flush_before_each_of_at_least_ten_calls(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append(self)
            self.at = len(done)

        def elapsed_time(self, end):
            assert end.at == self.at + 2  # the call, between
            return {"a": 3.0, "b": 5.0}[done[self.at]]

    class Flush:
        def zero_(self):
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench.torch, "empty", lambda *size, **options: Flush())
    assert bench.median_event_seconds({name: lambda name=name: done.append(name) for name in "ab"}) == {"a": 3e-3, "b": 5e-3}
    assert done[:4] == ["a", "b", "a", "b"] and done.count("a") == done.count("b") >= 12
    rounds = done[4:]
    assert all(rounds[i] == "flush" for i in range(0, len(rounds), 4)) and len(rounds) % 8 == 0
    firsts = [rounds[i + 2] for i in range(0, len(rounds), 8)]
    assert set(firsts) == {"a", "b"}, "one order only"


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--quick", "--out", str(tmp_path / "tables")]) == 2
    assert "torch finds none here; nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_on_another_gpu_than_asked_for_it_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.launch, "architecture", lambda t: 90)
    monkeypatch.setattr(bench.launch, "multiprocessors", lambda t: 132)
    monkeypatch.setattr(bench.torch, "empty", lambda *size, device: None)
    assert bench.main(["--arch", "100", "--out", str(tmp_path)]) == 2
    assert "this GPU is sm_90, not sm_100; nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())
