"""How many threads a call of a CPU kernel takes, by what teams before it took; and that bits do not
depend on it."""

import pytest
import torch

from lora_kernels import _cpu, lora_linear, merged_weight, multi_lora, weight_norm
from lora_kernels.ops.multi_lora import BatchPlan
from tests.ops import multi

MS = 1e6  # ns
WORK = 2.0**20  # 1024 x 1024, one token: 0.1 ms
KIND, OTHER = 16, 32


def stalled(team, times, at=0.0):
    for i in range(times):
        team.took(KIND, WORK, 8, 20 * MS, at + i)
    return team


def test_little_work_takes_one_thread():
    team = _cpu.Team()
    assert team.size(KIND, 2.0**14, 8, 0) == 1 and team.size(KIND, WORK, 8, 0) == 8 and team.size(KIND, WORK, 1, 0) == 1


def test_one_slow_call_changes_nothing():
    assert stalled(_cpu.Team(), 1).size(KIND, WORK, 8, 1 * MS) == 8


def test_after_two_stalls_short_calls_take_one_thread_for_a_while():
    team = stalled(_cpu.Team(), 2)
    for kind in (KIND, OTHER):
        assert team.size(kind, WORK, 8, 1 * MS) == 1
        assert team.size(kind, WORK * 1024, 8, 1 * MS) == 8  # longer than the stall
    team.took(KIND, WORK, 1, 0.1 * MS, 2 * MS)  # one thread was faster
    assert team.size(KIND, WORK, 8, 3 * MS) == 1
    assert team.size(KIND, WORK, 8, 250 * MS) == 8  # tried again


def test_a_stall_that_lasts_is_tried_ever_less_often():
    team, tried, now = stalled(_cpu.Team(), 2), 0, 0.0
    while now < 60_000 * MS:
        now += 1 * MS
        threads = team.size(KIND, WORK, 8, now)
        tried += threads == 8
        team.took(KIND, WORK, threads, (20 if threads == 8 else 0.1) * MS, now)
    assert 10 < tried < 30  # of 60,000 calls


def test_teams_are_back_when_the_machine_is_idle_again():
    team, now = stalled(_cpu.Team(), 40, 0.0), 5_000 * MS
    for _ in range(4):
        assert team.size(KIND, WORK, 8, now) == 8
        team.took(KIND, WORK, 8, 0.05 * MS, now)
        now += 1 * MS
    assert stalled(team, 1, now).size(KIND, WORK, 8, now + 1 * MS) == 8


def test_what_takes_longer_for_another_reason_keeps_its_team():
    """Another kernel takes ten times as long for a multiplication, and so does this one of a W
    that no cache holds."""
    team, work = _cpu.Team(), WORK * 1024
    for i in range(10):
        team.took(KIND, work, 2, 2 * MS, i)
        team.took(OTHER, work, 2, 20 * MS, i)
        assert team.size(OTHER, work, 2, i) == 2
    alone, calls, now = 0, 400, 0.0
    for i in range(calls):
        now += 50 * MS
        threads = team.size(KIND, work, 2, now)
        alone += threads == 1
        # now and then it is there
        team.took(KIND, work, threads, (2 if i % 20 == 0 else 20 if threads == 2 else 40) * MS, now)
    assert 1 <= alone < 8  # each of them has shown that no team stalled


def test_what_is_always_slow_and_too_long_for_one_thread_stops_nobody():
    team, now = _cpu.Team(), 0.0
    team.took(KIND, WORK * 1024, 16, 2 * MS, now)
    for _ in range(40):
        now += 10 * MS
        team.took(KIND, WORK * 1024, 16, 12 * MS, now)
    assert team.size(OTHER, WORK, 16, now + 5_000 * MS) == 16
    team.took(KIND, WORK * 1024, 16, 12 * MS, now + 5_000 * MS)
    team.took(KIND, WORK * 1024, 16, 12 * MS, now + 5_010 * MS)
    assert team.size(OTHER, WORK, 16, now + 5_011 * MS) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "n_out", "n_in", "rank"), [
    (1, 300, 520, 8), (7, 130, 257, 5), (40, 520, 300, 16), (70, 257, 140, 33), (300, 260, 520, 64),
])  # fmt: skip
def test_bits_do_not_depend_on_the_team(monkeypatch, tokens, n_out, n_in, rank, dtype):
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    w, x, dy = new(n_out, n_in), new(tokens, n_in), new(tokens, n_out)
    a, b, bias, gain = (new(*s).requires_grad_() for s in ((rank, n_in), (n_out, rank), (n_out,), (n_out,)))
    x.requires_grad_()
    slots = multi.make_slots(n_in, [n_out], [rank, 8], dtype, dora=(0,), biased=(1,))
    plan = BatchPlan.build(multi.ids_of(torch.arange(tokens) % 3 - 1, slots), 2)

    def everything():
        y = lora_linear(x, w, a, b, 0.5, bias, gain, 0.1, seed=torch.tensor(3))
        grads = torch.autograd.grad(y, (x, a, b, bias, gain), dy)
        n = weight_norm(w, a, b, 0.5)
        ends = torch.autograd.grad(n.sum(), (a, b))
        with torch.no_grad():
            others = merged_weight(w, a, b, 0.5), multi_lora(x, w, slots, plan)
        return [y.detach(), *grads, n.detach(), *ends, *others]

    results = []
    for count in (1, 2, 3):
        # what our kernels are told; the vendor's GEMM keeps its own
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(everything())
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
