"""How many threads a call of a CPU kernel takes, by what teams before it took; and that bits do not
depend on it."""

import pytest
import torch

from lora_kernels import _cpu, lora_linear, merged_weight, multi_lora, weight_norm
from lora_kernels.ops.multi_lora import BatchPlan
from tests.ops import multi

MS = 1e6  # ns
WORK = 2.0**20  # 1024 x 1024, one token: 0.1 ms


def stalled(team, times, at=0.0):
    for i in range(times):
        team.took(WORK, 8, 20 * MS, at + i)
    return team


def test_little_work_takes_one_thread():
    team = _cpu.Team()
    assert team.size(2.0**14, 8, 0) == 1 and team.size(WORK, 8, 0) == 8 and team.size(WORK, 1, 0) == 1


def test_one_slow_call_changes_nothing():
    assert stalled(_cpu.Team(), 1).size(WORK, 8, 1 * MS) == 8


def test_after_two_stalls_short_calls_take_one_thread_for_a_while():
    team = stalled(_cpu.Team(), 2)
    assert team.size(WORK, 8, 1 * MS) == 1
    assert team.size(WORK * 1024, 8, 1 * MS) == 8  # longer than the stall
    assert team.size(WORK, 8, 250 * MS) == 8  # tried again


def test_a_stall_that_lasts_is_tried_ever_less_often():
    team, tried, now = stalled(_cpu.Team(), 2), 0, 0.0
    while now < 60_000 * MS:
        now += 1 * MS
        if team.size(WORK, 8, now) == 8:
            tried += 1
            team.took(WORK, 8, 20 * MS, now)
    assert 10 < tried < 30  # of 60,000 calls


def test_teams_are_back_when_the_machine_is_idle_again():
    team, now = stalled(_cpu.Team(), 40, 0.0), 5_000 * MS
    for _ in range(4):
        assert team.size(WORK, 8, now) == 8
        team.took(WORK, 8, 0.05 * MS, now)
        now += 1 * MS
    assert stalled(team, 1, now).size(WORK, 8, now + 1 * MS) == 8


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
