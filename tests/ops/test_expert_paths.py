"""expert_lora_linear on the ways that a processor's table, sizes and threads choose: each kernel
within one call, long segments, all numbers of threads, tensors that lie oddly."""

from dataclasses import replace

import pytest
import torch

from lora_kernels import expert_lora_linear, expert_weight_norm, lora_linear, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.testing import assert_expert_problem, make_expert_problem, run_experts
from tests.ops.far import far
from tests.ops.interpreted import interpreted

if "cpu" in missing_backends():
    pytest.skip(missing_backends()["cpu"], allow_module_level=True)

from lora_kernels.ops.cpu_gemm import choice, forced_choice

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
ALL = ("x", "a", "b", "bias", "gain")


@pytest.fixture
def on_cpu():
    with use_backend("cpu"):
        yield


@dtypes
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("flags", [{}, {"gain": True}, {"gain": True, "bias": True}, {"rank": 0, "bias": True}], ids=str)
def test_few_and_many_tokens_in_one_call(on_cpu, dtype, transposed, flags):
    """By a table whose kernels end early: one expert streams W back, others take the kernels of few
    tokens, and others a layer's own call."""
    row = replace(choice(dtype), small=3, packed_from=100, packed=0, streamed_from=1, streamed=9, small_back=2)
    sizes = [2, 0, 30, 3, 9, 0, 12]  # of each kernel the last number, too
    with forced_choice(row):
        p = make_expert_problem(sizes, 45, 39, dtype=dtype, transposed=transposed, left=3, peft=True, **flags)
        assert_expert_problem(p)


@dtypes
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_more_tokens_than_are_packed_at_once(on_cpu, dtype, transposed):
    p = make_expert_problem([3, 700, 0, 1030], 24, 20, 2, dtype, transposed=transposed, bias=True, gain=True)
    assert_expert_problem(p)


@dtypes
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_more_sums_than_are_there_at_once(on_cpu, dtype, transposed):
    """Of 16 bits the columns come in pieces; bits are those of a layer alone, whose pieces are
    others."""
    sizes, n_out = [600, 0, 610], 7200
    p = make_expert_problem(sizes, 8, n_out, 2, dtype, transposed=transposed, bias=True, gain=True)
    y = expert_lora_linear(*replace(p, gain=p.gain.requires_grad_()).arguments())
    (dgain,) = torch.autograd.grad(y, p.gain, p.dy)  # by z, which comes in pieces, too
    for e, rows in ((0, slice(0, 600)), (2, slice(600, 1210))):
        w = p.w[e].T if transposed else p.w[e]
        wanted = p.x[rows].float() @ w.float().T + 1.5 * (p.x[rows].float() @ p.a[e].float().T) @ p.b[e].float().T
        torch.testing.assert_close(y[rows], (wanted * p.gain[e].float() + p.bias[e].float()).to(dtype))
        torch.testing.assert_close(dgain[e].float(), (p.dy[rows].float() * wanted).sum(0), rtol=2e-2, atol=0.5)


@dtypes
def test_the_number_of_threads_changes_no_bit(on_cpu, dtype):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            given = [{"transposed": t, "peft": t, flag: True} for t in (False, True) for flag in ("gain", "bias")]
            problems = [make_expert_problem([5, 0, 40, 1, 0, 9], 129, 301, 9, dtype, **each) for each in given]
            results.append(list(map(run_experts, problems)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert all(one[name].equal(two[name]) for name in one)


@dtypes
def test_threads_share_the_gradients(on_cpu, dtype):
    """So much work that there is a team, which cuts segments: each thread has the columns that it
    takes, of rows by an index, too."""
    row = replace(choice(dtype), small_back=0, streamed_from=1, streamed=500, addmm_back_from=501)
    p = make_expert_problem([5, 0, 40, 1], 400, 301, 33, dtype, gain=True, bias=True)
    index = torch.arange(46).flip(0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with forced_choice(row):
                found = run_experts(p)
                leaves = p.require_grad()
                y = expert_lora_linear(p.x[index], *p.arguments()[1:], index)
                by_index = torch.autograd.grad(y, list(leaves.values()), p.dy)
            results.append(found)
            assert y.equal(found["y"]) and all(t.equal(found[n]) for n, t in zip(leaves, by_index, strict=True) if n != "x")
    finally:
        torch.set_num_threads(before)
    assert all(each[name].equal(t) for each in results for name, t in results[0].items())


def test_the_number_of_threads_changes_no_norm(on_cpu):
    before = torch.get_num_threads()
    p = make_expert_problem([0] * 5, 129, 301, 9, torch.bfloat16, peft=True)
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(expert_weight_norm(p.w, p.a, p.b, 1.5))
    finally:
        torch.set_num_threads(before)
    assert all(each.equal(found[0]) for each in found)


@pytest.mark.parametrize("name", ["bias", "gain"])
def test_vectors_that_lie_oddly(backend, name):
    """With gaps, turned, and one for all experts."""
    p = make_expert_problem([3, 0, 20, 1], 40, 24, 6, bias=True, gain=True)
    t, row = getattr(p, name), replace(choice(p.x.dtype), small_back=0, streamed_from=1, streamed=500, addmm_back_from=501)
    apart = torch.full([4, 48], torch.nan)[:, ::2].copy_(t)
    for view in (apart, t.T.contiguous().T):
        odd = replace(p, **{name: view.detach()})
        assert_expert_problem(odd)
        with forced_choice(row):
            assert_expert_problem(odd)
    one = t[:1].expand(4, -1)
    experts = [replace(e, **{name: t[0].clone()}) for e in p.experts]
    assert_expert_problem(replace(p, **{name: one.detach()}, experts=experts))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_offsets_with_gaps(backend, index):
    p = make_expert_problem([3, 0, 20, 1], 40, 24, 6, index=index)
    apart = torch.full([8], -1, dtype=index)[::2].copy_(p.offsets)
    wanted, found = run_experts(p), run_experts(replace(p, offsets=apart))
    assert all(found[key].equal(wanted[key]) for key in wanted)


@pytest.mark.parametrize("flags", [{}, {"gain": True, "bias": True}, {"rank": 0, "bias": True}], ids=str)
def test_what_belongs_to_no_expert_reaches_nothing(backend, flags):
    """NaN in rows beyond the last offset and in the weights of experts without tokens."""
    for dtype in (torch.float32, torch.bfloat16):
        p = make_expert_problem([3, 0, 20, 0], 40, 24, 6 if "rank" not in flags else 0, dtype, left=5,
                                **{k: v for k, v in flags.items() if k != "rank"})  # fmt: skip
        p.x[23:], p.dy[23:] = torch.nan, torch.nan
        for t in (p.w, p.a, p.b, p.bias, p.gain):
            if t is not None:
                t[1::2] = torch.nan
        assert all(t.isfinite().all() for t in run_experts(p).values())


def far_experts(t):
    """[3, …] with experts more than 2^31 numbers from the first to the last."""
    return far(t.reshape(3, -1)).unflatten(1, t.shape[1:])


@pytest.mark.parametrize("tool", ["cpu", "interpreter"])
@pytest.mark.parametrize("name", ["w", "a", "b", "bias", "gain", "x", "dy"])
def test_offsets_of_64_bits(tool, name):
    p = make_expert_problem([1, 1, 1], 20, 6, 3, torch.bfloat16, gain=True, bias=True)
    others = {"x": far, "dy": far}
    moved = replace(p, **{name: others.get(name, far_experts)(getattr(p, name))})
    with interpreted() if tool == "interpreter" else use_backend("cpu"):
        wanted, found = run_experts(p), run_experts(moved)
    assert all(found[key].equal(wanted[key]) for key in wanted)


@dtypes
def test_an_expert_among_others_and_alone(on_cpu, dtype):
    """Also where the others are many: the bits are those of its own layer."""
    sizes = [1, 2, 3, 5, 9, 13, 26, 50, 70]
    p = make_expert_problem(sizes, 70, 50, 6, dtype, gain=True, bias=True)
    found, first = run_experts(p), 0
    for e, size in enumerate(sizes):
        rows, first = slice(first, first + size), first + size
        x, a, b, bias, gain = (t.detach().requires_grad_() for t in (p.x[rows], p.a[e], p.b[e], p.bias[e], p.gain[e]))
        y = lora_linear(x, p.w[e], a, b, p.scale, bias, gain)
        grads = dict(zip(ALL, torch.autograd.grad(y, [x, a, b, bias, gain], p.dy[rows]), strict=True))
        assert found["y"][rows].equal(y), size
        for name, grad in grads.items():
            mine = found[name][rows] if name == "x" else found[name][e]
            torch.testing.assert_close(mine, grad, msg=lambda text, name=name, size=size: f"{name} of {size} tokens: {text}")
