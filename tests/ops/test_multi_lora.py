"""multi_lora: values, what a token's neighbours may not do, ids that nobody gave, and what does not
fit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import explain, use_backend
from lora_kernels.ops.multi_lora import BASE, BatchPlan, multi_lora, multi_lora_add_
from lora_kernels.testing import assert_componentwise, assert_within_rounding
from tests.ops.multi import exact, ids_of, make_slots

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", "cpu"]
# tokens, in, the slices of out, ranks, adapters of a token
CASES = [
    (5, 40, [24], [8, 3, 16, 1], 1), (70, 136, [64, 33, 7], [8, 24, 64, 5, 0, 12], 1), (33, 100, [48], [8, 3, 16, 1], 3),
    (300, 64, [200], [16, 9], 1), (1, 1100, [300], [70], 1), (0, 16, [8], [4], 1), (9, 16, [130, 130], [512, 2], 2),
]  # fmt: skip


def draw(tokens, n_in, outs, ranks, k, dtype, seed=0):
    slots = make_slots(n_in, outs, ranks, dtype, dora=(0, 2), biased=(1, 2), seed=seed)
    slot = torch.randint(-1, len(ranks), (tokens, k))
    weights = None if k == 1 else torch.randn(tokens, k)
    x = torch.randn(tokens, n_in).to(dtype)
    w = (torch.randn(sum(outs), n_in) * n_in**-0.5).to(dtype)
    return x, w, slots, slot, weights, torch.randn(sum(outs)).to(dtype)


def planned(slots, slot, weights=None):
    return BatchPlan.build(ids_of(slot, slots), len(slots[0].rank), weights)


def assert_exact(y, args, roundings=1):
    """Every number within the roundings of its dtype and those of float32 sums; of 16 bits as if
    rounded once."""
    x, w, slots, slot, weights, bias = args
    wanted = exact(*args)
    terms = x.shape[1] + (int(slots[0].rank.max()) + 8) * slot.shape[1]
    assert_componentwise(y, wanted, exact(*args, size=True), terms, y.dtype, roundings, name="y")
    if roundings == 1 and y.dtype is not torch.float32:
        assert_within_rounding(y, wanted, y.dtype, 1.02, name="y")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, backend):
    x, w, slots, slot, weights, bias = draw(*case, dtype)
    plan = planned(slots, slot, weights)
    for each in (None, bias):
        args = x, w, slots, slot, weights, each
        with use_backend(backend):
            assert_exact(multi_lora(x, w, slots, plan, each), args)
            base = (x.double() @ w.double().T + (0 if each is None else each.double())).to(dtype)
            added = multi_lora_add_(base, x, slots, plan, each)
        assert added is base
        assert_exact(added, args, roundings=2)  # y held W x rounded
    plan.raise_errors()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_adapter_is_lora_linear(backend):
    """Of weight 1, for all tokens: g ⊙ (W x + s·B A x) + bias."""
    from lora_kernels import lora_linear

    x, w, slots, _, _, bias = draw(40, 48, [72], [24], 1, torch.float32)
    slots = [replace(slots[0], flags=torch.ones(1, dtype=torch.int32), gain=torch.randn(1, 72))]
    at = slots[0].table[0, torch.arange(24) // 8].long() * 8 + torch.arange(24) % 8
    with use_backend(backend):
        y = multi_lora(x, w, slots, planned(slots, torch.zeros(40, 1, dtype=torch.long)), bias)
        one = lora_linear(x, w, slots[0].a[at], slots[0].b[at].T, float(slots[0].scale), bias, slots[0].gain[0])
    torch.testing.assert_close(y, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_of_more_dimensions(backend):
    x, w, slots, slot, _, bias = draw(12, 16, [24], [8, 3, 5], 1, torch.float32)
    plan = planned(slots, slot[:, 0])
    with use_backend(backend):
        y = multi_lora(x, w, slots[0], plan, bias)
        assert multi_lora(x.view(3, 4, 16), w, slots[0], plan, bias).equal(y.view(3, 4, 24))
        base = (x @ w.T + bias).view(3, 4, 24)
        torch.testing.assert_close(multi_lora_add_(base, x.view(3, 4, 16), slots[0], plan, bias), y.view(3, 4, 24))


def test_autocast():
    x, w, slots, slot, _, bias = draw(12, 16, [24], [8, 3, 5], 1, torch.float32)
    plan = planned(slots, slot)
    with torch.autocast("cpu", torch.bfloat16):
        y = multi_lora(x, w, slots, plan, bias)
    assert y.equal(multi_lora(x.bfloat16(), w.bfloat16(), slots, plan, bias)) and y.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    x, w, slots, slot, _, bias = draw(20, 48, [40], [8, 3, 16], 1, dtype)
    plan = planned(slots, slot)
    wide = replace(slots[0], a=torch.cat([slots[0].a] * 2, 1)[:, 48:], b=torch.cat([slots[0].b] * 2, 1)[:, :40])
    with use_backend("cpu"):
        y = multi_lora(x, w, slots, plan, bias)
        strided = torch.stack([x, x], 2)[:, :, 1], torch.stack([bias, bias], 1)[:, 0]
        assert multi_lora(strided[0], w, wide, plan, strided[1]).equal(y)
        base = (x @ w.T).to(dtype)
        columns = base.clone().T.contiguous().T
        assert multi_lora_add_(columns, x, wide, plan, bias).equal(multi_lora_add_(base, x, slots, plan, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_do_not_matter(backend, k):
    """The bits of a token are those it has alone, whoever is in the batch; also beside an adapter
    of NaN."""
    x, w, slots, slot, weights, bias = draw(90, 72, [56], [8, 3, 16, 40], k, torch.bfloat16)
    base = (x.float() @ w.float().T).bfloat16()

    def added(rows, slots):
        weight = None if weights is None else weights[rows]
        return multi_lora_add_(base[rows].clone(), x[rows], slots, planned(slots, slot[rows], weight), bias)

    with use_backend(backend):
        together = added(slice(0, 90), slots)
        for t in (0, 7, 44, 89):
            alone = added(slice(t, t + 1), slots)
            torch.testing.assert_close(alone[0], together[t], rtol=0, atol=0 if backend == "cpu" else 1e-2)
        a = slots[0].a.clone()
        a[slots[0].table[3, :5].long() * 8] = torch.nan
        beside = added(slice(0, 90), [replace(slots[0], a=a)])
    touched = (slot == 3).any(1)
    assert beside[touched].isnan().any(1).all()
    assert beside[~touched].equal(together[~touched])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2])
def test_ids_that_nobody_gave(backend, k):
    """They count as none, and the host can know."""
    x, w, slots, slot, _, bias = draw(12, 32, [24], [8, 3, 16], k, torch.float32)
    ids = ids_of(slot, slots)
    bad = {0: -2, 3: 1 << 40, 5: 3, 7: int(ids_of(torch.tensor(1), slots)) + (1 << 32), 8: -(1 << 62), 9: 2**31 + (5 << 32)}
    for t, each in bad.items():
        ids[t, -1], slot[t, -1] = each, -1
    for one in [*bad, None]:
        some = ids if one is None else ids_of(slot, slots).index_put((torch.tensor([one]),), ids[one])
        plan = BatchPlan.build(some, 3)
        with use_backend(backend):
            y = multi_lora(x, w, slots, plan, bias)
        assert_exact(y, (x, w, slots, slot, None, bias))
        with pytest.raises(LookupError, match="BatchPlan: an id of an adapter is out of range or stale"):
            plan.raise_errors()


def test_a_slot_that_changed_hands():
    x, w, slots, slot, _, bias = draw(12, 32, [24], [8, 3, 16], 1, torch.float32)
    plan = planned(slots, slot)
    slots[0].generation[2] += 1
    y = multi_lora(x, w, slots, plan, bias)
    assert_exact(y, (x, w, slots, slot.where(slot != 2, BASE), None, bias))
    assert plan.error


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 80), st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 9), st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(tokens, n_in, outs, ranks, k, seed, dtype):
    x, w, slots, slot, weights, bias = draw(tokens, n_in, outs, ranks, k, dtype, seed)
    plan = planned(slots, slot, weights)
    y = multi_lora(x, w, slots, plan, bias)
    assert_exact(y, (x, w, slots, slot, weights, bias))
    assert multi_lora(x, w, slots, plan, bias).equal(y)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - before if before in (1, 2) else 1)
        base = (x.float() @ w.float().T).to(dtype)
        other = multi_lora_add_(base.clone(), x, slots, plan)
    finally:
        torch.set_num_threads(before)
    assert multi_lora_add_(base, x, slots, plan).equal(other)


def test_opcheck():
    x, w, slots, slot, weights, bias = draw(6, 16, [24, 8], [8, 3], 2, torch.float32)
    plan = planned(slots, slot, weights)
    flat = [t for s in slots for t in s.tensors]
    torch.library.opcheck(torch.ops.lora_kernels.multi_lora_forward.default, (x, w, flat, *plan.tensors, bias))
    torch.library.opcheck(torch.ops.lora_kernels.multi_lora_add.default, (x @ w.T, x, flat, *plan.tensors, bias))
    compiled = torch.compile(lambda x: multi_lora(x, w, slots, plan, bias), fullgraph=True, backend="aot_eager")
    assert compiled(x).equal(multi_lora(x, w, slots, plan, bias))
    # nothing of it is cached, and the plan is made in the graph
    fresh = [replace(s) for s in slots]
    made = lambda x, ids: multi_lora(x, w, fresh, BatchPlan.build(ids, len(plan.starts) - 1, plan.weights), bias)  # noqa: E731
    assert torch.compile(made, fullgraph=True, backend="aot_eager")(x, plan.ids).equal(multi_lora(x, w, slots, plan, bias))


def test_explain():
    x, w, slots, slot, _, _ = draw(6, 16, [24], [8, 3], 1, torch.float32)
    decision = explain(multi_lora, x, w, slots, planned(slots, slot)).decisions[0]
    assert (decision.op, decision.chosen, decision.others["reference"]) == ("multi_lora_forward", "cpu", "cpu comes first")


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda a: a | {"x": 3}, TypeError, "x and w or y must be tensors"),
    (lambda a: a | {"x": a["x"].int()}, TypeError, "x must be float32, bfloat16, float16 or float64, found torch.int32"),
    (lambda a: a | {"x": a["x"][:, :8]}, ValueError, r"a of slots\[0\] must have 8 columns on cpu as x has, found \[40, 16\]"),
    (lambda a: a | {"w": a["w"].half()}, ValueError, r"w must be \[out, 16\] torch.float32 on cpu as x is"),
    (lambda a: a | {"w": a["w"][:20]}, ValueError, r"the slots' b must have 20 columns together, found \[24\]"),
    (lambda a: a | {"x": a["x"][:4]}, ValueError, "plan must be of 4 tokens on cpu, found 6"),
    (lambda a: a | {"bias": torch.ones(3)}, ValueError, r"bias must be \[24\], floating, on cpu, found \[3\]"),
    (lambda a: a | {"slots": []}, TypeError, "slots must be Slots, or several, and plan a BatchPlan"),
    (lambda a: a | {"plan": None}, TypeError, "slots must be Slots, or several, and plan a BatchPlan"),
    (lambda a: a | {"plan": BatchPlan.build(a["plan"].ids, 5)}, ValueError, r"as many slots, found 5 and \[2\]"),
])  # fmt: skip
def test_what_does_not_fit(change, error, message):
    x, w, slots, slot, _, bias = draw(6, 16, [24], [8, 3], 1, torch.float32)
    args = change({"x": x, "w": w, "slots": slots, "plan": planned(slots, slot), "bias": bias})
    with pytest.raises(error, match=f"multi_lora: .*{message}"):
        multi_lora(**args)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("scale", torch.ones(3), r"scale must be \[2\] torch.float32 on cpu without gaps, found \[3\]"),
    ("table", torch.ones(2, 4), r"table must be \[2, 4\] torch.int32 on cpu without gaps, found \[2, 4\] torch.float32"),
    ("a", torch.ones(12, 16), r"a and b must be floating matrices of whole pages of 8 rows, found a \[12, 16\]"),
    ("b", torch.ones(8, 24), r"b must be \[40, 24\]"),
    ("gain", torch.ones(2, 23), r"gain must be \[2, 24\]"),
    ("rank", torch.ones(4, dtype=torch.int32)[::2], r"rank must be \[2\] torch.int32 on cpu without gaps"),
])  # fmt: skip
def test_slots_that_do_not_fit(name, value, message):
    slots = make_slots(16, [24], [8, 3], torch.float32)
    with pytest.raises(ValueError, match=f"Slots: {message}"):
        replace(slots[0], **{name: value})


def test_what_does_not_fit_a_foreign_base():
    x, w, slots, slot, _, _ = draw(6, 16, [24], [8, 3], 1, torch.float32)
    plan = planned(slots, slot)
    for y, message in (
        (torch.ones(6, 23), r"the slots' b must have 23 columns"), (torch.ones(5, 24), r"y must be \[6, 24\] torch.float32"),
        (torch.ones(6, 24).half(), "y must be"), (torch.ones(1, 24).expand(6, 24), "its own memory for each element"),
    ):  # fmt: skip
        before = y.clone()
        with pytest.raises(ValueError, match=f"multi_lora_add_: .*{message}"):
            multi_lora_add_(y, x, slots, plan)
        assert y.equal(before)


class Other(torch.Tensor):
    """Sorted by torch, as on other devices."""


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (300,), (40, 3)])
def test_plans_of_numpy_and_of_torch(shape):
    slots = 5
    ids = torch.randint(-1, slots + 2, shape) + (torch.randint(-1, 3, shape) << 32)
    ids = torch.where(torch.rand(shape) < 0.3, -1, ids)
    for some in (ids, ids.flip(0), torch.cat([ids, ids], -1)[..., ::2]):
        one, other = BatchPlan.build(some, slots), BatchPlan.build(some.as_subclass(Other), slots)
        assert one.order.dtype is torch.int64 and one.order.equal(other.order.as_subclass(torch.Tensor))
        assert one.starts.dtype is torch.int64 and one.starts.equal(other.starts.as_subclass(torch.Tensor))


@pytest.mark.parametrize(("ids", "slots", "weights", "error", "message"), [
    ([1], 2, None, TypeError, "ids must be an int64 tensor, found list"),
    (torch.zeros(2, dtype=torch.int32), 2, None, TypeError, "found torch.int32"),
    (torch.zeros(1, 2, 3, dtype=torch.int64), 2, None, ValueError, r"ids must be \[tokens\] or \[tokens, k\]"),
    (torch.zeros(2, dtype=torch.int64), 0, None, ValueError, "slots > 0"),
    (torch.zeros(2, dtype=torch.int64), 2, torch.ones(3), ValueError, r"weights must be \[2\]"),
    (torch.zeros(2, dtype=torch.int64), 2, torch.ones(2).long(), TypeError, "weights must be a floating tensor"),
])  # fmt: skip
def test_plans_that_cannot_be(ids, slots, weights, error, message):
    with pytest.raises(error, match=f"BatchPlan: .*{message}"):
        BatchPlan.build(ids, slots, weights)
