"""multi_lora's CUDA C++ kernels for any number of tokens, adapters, slices and ranks, in the
simulator."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.ops.multi_lora import BatchPlan, cuda, multi_lora, multi_lora_add_
from lora_kernels.ops.tables.tiles import compiled
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc
from lora_kernels.testing.grid import as_layout
from tests.ops.interpreted import deterministic
from tests.ops.multi import ids_of, with_wrong_ids
from tests.ops.test_multi_lora import assert_exact, draw, planned

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

BF16, F16 = torch.bfloat16, torch.float16
# tokens, in, out of the slices, ranks, adapters of a token: edges of tiles, parts of the depth,
# many ranks and adapters, four slices, no rank, few tokens with several adapters, none at all,
# numbers that fill no piece
CASES = [
    (70, 72, [40, 24], [8, 3, 16], 1), (5, 2067, [41], [8, 3, 70], 2), (80, 72, [24, 8, 8, 16], list(range(1, 14)), 1),
    (90, 64, [136], [5, 64, 0], 3), (66, 24, [8], [4], 0),
]  # fmt: skip


@pytest.fixture
def simulated():
    with use_backend("cuda", simulate=True), deterministic(False):
        yield


def wider(slots):
    """Slots in float32, whose numbers 16 bits do not hold."""
    return [replace(s, a=s.a.float() * 1.001, b=s.b.float() * 1.001) for s in slots]


@pytest.mark.parametrize("wide", [False, True], ids=["own", "float32"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(simulated, case, dtype, wide):
    x, w, slots, slot, weights, bias = draw(*case, dtype)
    slots = wider(slots) if wide else slots
    args, plan = (x, w, slots, slot, weights, bias), planned(slots, slot, weights)
    with device(seed=1) as sim:
        y = multi_lora(x, w, slots, plan, bias)
    assert_exact(y, args, roundings=2)
    assert sim.launches == (2 if case[4] else 1) * len(slots)
    assert sim.counters["shared_wavefronts"] <= 1.1 * max(1, sim.counters["shared_ideal"])
    base = (x.double() @ w.double().T + bias.double()).to(dtype)
    with device(seed=2, resident=3):
        assert_exact(multi_lora_add_(base, x, slots, plan, bias), args, roundings=2)
    with device(seed=3):
        assert y.equal(multi_lora(x, w, slots, plan, bias))
    plan.raise_errors()


def test_layouts(simulated):
    x, w, slots, slot, _, bias = draw(70, 72, [40], [8, 3, 16], 1, F16)
    plan = planned(slots, slot)
    wanted = multi_lora(x, w, slots, plan, bias)
    for layout in ("transposed", "offset", "every_other"):
        y = as_layout(torch.empty(70, 40, dtype=F16), layout)
        torch.mm(x, w.T, out=(base := torch.empty(70, 40, dtype=F16)))
        y.copy_(base)
        found = multi_lora_add_(y, as_layout(x, layout), [replace(slots[0], a=as_layout(slots[0].a, layout))], plan)
        plain = multi_lora_add_(base, x, slots, plan)
        assert found.equal(plain)
    assert wanted.isfinite().all()


def test_ids_that_nobody_gave(simulated):
    x, w, slots, slot, _, bias = draw(12, 64, [24], [8, 3, 16], 2, BF16)
    slot[4:11] = 1
    ids, slot = with_wrong_ids(slots, slot)
    plan = BatchPlan.build(ids, 3)
    with device():
        y = multi_lora(x, w, slots, plan, bias)
    assert_exact(y, (x, w, slots, slot, None, bias), roundings=2)
    with pytest.raises(LookupError, match="BatchPlan: an id of an adapter is out of range or stale"):
        plan.raise_errors()


def test_neighbours_do_not_matter_to_what_is_added(simulated):
    """Neither who they are nor that one has an adapter of NaN."""
    x, w, slots, slot, _, bias = draw(70, 136, [56], [8, 3, 16, 70], 1, BF16)
    base = (x @ w.T).clone()

    def run(rows, slots=slots):
        with device():
            return multi_lora_add_(base[rows].clone(), x[rows], slots, planned(slots, slot[rows]))

    together = run(slice(0, 70))
    for first, last in ((0, 1), (7, 16), (20, 69)):
        assert run(slice(first, last)).equal(together[first:last])
    touched = slot[:, 0] == 3
    for name in "ab":
        spoiled = getattr(slots[0], name).clone()
        spoiled[slots[0].table[3, :9].long() * 8] = torch.nan
        beside = run(slice(0, 70), [replace(slots[0], **{name: spoiled})])
        assert beside[touched].isnan().any(1).all() and beside[~touched].equal(together[~touched])


def test_what_is_read(simulated):
    """Of A and B as many bytes as there are ranks, each once; x, and y twice."""
    x, w, slots, _, _, _ = draw(64, 1024, [512], [8, 16, 32, 64], 1, BF16)
    slots = [replace(slots[0], flags=torch.zeros(4, dtype=torch.int32))]
    plan, y = planned(slots, torch.arange(64)[:, None] % 4), torch.zeros(64, 512, dtype=BF16)
    with device(trace=True, shuffle=False) as sim:
        multi_lora_add_(y, x, slots, plan)
    read, written = sim.dram()
    thin = 120 * (1024 + 512) * 2
    assert thin + (x.numel() + y.numel()) * 2 <= read <= 1.1 * (thin + (x.numel() + y.numel()) * 2) + 64 * 64
    assert y.numel() * 2 <= written <= y.numel() * 2 + 64 * 64 * 4


@pytest.mark.parametrize(("kernel", "old", "new"), [
    ("shrink", "(first - p.starts[slot]) % ENTRIES != 0", "first != p.starts[slot]"),
    ("shrink", "      __syncthreads();  // the tiles have been read\n", ""),
    ("shrink", "      __syncthreads();  // they are there\n", ""),
    ("shrink", "if (local >= count || rank0 + j >= rank) return;", "if (rank0 + j >= rank) return;"),
    ("shrink", "mine % PAGE : 0", "0 : 0"),
    ("shrink", "rank0 += gridDim.y * RANK", "rank0 += 1000"),
    ("shrink", "entry[r] / p.each * p.x_row", "entry[r] * p.x_row"),
    ("shrink", "= scale * sum;", "= sum;"),
    ("expand", "    __syncthreads();  // the tiles have been read\n    for", "    for"),
    ("expand", "    __syncthreads();  // they are there\n#pragma unroll\n    for (int r", "#pragma unroll\n    for (int r"),
    ("expand", "    __syncthreads();  // the slots before have been read\n", ""),
    ("expand", "if (tokens.slot[t] == slot && first + r < rank)", "if (first + r < rank)"),
    ("expand", "if (tokens.slot[mine] == slot)", ""),
    ("expand", "p.generation[at] == int(id >> 32)", "true"),
    ("expand", "if (id != -1 && !known) atomicExch(p.error, 1);", ""),
    ("expand", "(gain - 1) * z[t][j] + ", "(gain - 1) * total[t][j] + "),
    ("expand", "int64_t(flags >> 2) * p.n", "int64_t(slot) * p.n"),
    ("expand", "part < p.parts", "part < 1"),
    ("expand", "tokens.weight[mine] * share", "share"),
    ("expand", "if (token < 0 || column_of(j) >= p.n) continue;", "if (token < 0) continue;"),
    ("both", "", ""),
])  # fmt: skip
def test_planted_bugs(planted, simulated, monkeypatch, kernel, old, new):
    planted(cuda.ANY, old, new, keep="multi_lora_(?:shrink|expand)_bf16")
    monkeypatch.setattr(cuda, "compiled", lambda kernel: replace(compiled(kernel), part=128))
    x, w, slots, slot, weights, bias = draw(20, 200, [136], [8, 3, 80, 40], 3, BF16)
    slot[:] = torch.where(slot == 1, 2, slot)  # more tokens of one adapter than a block has
    ids = ids_of(slot, slots)
    ids[0, 0], slot[0, 0] = int(ids_of(torch.tensor(1), slots)) + (1 << 32), -1
    if "ENTRIES" in old:
        x, slot, weights = x.repeat(5, 1), torch.full((100, 1), 2), None
        ids = ids_of(slot, slots)
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for seed in range(3):
            plan = BatchPlan.build(ids, 4, weights)
            with device(seed=seed):
                y = multi_lora(x, w, slots, plan, bias)
            assert bool(plan.error) == (weights is not None)
            assert_exact(y, (x, w, slots, slot, weights, bias), roundings=2)
