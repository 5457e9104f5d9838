"""multi_lora's CUDA C++ kernel in the simulator: numbers, bits, what it reads, and that its waits
are needed."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import explain, use_backend
from lora_kernels.ops import launch, missing_backends
from lora_kernels.ops.multi_lora import BatchPlan, cuda, multi_lora
from lora_kernels.ops.multi_lora.op import MultiLoRA, MultiLoRAAdd
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc
from tests.ops.interpreted import deterministic
from tests.ops.multi import ids_of, make_slots, with_wrong_ids
from tests.ops.test_multi_lora import assert_exact, draw, planned

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

BF16, F16 = torch.bfloat16, torch.float16
# tokens, in, out of the slices, ranks: one token, edges of tiles and parts, several tiles of an
# adapter, ragged ranks, no rank, q, k and v, more tokens than one adapter has
CASES = [
    (1, 64, [64], [8]), (5, 72, [40], [8, 3, 16]), (16, 1096, [64, 32, 32], [8, 16, 0, 33]), (13, 264, [136], [70, 1]),
    (33, 520, [72], [5, 64, 130, 17, 9]), (64, 2056, [128, 8], [16]), (64, 136, [64], list(range(1, 40))),
]  # fmt: skip


@pytest.fixture
def simulated():
    with use_backend("cuda", simulate=True), deterministic(False):
        yield


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(simulated, monkeypatch, case, dtype):
    args = draw(*case, 1, dtype)
    plan = planned(*args[2:4])
    for seed in range(2):
        monkeypatch.setattr(cuda, "split_k_part", lambda *_, part=64 << 2 * seed: part)
        if seed:
            monkeypatch.setattr(cuda, "nearest_chip", lambda *_: SimpleNamespace(multiprocessors=1))
        with device(seed=seed) as sim:
            y = multi_lora(args[0], args[1], args[2], plan, args[5])
        assert_exact(y, args)
        assert sim.launches == 1
        assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]
    plan.raise_errors()


@pytest.mark.parametrize("arch", [90, 120])
def test_other_architectures(simulated, arch):
    args = draw(20, 264, [64, 72, 8], [8, 16, 0, 33], 1, BF16)
    with device(arch=arch):
        y = multi_lora(*args[:3], planned(*args[2:4]), args[5])
    assert_exact(y, args)


def test_without_bias_and_without_adapters(simulated):
    """Nobody waits for an h that never comes."""
    x, w, slots, slot, *_ = draw(6, 136, [64], [8, 16], 1, BF16)
    for chosen in (torch.full_like(slot, -1), slot):
        with device():
            y = multi_lora(x, w, slots, planned(slots, chosen))
        assert_exact(y, (x, w, slots, chosen, None, None))
        assert not launch.tile_tickets(y.device, 16).any()


def test_ids_that_nobody_gave(simulated):
    """They stand between those of an adapter whose slot they name."""
    x, w, slots, slot, _, bias = draw(12, 64, [24], [8, 3, 16], 1, BF16)
    slot[4:11] = 1
    ids, slot = with_wrong_ids(slots, slot)
    plan = BatchPlan.build(ids, 3)
    with device():
        y = multi_lora(x, w, slots, plan, bias)
    assert_exact(y, (x, w, slots, slot, None, bias))
    with pytest.raises(LookupError, match="BatchPlan: an id of an adapter is out of range or stale"):
        plan.raise_errors()


def test_slots_of_another_generation_in_one_slice(simulated):
    x, w, slots, slot, _, bias = draw(5, 64, [24, 16], [8, 3], 1, BF16)
    slot[:] = 1
    other = [slots[0], replace(slots[1], generation=slots[1].generation + 1)]
    with device():
        y = multi_lora(x, w, other, planned(slots, slot), bias)
    assert_exact(y[:, :24], (x, w[:24], slots[:1], slot, None, bias[:24]))
    assert_exact(y[:, 24:], (x, w[24:], slots[1:], torch.full_like(slot, -1), None, bias[24:]))


def test_parts_come_in_any_order(simulated, monkeypatch):
    """Whoever ends a tile, and whether h is there by then, the bits are the same."""
    monkeypatch.setattr(cuda, "split_k_part", lambda *_: 512)
    args = draw(20, 2056, [136, 64], [8, 24, 3, 80], 1, BF16)
    plan, seen = planned(*args[2:4]), []
    for seed in range(4):
        with device(seed=seed, resident=1 + 7 * (seed % 2)):
            seen.append(multi_lora(*args[:3], plan, args[5]))
    with device(shuffle=False):
        seen.append(multi_lora(*args[:3], plan, args[5]))
    assert all(y.equal(seen[0]) for y in seen)


def test_neighbours_do_not_matter():
    """In the deterministic mode: neither who they are nor how many there are, nor that one has an
    adapter of NaN."""
    x, w, slots, slot, _, bias = draw(40, 1096, [56], [8, 3, 16, 70], 1, BF16)
    slot[:4, 0] = torch.arange(-1, 3)

    def run(rows, slots=slots):
        with use_backend("cuda", simulate=True), deterministic(True), device():
            return multi_lora(x[rows], w, slots, planned(slots, slot[rows]), bias)

    together = run(slice(0, 40))
    for first, last in ((0, 1), (1, 2), (2, 3), (7, 16), (20, 40)):
        assert run(slice(first, last)).equal(together[first:last])
    touched = slot[:, 0] == 3
    for name in "ab":
        spoiled = getattr(slots[0], name).clone()
        spoiled[slots[0].table[3, :9].long() * 8] = torch.nan
        beside = run(slice(0, 40), [replace(slots[0], **{name: spoiled})])
        assert beside[touched].isnan().any(1).all() and beside[~touched].equal(together[~touched])


@pytest.mark.parametrize("case", [(5, 200, [64], [8, 16, 40]), (33, 2056, [72], [5, 70]), (64, 1280, [40, 24], [16])], ids=str)
def test_bits_of_triton(case):
    """bfloat16 on sm_80, in the deterministic mode: a row has them among 64 tokens and among
    more."""
    if "triton" in missing_backends():
        pytest.skip(missing_backends()["triton"])
    x, w, slots, slot, _, bias = draw(*case, 1, BF16)
    plan, found = planned(slots, slot), []
    for backend in ("cuda", "triton"):
        with use_backend(backend, simulate=True), deterministic(True), device():
            found.append(multi_lora(x, w, slots, plan, bias))
    assert torch.equal(*found)


def test_infinite_inputs_stay_in_their_row(simulated):
    """Also where ranks of a tile are none: zero times infinity is not in the sums."""
    x, w, slots, slot, _, _ = draw(9, 64, [64], [3, 16], 1, BF16)
    slot[:, 0] = 0
    x[4, 5] = torch.inf
    plain = [replace(slots[0], flags=torch.zeros(2, dtype=torch.int32), b=slots[0].b.abs(), a=slots[0].a.abs())]
    with device():
        y = multi_lora(x, w.abs(), plain, planned(slots, slot))
    assert (y[4] == torch.inf).all() and y[:4].isfinite().all() and y[5:].isfinite().all()


def test_what_is_read(simulated):
    """W once; of A and B as many bytes as there are ranks, each once; DoRA adds its gains alone."""
    ranks, n_in, n_out = [8, 16, 32, 64] * 3, 1024, 512
    slots = make_slots(n_in, [n_out], ranks, BF16, dora=(0, 1, 2))
    x, w, slot = torch.randn(12, n_in).bfloat16(), torch.randn(n_out, n_in).bfloat16(), torch.randperm(12)[:, None]
    read = {}
    for dora in (False, True):
        sites = [replace(slots[0], flags=slots[0].flags * dora)]
        with device(trace=True) as sim:
            y = multi_lora(x, w, sites, planned(sites, slot))
        read[dora], written = sim.dram()
        assert sim.launches == 1
    thin = sum(ranks) * (n_in + n_out) * 2
    inputs = thin + (x.numel() + w.numel()) * 2
    others = 12 * (8 * 2 + 4 * 4 + 64 * 4)  # ids, order, what is said of a slot, tables
    assert inputs <= read[False] <= inputs + 1.05 * others + 64
    assert 0 < read[True] - read[False] <= 1.05 * 3 * n_out * 4 and 3 * n_out * 4 <= 0.07 * thin
    blocks = n_out // 64 * -(-n_in // 256)
    assert written <= y.numel() * 2 + 12 * 64 * 8 * 4 + blocks * 64 * 16 * 4 + 64
    assert sim.counters["load_sectors"] * 32 <= 1.05 * sim.counters["load_bytes"]


def loop(overlapped="", barrier="__syncthreads()", ahead="STAGES - 1"):
    """`pipelined` written out in the place of a call, so that one of the two loops has the bug."""
    return f"""const auto planted = [&](auto&& use) {{
      pipeline_prologue<STAGES>(steps, load);
      {overlapped};
      for (int step = 0; step < steps; step++) {{
        cp_async_wait<STAGES - 2>();
        {barrier};
        pipeline_load<STAGES>(step + {ahead}, steps, load);
        use(step, step % STAGES);
      }}
    }};
    planted([&]("""


@pytest.mark.parametrize(("old", "new"), [
    ("pipelined<STAGES>(steps, load, [&](", loop(barrier="__syncwarp()")),
    ("    __syncthreads();  // the tiles and the list have been read", ""),
    ("pipelined<STAGES>(steps, load, load_h_tile, [&](", loop("load_h_tile()", barrier="__syncwarp()")),
    ("  __syncthreads();  // and the stages of the item before have been read", ""),
    ("  __syncthreads();  // the tiles have been read\n  for_each", "  for_each"),
    ("pipelined<STAGES>(steps, load, [&](", loop(ahead="STAGES")),
    ("w_parts + (a_tiles > 0)", "w_parts"),
    ("      of_tiles[mine] = 0;\n", ""),
    ("min(a_tiles * a_parts, int(p.a_blocks))", "1"),
    ("at < rank ? scale * sum : 0.f", "scale * sum"),
    ("if (token < from || token >= until) sum[e] = before[e];", ""),
    ("s.generation[at] == int(id >> 32)", "true"),
    ("if (slot < 0 && id != -1) atomicExch(p.error, 1);", ""),
    ("rows[r / PAGE] + r % PAGE) * s.a_row", "rows[0] + r) * s.a_row"),
    ("of_step[r / PAGE]) * PAGE", "of_step[0]) * PAGE"),
    ("batch.rank[token] > first", "batch.rank[token] > 0"),
    ("if (flags & 2) sum += s.more[at];", ""),
    ("int64_t(flags >> 2) * s.n", "int64_t(slot) * s.n"),
    ("y + batch.entry[token] * p.y_row", "y + token * p.y_row"),
    ("mma_m16n8k16<B>(sum, f, g_rest[2 * i], g_rest[2 * i + 1]);", ""),
    ("", ""),
])  # fmt: skip
def test_planted_bugs(planted, simulated, monkeypatch, old, new):
    """Races, waits and bounds are named, others show in the numbers."""
    monkeypatch.setattr(cuda, "split_k_part", lambda *_: 1024 if "step + STAGES," in new else 64)
    planted(cuda.SMALL, old, new, keep="multi_lora_small_bf16_16")
    monkeypatch.setattr(
        cuda, "nearest_chip", lambda *_: SimpleNamespace(multiprocessors=2)
    )  # several parts of A for each block
    ranks = [70, 75, 80, 66] if "the list" in old else [8, 3, 80, 40]
    x, w, slots, slot, _, bias = draw(14, 456, [136, 64], ranks, 1, BF16)
    slots = [replace(s, table=s.table[:, :10].contiguous()) for s in slots]  # up to 80 ranks
    ids = ids_of(slot, slots)
    ids[0, 0], slot[0, 0] = int(ids_of(torch.tensor(1), slots)) + (1 << 32), -1
    if "rank ? scale" in old:
        x[1, :] = torch.inf
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for seed in range(4):
            plan = BatchPlan.build(ids, 4)
            with device(seed=seed) as sim:
                y = multi_lora(x, w, slots, plan, bias)
            assert not launch.tile_tickets(y.device, 16).any() and bool(plan.error)
            assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]
            assert_exact(y, (x, w, slots, slot, None, bias))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda x, w, s, plan: (x, w, [replace(s[0], a=s[0].a.float(), b=s[0].b.float())], plan), "one launch reads the same"),
    (lambda x, w, s, plan: (x.repeat(17, 1), w, s, BatchPlan.build(plan.ids.repeat(17, 1), 2)), "x has 68 rows and w 1 slices"),
    (lambda x, w, s, plan: (x, w, s, BatchPlan.build(plan.ids, 2, torch.ones(4, 1))), "tokens have 1 adapters, or weights"),
    (lambda x, w, s, plan: (x, w, s, BatchPlan.build(torch.zeros(4, 0, dtype=torch.int64), 2)), "tokens have 0 adapters"),
    (lambda x, w, s, plan: (x[:, :20], w[:, :20], [replace(s[0], a=s[0].a[:, :20])], plan), "needs multiples of 8"),
    (lambda x, w, s, plan: (x, w.T.contiguous().T, s, plan), "w has strides"),
])  # fmt: skip
def test_what_one_launch_does_not_take(monkeypatch, change, reason):
    """Where Triton runs, that is left to it."""
    x, w, slots, slot, _, _ = draw(4, 24, [16], [8, 16], 1, BF16)
    x, w, slots, plan = change(x, w, slots, planned(slots, slot))
    flat = [t for s in slots for t in s.tensors]
    call = MultiLoRA(x, w, flat, *plan.tensors, None)
    assert reason in cuda.refuse_small(call)
    monkeypatch.setattr(cuda, "refuse_beside_triton", lambda why: f"Triton's kernels are there: {why}")
    monkeypatch.setattr(cuda, "refuse_cuda", lambda *_: None)
    assert cuda.refusal(call).startswith("Triton's kernels are there: ")
    assert cuda.add_refusal(MultiLoRAAdd(x, x, flat, *plan.tensors, None)).startswith("Triton's kernels are there: ")


def test_float32_is_refused():
    x, w, slots, slot, _, _ = draw(4, 24, [16], [8, 16], 1, torch.float32)
    with use_backend("cuda", simulate=True), pytest.raises(NotImplementedError, match="x is torch.float32; the kernels read"):
        multi_lora(x, w, slots, planned(slots, slot))


def test_explain():
    x, w, slots, slot, _, _ = draw(4, 24, [16], [8, 16], 1, BF16)
    with use_backend("cuda", simulate=True):
        decision = explain(multi_lora, x, w, slots, planned(slots, slot)).decisions[0]
    assert (decision.op, decision.chosen) == ("multi_lora_forward", "cuda (simulated)")
