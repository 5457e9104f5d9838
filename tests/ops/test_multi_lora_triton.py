"""multi_lora's Triton kernels: in the interpreter all cases, in the simulator what they read,
launch and wait for."""

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.ops.multi_lora import BatchPlan, multi_lora, multi_lora_add_
from lora_kernels.ptxsim import device
from tests.ops.interpreted import deterministic, interpreted
from tests.ops.multi import ids_of, make_slots, with_wrong_ids
from tests.ops.quantised import KINDS as QUANTISED
from tests.ops.quantised import make_quantised
from tests.ops.test_multi_lora import CASES, assert_exact, draw, planned

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops.launch import _tickets as tickets_held
from lora_kernels.ops.multi_lora import triton as backend
from lora_kernels.ops.multi_lora import triton_kernels, triton_slices, triton_small

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def simulated():
    with use_backend("triton", simulate=True), deterministic(False):
        yield


@pytest.fixture
def two_launches(monkeypatch):
    """As for a pool of large ranks."""
    monkeypatch.setattr(backend, "PROGRAMS", 0)


def both(args, plan):
    """y, and what becomes of a product that was there."""
    return multi_lora(*args[:3], plan, args[5]), add(args, plan)


def add(args, plan):
    x, w, slots, _, _, bias = args
    base = (x.double() @ w.double().T + (0 if bias is None else bias.double())).to(x.dtype)
    return multi_lora_add_(base, x, slots, plan, bias)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_interpreted(case, dtype):
    args = draw(*case, dtype)
    plan = planned(args[2], args[3], args[4])
    with deterministic(False), interpreted(seed=case[0]):
        y, added = both(args, plan)
    assert_exact(y, args)
    assert_exact(added, args, roundings=2)
    plan.raise_errors()


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("tokens", [5, 70])
def test_values_of_codes_interpreted(tokens, kind):
    """As of the numbers that they stand for, which are made first."""
    x, _, *rest = draw(tokens, 136, [64, 33], [8, 24, 5], 1, BF16)
    w = make_quantised(kind, 97, 136, 32, BF16)
    with use_backend("triton"), deterministic(False), interpreted() as names:
        y = multi_lora(x, w, *(rest[0], planned(*rest[:3]), rest[3]))
    assert_exact(y, (x, w.dequantise(), *rest))
    assert names[0] == "dequantise_kernel"


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 4, 6)], ids=str)
def test_values_of_two_launches(case, two_launches):
    """h, then y, where one launch would do for both."""
    args = draw(*case, BF16)
    with deterministic(False), interpreted(seed=case[0]) as names:
        y = multi_lora(*args[:3], planned(*args[2:5]), args[5])
    assert_exact(y, args)
    assert names == ["multi_shrink_kernel", "multi_lora_kernel"]


def test_tickets_are_there_before_h_is_launched(two_launches, monkeypatch):
    """In a CUDA graph they are filled by a launch of their own, and y is to start while h is
    made."""
    order, tickets, launch = [], backend.tile_tickets, backend.launch_triton
    monkeypatch.setattr(backend, "tile_tickets", lambda *args: order.append("tickets") or tickets(*args))
    monkeypatch.setattr(
        backend, "launch_triton", lambda kernel, *args, **kw: order.append(kernel) or launch(kernel, *args, **kw)
    )
    args = draw(5, 1100, [70, 8], [8, 24, 3], 1, BF16)
    with deterministic(False), interpreted():
        y = multi_lora(*args[:3], planned(*args[2:5]), args[5])
    assert_exact(y, args)
    assert order == ["tickets", triton_kernels.multi_shrink_kernel, triton_kernels.multi_lora_kernel]


def test_amd_has_a_launch_for_each_slice(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    args = draw(*CASES[6], BF16)
    with deterministic(False), interpreted() as names:
        y = multi_lora(*args[:3], planned(*args[2:5]), args[5])
    assert_exact(y, args)
    assert names == ["multi_shrink_kernel", "multi_lora_kernel", "multi_lora_kernel"]


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4], CASES[6], (20, 4096, [64, 32], [8, 16, 0, 33], 1)], ids=str)
def test_values_simulated(simulated, case, arch):
    if arch != 80 and case[0] == 70:
        case = (20, *case[1:])
    args = draw(*case, BF16)
    plan = planned(args[2], args[3], args[4])
    with device(arch=arch, seed=arch) as sim:
        y = multi_lora(*args[:3], plan, args[5])
        launches = sim.launches
        added = add(args, plan)
    assert_exact(y, args)
    assert_exact(added, args, roundings=2)
    few = case[0] <= (64 if case[4] == 1 else 16)
    # for all slices; h, then y where y is there already
    assert launches == (1 if few else 2) and sim.launches == launches + 2


@pytest.mark.parametrize("tokens", [5, 70])
def test_nothing_to_add(tokens):
    """No adapter for any token, and none that could be; a weight without columns. The tickets stay
    zero."""
    x, w, slots, _, _, bias = draw(tokens, 40, [24, 9], [8, 3], 1, BF16)
    plan, wanted = planned(slots, torch.zeros(tokens, 0, dtype=torch.int64)), x.double() @ w.double().T + bias.double()
    empty = [replace(s, table=s.table[:, :0], rank=torch.zeros_like(s.rank)) for s in slots]
    for some, of_plan in ((slots, plan), (empty, planned(empty, torch.randint(2, (tokens, 1))))):
        without = [replace(s, flags=torch.zeros_like(s.flags)) for s in some]
        with deterministic(False), interpreted():
            y = multi_lora(x, w, without, of_plan, bias)
            none = multi_lora(x[:, :0], w[:, :0], [replace(s, a=s.a[:, :0]) for s in without], of_plan, bias)
        torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=2**-7)
        assert none.equal(bias.expand(tokens, -1))
    assert not any(t.any() for t in tickets_held.values())


def test_slices_of_two_dtypes_are_refused():
    x, w, slots, slot, _, _ = draw(5, 40, [24, 8], [8, 3], 1, BF16)
    slots[1] = replace(slots[1], a=slots[1].a.float(), b=slots[1].b.float())
    with pytest.raises(NotImplementedError, match="a of slots\\[1\\] is torch.float32"), interpreted():
        multi_lora(x, w, slots, planned(slots, slot))


def test_float16(simulated):
    args = draw(9, 72, [40], [8, 3, 16], 1, F16)
    with device():
        y, added = both(args, planned(*args[2:4]))
    assert_exact(y, args)
    assert_exact(added, args, roundings=2)


@pytest.mark.parametrize("k", [1, 2])
def test_neighbours_do_not_matter(k):
    """Neither who they are nor how many there are, in the deterministic mode; nor that one has an
    adapter of NaN."""
    x, w, slots, slot, weights, bias = draw(40, 72, [56], [8, 3, 16, 40], k, BF16)

    def run(rows, slots):
        weight = None if weights is None else weights[rows]
        with deterministic(True), interpreted():
            return multi_lora(x[rows], w, slots, planned(slots, slot[rows], weight), bias)

    together = run(slice(0, 40), slots)
    for t in (0, 7, 39):
        assert run(slice(t, t + 1), slots)[0].equal(together[t])
    a = slots[0].a.clone()
    a[slots[0].table[3, :5].long() * 8] = torch.nan
    beside = run(slice(0, 40), [replace(slots[0], a=a)])
    touched = (slot == 3).any(1)
    assert beside[touched].isnan().any(1).all() and beside[~touched].equal(together[~touched])


@pytest.mark.parametrize("k", [1, 2])
def test_ids_that_nobody_gave(simulated, k):
    x, w, slots, slot, _, bias = draw(12, 32, [24], [8, 3, 16], k, BF16)
    ids, slot = with_wrong_ids(slots, slot)
    plan = BatchPlan.build(ids, 3)
    with device():
        y = multi_lora(x, w, slots, plan, bias)
    assert_exact(y, (x, w, slots, slot, None, bias))
    with pytest.raises(LookupError, match="BatchPlan: an id of an adapter is out of range or stale"):
        plan.raise_errors()


def test_any_order_gives_the_same_bits(simulated):
    args = draw(20, 2056, [72], [8, 24, 3, 16], 1, BF16)
    plan = planned(*args[2:4])
    results = []
    for seed in range(3):
        with device(seed=seed, resident=1 + 7 * (seed % 2)):
            results.append(both(args, plan))
    assert all(one.equal(first) for result in results for one, first in zip(result, results[0], strict=True))


def test_what_is_read(simulated):
    """Of A and B as many bytes as there are ranks, each row once; DoRA adds its gains alone."""
    ranks, n_in, n_out = [8, 16, 32, 64] * 3, 1024, 512
    slots = make_slots(n_in, [n_out], ranks, BF16, dora=(0, 1, 2))
    x, y, slot = torch.randn(12, n_in).bfloat16(), torch.randn(12, n_out).bfloat16(), torch.randperm(12)[:, None]
    read = {}
    for dora in (False, True):
        flags = torch.zeros(12, dtype=torch.int32) if not dora else slots[0].flags
        sites = [replace(slots[0], flags=flags)]
        with device(trace=True, shuffle=False) as sim:
            multi_lora_add_(y.clone(), x, sites, planned(sites, slot))
        read[dora], _ = sim.dram()
    thin = sum(ranks) * (n_in + n_out) * 2
    # h, ids, tables
    others = (x.numel() + y.numel()) * 2 + 12 * 4 * sum(ranks) + 12 * (8 * 4 + 64 * 4)
    assert thin <= read[False] <= 1.05 * (thin + others)
    assert 0 < read[True] - read[False] <= 1.05 * 3 * n_out * 4 and 3 * n_out * 4 <= 0.07 * thin


@pytest.mark.parametrize("dora", [False, True])
def test_one_launch_reads_each_number_once(simulated, dora):
    """W once, and of A and B as many bytes as there are ranks; tiles of y beside them, which other
    programs have summed up."""
    ranks, n_in, n_out = [8, 16, 32, 64] * 3, 1024, 512
    slots = make_slots(n_in, [n_out], ranks, BF16, dora=(0, 1, 2) if dora else ())
    x, w, slot = torch.randn(12, n_in).bfloat16(), torch.randn(n_out, n_in).bfloat16(), torch.randperm(12)[:, None]
    with device(trace=True, shuffle=False) as sim:
        multi_lora(x, w, slots, planned(slots, slot))
    thin, gains = sum(ranks) * (n_in + n_out) * 2, 3 * n_out * 4 if dora else 0
    others = x.numel() * 2 + 12 * 4 * sum(ranks) + 12 * (8 * 4 + 64 * 4)  # h, ids, tables
    read, _ = sim.dram()
    assert thin + w.numel() * 2 + gains <= read <= 1.05 * (thin + others + gains) + w.numel() * 2
    assert sim.launches == 1


def test_one_launch_or_two_give_the_same_bits(simulated, monkeypatch):
    """In the deterministic mode, so that a row does not depend on the largest rank of its pool."""
    args = draw(20, 2056, [72, 40], [8, 24, 3, 64], 1, BF16)
    results = []
    for programs in (backend.PROGRAMS, 0):
        monkeypatch.setattr(backend, "PROGRAMS", programs)
        with deterministic(True), device() as sim:
            results.append(multi_lora(*args[:3], planned(*args[2:4]), args[5]))
        assert sim.launches == (1 if programs else 2)
    assert results[0].equal(results[1])


def plant(old, new, monkeypatch, tmp_path):
    """The kernels of changed copies of their files instead of their own, and tickets which they
    alone count."""
    monkeypatch.setattr("lora_kernels.ops.launch._tickets", {})
    files = (triton_slices, triton_kernels, triton_small)  # each of which takes from those before
    texts = [Path(module.__file__).read_text() for module in files]
    assert not old or sum(text.count(old) for text in texts) == 1, old
    for module, text in zip(files, texts, strict=True):
        for other in files:
            text = text.replace(f"from {other.__name__} import", f"from planted.{other.__name__} import")
        # for the sake of time
        text = text.replace("PATIENCE = tl.constexpr(64)", "PATIENCE = tl.constexpr(2)")
        copy = tmp_path / f"{module.__name__}.py"
        copy.write_text(text.replace(old, new) if old else text)
        spec = importlib.util.spec_from_file_location(f"planted.{module.__name__}", copy)
        changed = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, changed)
        spec.loader.exec_module(changed)
        for name in ("multi_lora_kernel", "multi_shrink_kernel", "multi_small_kernel"):
            if hasattr(changed, name):
                monkeypatch.setattr(backend, name, getattr(changed, name))


@pytest.mark.parametrize(("old", "new"), [
    ("mask & (id != -1) & (known == 0)", "mask & (id != -1) & (id < 0)"),
    ("current == id >> 32", "current == current"),
    ("(id >= 0) & (slot < count)", "(id >= 0)"),
    ("accumulator = tl.where(row_mask[:, None], gains * accumulator, accumulator)", "accumulator = gains * accumulator"),
    ("RANKS + ranks[None, :], row_mask[:, None] & (ranks", "RANKS + ranks[None, :], (entry >= 0)[:, None] & (ranks"),
    ("page * PAGE + ranks % PAGE", "page * PAGE"),
    ("(number - (ends - blocks)) * BM", "number * BM"),
    ("entry // EACH", "entry"),
    ("", ""),
])  # fmt: skip
@pytest.mark.parametrize("launches", [1, 2])
def test_planted_bugs(old, new, launches, monkeypatch, tmp_path):
    """In the interpreter, from a changed copy of the file."""
    plant(old, new, monkeypatch, tmp_path)
    monkeypatch.setattr(backend, "PROGRAMS", backend.PROGRAMS if launches == 1 else 0)
    k = 2 if "EACH" in old else 1
    x, w, slots, slot, weights, bias = draw(40, 48, [56], [8, 3, 16, 40], k, BF16)
    ids = ids_of(slot, slots)
    if k == 1:
        # stale, out of range
        ids[0, 0], ids[1, 0] = int(ids_of(torch.tensor(1), slots)) + (1 << 32), 4 + (9 << 32)
        slot[:2, 0] = -1
    plan = BatchPlan.build(ids, 4, weights)
    with pytest.raises(AssertionError) if old else nullcontext():
        with deterministic(False), interpreted():
            y = multi_lora(x, w, slots, plan, bias)
        assert_exact(y, (x, w, slots, slot, weights, bias))
        assert bool(plan.error) == (k == 1)


@pytest.mark.parametrize(("old", "new"), [
    pytest.param("parts * m * EACH * RANKS, m * EACH,", "parts * m * EACH * RANKS, m,", marks=pytest.mark.slow),
    pytest.param("batch.h + tl.cast(g, tl.int64) * parts * m * EACH * RANKS, m", "batch.h, m", marks=pytest.mark.slow),
    pytest.param("h = batch.h + tl.cast(g, tl.int64) * batch.parts * m * EACH * RANKS", "h = batch.h", marks=pytest.mark.slow),
    pytest.param("number // (BLOCKS * parts), number % BLOCKS,", "number // (BLOCKS * parts), 0,", marks=pytest.mark.slow),
    ("number // BLOCKS % parts", "0"),
    pytest.param("part * SPLIT, tl.minimum(batch.k, (part + 1)", "0, tl.minimum(batch.k, (part + 1)", marks=pytest.mark.slow),
    pytest.param(
        "if tl.atomic_add(ticket + g, 1, sem=\"acq_rel\") == ahead - 1", "if tl.atomic_add(ticket + g, 1) == ahead",
        marks=pytest.mark.slow,
    ),
    pytest.param("tl.atomic_xchg(ticket + g, 0, sem=\"relaxed\")", "pass", marks=pytest.mark.slow),
    pytest.param("mask & (mine >= OF_W)", "mask & (mine >= OF_H)", marks=pytest.mark.slow),
    ("mask & (mine >= OF_W)", "mask"),
    ("tl.store(ticket + SLICES + tiles, MINE, mask=mine)", "pass"),
    pytest.param(
        "tiles < tiles_before(slices, g + 1, SLICES, BN)", "tiles < tiles_before(slices, g + 1, SLICES, BN) - 1",
        marks=pytest.mark.slow,
    ),
    pytest.param("tiles = tiles_before(slices, g, SLICES, BN) + tl", "tiles = tl", marks=pytest.mark.slow),
    pytest.param("tl.where(mine, tiles + 1, 0)", "tl.where(mine, tiles, 0)", marks=pytest.mark.slow),
    pytest.param("(program - SLICES * ahead) % SPLITS", "0", marks=pytest.mark.slow),
    pytest.param("g, start = i + 1, before", "g = i + 1", marks=pytest.mark.slow),
    pytest.param("first += slices[i].n", "first = slices[i].n", marks=pytest.mark.slow),
    ("found = numbers_of(slices[i])", "found = numbers_of(slices[1])"),
    ("tl.minimum(k, (split + 1)", "tl.minimum(k, (split + 2)"),
    ("% OF_W == SPLITS - 1:", "% OF_W == SPLITS - 2:"),
    pytest.param("% OF_W == SPLITS - 1:", "== SPLITS - 1:", marks=pytest.mark.slow),
    ("OF_W, sem=\"acq_rel\") >= OF_H:", "OF_W, sem=\"acq_rel\") >= 0:"),
    pytest.param("OF_W, sem=\"acq_rel\") >= OF_H:", "OF_W, sem=\"acq_rel\") > OF_H + OF_W:", marks=pytest.mark.slow),
    ("tl.atomic_xchg(ticket + SLICES + tile, 0, sem=\"relaxed\")", "pass"),
    pytest.param("tl.range(0, SPLITS, num_stages=1)", "tl.range(0, SPLITS - 1, num_stages=1)", marks=pytest.mark.slow),
    pytest.param("if column == 0:", "if column == 9:", marks=pytest.mark.slow),
    ("", ""),
])  # fmt: skip
def test_planted_bugs_of_one_launch(old, new, monkeypatch, tmp_path):
    """Where slices, tiles and parts are several, for one adapter a token and two; first with the
    programs of h before the others. A run finds the tickets that the one before left."""
    plant(old, new, monkeypatch, tmp_path)
    cases = [draw(5, 1100, [70, 8, 9], [8, 24, 3], k, BF16) for k in (1, 2)]
    with pytest.raises(AssertionError) if old else nullcontext(), deterministic(False):
        for seed in (None, 1):
            for x, w, slots, slot, weights, bias in cases:
                ids = ids_of(slot, slots)
                ids[0, 0], slot[0, 0] = 3 + (9 << 32), -1  # out of range
                plan = BatchPlan.build(ids, 3, weights)
                with interpreted(seed=seed) as names:
                    y = multi_lora(x, w, slots, plan, bias)
                assert_exact(y, (x, w, slots, slot, weights, bias))
                assert plan.error and names == ["multi_small_kernel"]
