"""How the C++ kernels read tensors: by torch's DLPack function, or without it by a Python one, and
never what they cannot."""

from importlib import import_module
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

_cpu = pytest.importorskip("lora_kernels._cpu", reason="the CPU kernels are not built here")

from lora_kernels import lora_linear, weight_norm  # noqa: E402
from lora_kernels.ops import NormCache, cpu_tensors  # noqa: E402


@pytest.fixture
def without_exchange(monkeypatch):
    """As with a torch that has no DLPack exchange functions."""
    monkeypatch.setattr(import_module("lora_kernels.ops.lora_linear.op"), "valid_lora_linear", None)
    _cpu.read_tensors(None, cpu_tensors.describe)
    yield
    _cpu.read_tensors(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), cpu_tensors.describe)


def test_this_torch_has_the_function():
    assert _cpu.reads_fast()


def results(dtype, tokens):
    torch.manual_seed(0)
    x = torch.randn(tokens, 2 * 70, dtype=dtype)[:, ::2].requires_grad_()
    w, bias = torch.randn(50, 70, dtype=dtype), torch.randn(50)
    a, b = torch.randn(70, 5).T.requires_grad_(), torch.randn(50, 5, requires_grad=True)
    gain = torch.rand(50, requires_grad=True)
    y = lora_linear(x, w, a, b, 0.5, bias, gain, 0.2, seed=torch.tensor(5))
    y.backward(torch.randn(tokens, 50, dtype=dtype))
    norm = weight_norm(w, a.detach(), b.detach(), 0.5)
    return [y, x.grad, a.grad, b.grad, gain.grad, norm]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [3, 90])
def test_both_ways_of_reading_give_the_same_bits(dtype, tokens, request):
    fast = results(dtype, tokens)
    request.getfixturevalue("without_exchange")
    assert not _cpu.reads_fast()
    for one, other in zip(fast, results(dtype, tokens), strict=True):
        assert torch.equal(one, other)


def test_the_norm_cache_without_the_function(without_exchange):
    w, a, b = torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2)
    cache = NormCache()
    with torch.no_grad():
        first = cache(w, a, b, 1.0)
        assert cache(w, a, b, 1.0) is first
        b[3, 1] += 1
        assert cache(w, a, b, 1.0) is not first


W, A, B, V = torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2), torch.randn(8)
UNUSUAL = {
    "a column too many": (torch.randn(3, 7), W, A, B, None, None),
    "no dimension": (torch.tensor(1.0), W, A, B, None, None),
    "w a vector": (torch.randn(3, 6), torch.randn(6), A, B, None, None),
    "w of another dtype": (torch.randn(3, 6), W.half(), A, B, None, None),
    "bfloat16 and float16": (torch.randn(3, 6).bfloat16(), W.half(), A, B, None, None),
    "integers": (torch.ones(3, 6, dtype=torch.int32), W.int(), A, B, None, None),
    "float64": (torch.randn(3, 6).double(), W.double(), A, B, None, None),
    "a of another dtype": (torch.randn(3, 6), W, A.half(), B, None, None),
    "a too narrow": (torch.randn(3, 6), W, A[:, :5], B, None, None),
    "rank 0": (torch.randn(3, 6), W, A[:0], B[:, :0], None, None),
    "b of another rank": (torch.randn(3, 6), W, A, B[:, :1], None, None),
    "b too short": (torch.randn(3, 6), W, A, B[:7], None, None),
    "bias too long": (torch.randn(3, 6), W, A, B, torch.randn(9), None),
    "bias a matrix": (torch.randn(3, 6), W, A, B, torch.randn(8, 1), None),
    "gain of integers": (torch.randn(3, 6), W, A, B, V, torch.ones(8, dtype=torch.int64)),
    "gain too short": (torch.randn(3, 6), W, A, B, V, V[:7]),
    "on meta": (torch.randn(3, 6, device="meta"), W, A, B, V, V),
    "a number": (3.0, W, A, B, V, V),
}


@pytest.mark.parametrize("args", UNUSUAL.values(), ids=UNUSUAL)
def test_the_fast_check_says_yes_to_nothing_else(args):
    assert not _cpu.valid_lora_linear(*args)


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 3), (2, 0, 3)], ids=str)
def test_the_fast_check_says_yes(lead):
    x = torch.randn(*lead, 6, requires_grad=True)
    assert _cpu.valid_lora_linear(x, W, A, B, None, None)
    assert _cpu.valid_lora_linear(x.bfloat16(), W.bfloat16(), A.half(), B.half(), V, V.bfloat16())


SIZES = st.integers(0, 3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
TENSORS = st.builds(
    lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device),
    st.lists(SIZES, max_size=3), DTYPES, st.sampled_from(["cpu", "cpu", "cpu", "meta"]),
)  # fmt: skip


@st.composite
def calls(draw):
    """x, w, a, b, bias, gain that fit each other, but for some of them."""
    n_in, n_out, rank, dtype, adapters = draw(SIZES), draw(SIZES), draw(SIZES), draw(DTYPES), draw(DTYPES)
    lead = draw(st.lists(SIZES, max_size=2))
    shapes = [((*lead, n_in), dtype), ((n_out, n_in), dtype), ((rank, n_in), adapters), ((n_out, rank), adapters)]
    args = [torch.empty(shape, dtype=of) for shape, of in shapes]
    args += [draw(st.none() | st.just(torch.empty(n_out, dtype=draw(DTYPES)))) for _ in range(2)]
    for i in draw(st.sets(st.integers(0, 5), max_size=2)):
        args[i] = draw(TENSORS)
    return args


@given(calls())
@settings(max_examples=600, deadline=None)
def test_the_fast_check_implies_the_other(args):
    """Each way of `_check` accepts what the C++ one accepts: there is one truth of what is
    valid."""
    op = import_module("lora_kernels.ops.lora_linear.op")
    x, w, a, b, bias, gain = args
    if _cpu.valid_lora_linear(*args):
        with mock.patch.object(op, "valid_lora_linear", None):
            op._check_arguments(x, w, a, b, 1.0, bias, gain, 0.0, "peft", None)


def test_kernels_refuse_what_they_cannot_read():
    sums = torch.empty(6)
    with pytest.raises(TypeError, match="float32, bfloat16 and float16"):
        _cpu.column_sums(torch.ones(3, 6, dtype=torch.int64), None, sums, 1)
    with pytest.raises(TypeError, match="column_sums: a float32 result is wanted"):
        _cpu.column_sums(torch.ones(3, 6), None, sums.half(), 1)
    with pytest.raises(ValueError, match="matrices and vectors in the memory of the CPU"):
        _cpu.column_sums(torch.ones(3, 2, 3), None, sums, 1)
    with pytest.raises((BufferError, RuntimeError, ValueError)):
        _cpu.column_sums(torch.ones(3, 6, device="meta"), None, sums, 1)


def test_a_fingerprint_is_of_plain_tensors_alone():
    class Other(torch.nn.Parameter):
        pass

    w, a, b = torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2)
    found = _cpu.fingerprint(w, a, b)
    assert found is not None and found == _cpu.fingerprint(w, torch.nn.Parameter(a), b)
    for wrong in (Other(a), torch._neg_view(a), a.to("meta"), a.to_sparse(), torch.randn(6, 2).T, a[None], [1.0], None):
        assert _cpu.fingerprint(w, wrong, b) is None
    for wrong in (Other(w), torch._neg_view(w), w[:0], w[0], w[None], w.to("meta"), 1.0):
        assert _cpu.fingerprint(wrong, a, b) is None
    with torch.inference_mode():
        without_version = w.clone()
    assert _cpu.fingerprint(without_version, a, b) is None
    assert _cpu.fingerprint(w, without_version, b) is not None
    with pytest.raises(RuntimeError, match="at most 8 tensors"):
        _cpu.fingerprint(w, *[a] * 9)


@pytest.mark.parametrize("shape", [(8, 6), (64, 64), (300, 70)])
def test_a_fingerprint_changes_with_each_bit(shape):
    w, a = torch.randn(shape), torch.randn(2, shape[1])
    first = _cpu.fingerprint(w, a)
    for tensor, place in ((a, (1, 3)), (a, (0, 0)), (a, (1, shape[1] - 1)), (w, (0, shape[1] // 128))):
        before = tensor[place].clone()
        tensor[place] += 1e-3
        assert _cpu.fingerprint(w, a) != first
        tensor[place] = before
        assert _cpu.fingerprint(w, a) == first
