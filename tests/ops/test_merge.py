"""merged_weight against float64: one rounding, in place, any layout, what it refuses, compiled."""

import mmap

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import explain, merged_weight, use_backend
from lora_kernels.ops.merge import cpu
from lora_kernels.ops.merge.op import MergedWeight
from lora_kernels.testing import LAYOUTS, as_layout, assert_componentwise, assert_within_rounding, rms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
pairs = pytest.mark.parametrize(("dtype", "kind"), PAIRS, ids=lambda d: str(d).removeprefix("torch."))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SHAPES = [(1, 1, 1), (3, 5, 1), (31, 17, 3), (64, 64, 16), (65, 129, 17), (7, 2050, 5), (100, 33, 130), (5, 3, 512)]
OPS = torch.ops.lora_kernels


def draw(n_out, n_in, rank, dtype, kind=None, seed=0):
    """w, a, b, gain; the update is as large as w."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kind = kind or dtype
    a, b = normal(rank, n_in) * rank**-0.5, normal(n_out, rank)
    gain = (1 + 0.3 * normal(n_out)).to(torch.promote_types(dtype, torch.float32))
    return normal(n_out, n_in).to(dtype), a.to(kind), b.to(kind), gain


def exact(w, a, b, scale, gain=None):
    merged = w.double() + scale * (b.double() @ a.double())
    return merged if gain is None else gain.double()[:, None] * merged


def check(found, w, a, b, scale, gain=None):
    assert (found.dtype, found.shape) == (w.dtype, w.shape) and not found.requires_grad
    truth = exact(w, a, b, scale, gain)
    size = exact(w.abs(), a.abs(), b.abs(), abs(scale), None if gain is None else gain.abs())
    assert_componentwise(found, truth, size, a.shape[0], w.dtype)
    if w.dtype is torch.float32:
        assert rms(found.double() - truth) <= 1e-6 * rms(truth)
    elif w.dtype is not torch.float64:
        assert_within_rounding(found, truth, w.dtype, ideal_ratio=1.02)


@pairs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(backend, dtype, kind, shape):
    w, a, b, gain = draw(*shape, dtype, kind)
    for scale, with_gain in ((2.0, None), (-0.3, gain), (1, gain.to(dtype)), (0.0, None)):
        found = merged_weight(w, a, b, scale, with_gain)
        check(found, w, a, b, scale, with_gain)
        assert merged_weight(w, a, b, scale, with_gain).equal(found)


@dtypes
def test_in_place_and_elsewhere_give_the_same_bits(backend, dtype):
    w, a, b, gain = draw(65, 130, 9, dtype)
    kept, wanted = w.clone(), merged_weight(w, a, b, 0.5, gain)
    assert w.equal(kept) and wanted.data_ptr() != w.data_ptr()
    elsewhere = as_layout(torch.zeros_like(w), "sliced_rows").fill_(torch.nan)
    assert merged_weight(w, a, b, 0.5, gain, out=elsewhere) is elsewhere and elsewhere.equal(wanted) and w.equal(kept)
    for layout in ("contiguous", "transposed", "sliced_rows", "every_other"):
        place = as_layout(w.clone(), layout)
        around = None if place._base is None else place._base.isnan().sum()
        assert merged_weight(place, a, b, 0.5, gain, out=place) is place
        torch.testing.assert_close(place, wanted)
        check(place, kept, a, b, 0.5, gain)
        assert around is None or around == place._base.isnan().sum()
    view = w[:]
    merged_weight(w, a, b, 0.5, gain, out=view)
    assert w.equal(wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["w", "a", "b", "gain", "all"])
def test_layouts(backend, layout, name):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = dict(zip(("w", "a", "b", "gain"), draw(33, 50, 6, dtype), strict=True))
        tensors |= {n: as_layout(t, layout) for n, t in tensors.items() if name in (n, "all")}
        w, a, b, gain = tensors.values()
        found = merged_weight(w, a, b, 1.5, gain)
        check(found, w, a, b, 1.5, gain)
        assert found.stride() == torch.empty_like(w).stride()


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
def test_no_features(backend, shape):
    w, a, b = torch.ones(shape), torch.ones(2, shape[1]), torch.ones(shape[0], 2)
    assert merged_weight(w, a, b).shape == shape
    assert merged_weight(w, a, b, out=w) is w


def test_without_an_update_the_bits_stay(backend):
    w, a, b, _ = draw(40, 70, 4, torch.bfloat16, torch.float32)
    assert merged_weight(w, a, torch.zeros_like(b), 2.0, torch.ones(40)).equal(w)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["w", "b", "gain"])
def test_what_is_not_finite_stays_in_its_row(backend, bad, where):
    w, a, b, gain = draw(70, 40, 4, torch.float32)
    clean = merged_weight(w, a, b, 1.0, gain)
    {"w": w, "b": b, "gain": gain[:, None]}[where][4, 0] = bad
    found = merged_weight(w, a, b, 1.0, gain)
    rest = [i for i in range(70) if i != 4]
    assert found[rest].equal(clean[rest]) and not found[4].isfinite().all()


def test_offsets_beyond_int32(backend):
    w, a, b, _ = draw(3, 40, 4, torch.bfloat16)
    step = 2**30 + 5
    huge = torch.frombuffer(mmap.mmap(-1, 2 * (2 * step + 40)), dtype=torch.bfloat16).as_strided((3, 40), (step, 1))
    huge.copy_(w)
    wanted = merged_weight(w, a, b, 0.5)
    assert merged_weight(huge, a, b, 0.5).equal(wanted)
    assert merged_weight(huge, a, b, 0.5, out=huge).equal(wanted)


def test_float64():
    w, a, b, gain = draw(31, 47, 5, torch.float64)
    for name in ("reference", "cpu"):
        with use_backend(name):
            found = merged_weight(w, a, b, 0.7, gain)
            torch.testing.assert_close(found, exact(w, a, b, 0.7, gain), rtol=1e-13, atol=1e-13)
    w, a, b = w.bfloat16(), a.double(), b.double()
    check(merged_weight(w, a, b, 0.7, gain), w, a, b, 0.7, gain)


def test_autocast_and_grad_mode_change_nothing(backend):
    w, a, b, gain = draw(33, 50, 6, torch.float32)
    plain = merged_weight(w, a, b, 1.5, gain)
    with torch.autocast("cpu", torch.bfloat16):
        assert merged_weight(w, a, b, 1.5, gain).equal(plain)
    leaves = [t.clone().requires_grad_() for t in (w, a, b, gain)]
    found = merged_weight(*leaves[:3], 1.5, leaves[3])
    assert found.equal(plain) and not found.requires_grad
    merged_weight(*leaves[:3], 1.5, leaves[3], out=leaves[0])  # a leaf, as an optimizer changes it
    assert leaves[0].equal(plain) and leaves[0].is_leaf


def test_a_graph_from_before_raises(backend):
    w, a, b, _ = draw(5, 7, 2, torch.float32)
    y = torch.randn(3, 7, requires_grad=True) @ w.T
    merged_weight(w, a, b, out=w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        w, a, b, _ = draw(5, 7, 2, torch.float32)
        assert merged_weight(w, a, b, out=w) is w


def test_negated_views(backend):
    plain = draw(5, 7, 2, torch.float32)
    negated = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in plain]
    w, a, b, gain = negated
    if backend == "triton":
        with pytest.raises(NotImplementedError, match="w is a negated view"):
            merged_weight(w, a, b, 0.5, gain)
        return
    wanted = merged_weight(*plain[:3], 0.5, plain[3])
    torch.testing.assert_close(merged_weight(w, a, b, 0.5, gain), wanted)
    torch.testing.assert_close(merged_weight(w, a, b, 0.5, gain, out=w), wanted)


class Largest(TorchDispatchMode):
    """The most elements of a result that is no view."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.found = max(self.found, result.numel())
        return result


def test_the_cpu_widens_a_block_and_no_more(monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 1000)
    w, a, b, gain = draw(130, 90, 4, torch.bfloat16)
    with Largest() as seen:
        cpu.merge(MergedWeight(w, a, b, 0.5, gain), w)
    assert 0 < seen.found <= 1000
    v, a, b, gain = draw(3, 2050, 4, torch.bfloat16)  # a row is longer than a block
    check(merged_weight(v, a, b, 0.5, gain), v, a, b, 0.5, gain)


def test_explain():
    w, a, b, _ = draw(5, 7, 2, torch.float16)
    for out, name in ((None, "merged_weight"), (w, "merge_into")):
        decision = explain(merged_weight, w, a, b, out=out).decisions[0]
        assert (decision.op, decision.chosen, decision.others["reference"]) == (name, "cpu", "cpu comes first")


@pytest.mark.parametrize("with_gain", [False, True])
@dtypes
def test_opcheck(backend, dtype, with_gain):
    w, a, b, gain = draw(20, 24, 4, dtype)
    gain = gain if with_gain else None
    torch.library.opcheck(OPS.merged_weight.default, (w, a, b, 1.5, gain))
    torch.library.opcheck(OPS.merged_weight.default, (w.T.contiguous().T, a, b, 1.5, gain))
    torch.library.opcheck(OPS.merge_into.default, (w, a, b, 1.5, gain, torch.empty_like(w)))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_gives_the_bits_of_eager(backend, compiler):
    w, a, b, gain = draw(20, 24, 4, torch.bfloat16, torch.float32)
    wanted = merged_weight(w, a, b, 0.5, gain)

    def elsewhere(w, a, b, gain):
        return merged_weight(w, a, b, 0.5, gain) + 0, merged_weight(w, a, b, 0.5, gain, out=torch.empty_like(w))

    def in_place(w, a, b, gain):
        merged_weight(w, a, b, 0.5, gain, out=w)

    torch._dynamo.reset()
    kept = w.clone()
    for found in torch.compile(elsewhere, fullgraph=True, backend=compiler)(w, a, b, gain):
        assert found.equal(wanted) and w.equal(kept)
    torch.compile(in_place, fullgraph=True, backend=compiler)(w, a, b, gain)
    assert w.equal(wanted)


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


BASE = torch.ones(70)
BAD = [
    (TypeError, {"w": None}, "w must be a tensor, found NoneType"),
    (TypeError, {"gain": 1.0}, "gain must be a tensor, found float"),
    (TypeError, {"out": [1.0]}, "out must be a tensor, found list"),
    (TypeError, {"scale": "1"}, "scale must be a number or a tensor, found str"),
    (TypeError, {"scale": ones(1)}, r"scale must be a number, found a tensor; scale.item\(\) is one"),
    (ValueError, {"scale": float("inf")}, "scale must be finite, found inf"),
    (ValueError, {"scale": float("nan")}, "scale must be finite, found nan"),
    (ValueError, {"w": ones(5, 6, 1)}, r"w and a must have two dimensions, found w \[5, 6, 1\], a \[2, 6\]"),
    (ValueError, {"a": ones(0, 6), "b": ones(5, 0)}, r"a must have at least one row \(the rank\), found \[0, 6\]"),
    (ValueError, {"a": ones(2, 5)}, r"a must have shape \[2, 6\], found \[2, 5\]"),
    (ValueError, {"b": ones(2, 5)}, r"b must have shape \[5, 2\], found \[2, 5\]"),
    (ValueError, {"gain": ones(5, 1)}, r"gain must have shape \[5\], found \[5, 1\]"),
    (ValueError, {"out": ones(6, 5)}, r"out must have shape \[5, 6\], found \[6, 5\]"),
    (ValueError, {"b": ones(5, 2, device="meta")}, r"b must be on cpu \(w\), found meta"),
    (ValueError, {"out": ones(5, 6, device="meta")}, r"out must be on cpu \(w\), found meta"),
    (TypeError, {"w": ones(5, 6).int()}, "w must be float32, bfloat16, float16 or float64, found torch.int32"),
    (TypeError, {"a": ones(2, 6).half()}, "a and b must share one floating dtype, found torch.float16 and torch.float32"),
    (TypeError, {"gain": ones(5).bool()}, "gain must be floating, found torch.bool"),
    (TypeError, {"out": ones(5, 6).half()}, "out must have the dtype of w, torch.float32, found torch.float16"),
    (ValueError, {"out": ones(6).expand(5, 6)}, r"out must have its own memory for each element, found strides \[0, 1\]"),
    (
        ValueError,
        {"w": BASE[:30].view(5, 6), "out": BASE[6:36].view(5, 6)},
        "out must be w itself or lie apart from it, found memory that they share in part",
    ),
    (
        ValueError,
        {"w": BASE[:36].view(6, 6)[:5, :5], "a": ones(2, 5), "out": BASE[:36].view(6, 6).T[:5, :5]},
        "out must be w itself or lie apart from it",
    ),
    (ValueError, {"a": BASE[:12].view(2, 6), "out": BASE[6:36].view(5, 6)}, "out must lie apart from a, found"),
    (ValueError, {"gain": BASE[35:40], "out": BASE[6:36].view(5, 6)}, "out must lie apart from gain, found"),
]


@pytest.mark.parametrize(("error", "changed", "message"), BAD, ids=lambda v: None if isinstance(v, type) else str(v)[:50])
def test_bad_input(error, changed, message):
    call = dict(w=ones(5, 6), a=ones(2, 6), b=ones(5, 2)) | changed
    with pytest.raises(error, match="^merged_weight: " + message):
        merged_weight(**call)
    assert BASE.equal(torch.ones(70))


def test_parts_of_one_memory_that_lie_apart():
    whole = torch.zeros(10, 6)
    w, a, b, _ = draw(5, 6, 2, torch.float32)
    whole[:5] = w
    assert merged_weight(whole[:5], a, b, out=whole[5:]).equal(merged_weight(w, a, b)) and whole[:5].equal(w)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_anything(data):
    pick = data.draw
    sizes = pick(st.integers(1, 70)), pick(st.integers(1, 300)), pick(st.sampled_from([1, 2, 3, 8, 17, 64]))
    dtype, kind = pick(st.sampled_from(PAIRS))
    w, a, b, gain = draw(*sizes, dtype, kind, seed=pick(st.integers(0, 99)))
    w, a, b, gain = (as_layout(t, pick(st.sampled_from(list(LAYOUTS)))) for t in (w, a, b, gain))
    scale, gain = pick(st.sampled_from([1.0, -0.5, 16.0])), pick(st.sampled_from([None, gain]))
    place = pick(st.sampled_from(["new", "in place", "elsewhere"]))
    for name in ("reference", "cpu"):
        with use_backend(name):
            if place == "in place" and 0 not in w.stride():
                # clone keeps no gaps, and the base must stay for the other backend
                out = torch.empty_strided(w.shape, w.stride(), dtype=dtype).copy_(w)
                found = merged_weight(out, a, b, scale, gain, out=out)
            else:
                found = merged_weight(w, a, b, scale, gain, out=None if place == "new" else torch.empty(w.shape, dtype=dtype))
            truth = exact(w, a, b, scale, gain)
            size = exact(w.abs(), a.abs(), b.abs(), abs(scale), None if gain is None else gain.abs())
            assert_componentwise(found, truth, size, sizes[2], dtype)
