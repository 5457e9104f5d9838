"""weight_norm, dora_gain and row_norm_squared against float64, with the rows in which the terms
cancel."""

import mmap

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from lora_kernels import lora_linear, use_backend, weight_norm
from lora_kernels.ops import dora_gain, row_norm_squared
from lora_kernels.testing import LAYOUTS, RANKS, as_layout, assert_componentwise, assert_within_rounding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SHAPES = [
    (1, 1, 1),
    (3, 5, 1),
    (31, 17, 3),
    (48, 64, 8),
    (65, 129, 17),
    (7, 2050, 5),
    (100, 33, 64),
    (9, 300, 200),
    (5, 3, 512),
]


def draw(n_out, n_in, rank, dtype, adapter_dtype=None, b_size=0.01, w_size=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kind = adapter_dtype or dtype
    a = normal(rank, n_in) * n_in**-0.5
    return (normal(n_out, n_in) * w_size).to(dtype), a.to(kind), (normal(n_out, rank) * b_size).to(kind)


def exact_norm(w, a, b, scale):
    return (w.double() + scale * (b.double() @ a.double())).square().sum(1).sqrt()


def relative_error(n, w, a, b, scale):
    truth = exact_norm(w, a, b, scale)
    return ((n.double() - truth).abs() / truth).max().item()


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_typical(backend, dtype, shape):
    for b_size, scale in ((0.01, 2.0), (0.01, -1.0), (0.0, 1.0)):
        w, a, b = draw(*shape, dtype, b_size=b_size)
        n = weight_norm(w, a, b, scale)
        assert n.dtype is torch.float32 and n.shape == w.shape[:1]
        if shape[1] > 16:
            assert relative_error(n, w, a, b, scale) <= 1e-6
        assert relative_error(n, w, a, b, scale) <= LIMIT[dtype]


@dtypes
@pytest.mark.parametrize("case", ["strong", "s=1000", "tiny", "outlier", "in the row space of a", "wide"])
def test_special_sizes(backend, dtype, case):
    w, a, b = draw(64, 1024, 16, dtype)
    scale = 1.0
    if case == "strong":
        b = b * 30
    elif case == "s=1000":
        scale = 1000.0
    elif case == "tiny":
        # float16 has no such numbers but its subnormals
        size = 1e-6 / 1024**0.5 if dtype is not torch.float16 else 1e-6
        w, _, b = draw(64, 1024, 16, dtype, b_size=size, w_size=size)
    elif case == "outlier":
        w = w.clone()
        w[:, 7] = 100
    elif case == "in the row space of a":
        w = (torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) @ a.float()).to(dtype) * 0.1
    elif case == "wide":
        w, a, b = draw(8, 11008, 8, dtype)
    assert relative_error(weight_norm(w, a, b, scale), w, a, b, scale) <= (1e-5 if case == "wide" else 2e-6)


@dtypes
@pytest.mark.parametrize("noise", [1.0, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_rows_that_cancel(backend, dtype, noise, scale):
    # W = -s·BA + noise; every second row is typical
    generator = torch.Generator().manual_seed(0)
    w, a, b = draw(65, 512, 16, dtype, torch.float32, b_size=4.0)
    noisy = -scale * (b.double() @ a.double()) + noise * torch.randn(65, 512, generator=generator, dtype=torch.float64)
    w[::2] = noisy[::2].to(dtype)
    assert relative_error(weight_norm(w, a, b, scale), w, a, b, scale) <= (1e-5 if noise >= 1e-2 else 1e-4)
    assert relative_error(weight_norm(w, a, b, scale), w, a, b, scale) <= max(LIMIT[dtype], 4e-7 / noise)


@dtypes
def test_the_condition_sweeps_over_the_guard(backend, dtype):
    # one row per condition, from 1 to 10⁶: the error must stay below the limit on both sides of the
    # switch
    w, a, b = draw(256, 256, 8, dtype, torch.float32, b_size=1.0)
    update = b.double() @ a.double()
    mix = torch.linspace(0, -1, 256, dtype=torch.float64)[:, None]
    w = (mix * update + 1e-2 * torch.randn(256, 256, generator=torch.Generator().manual_seed(2))).to(dtype)
    assert relative_error(weight_norm(w, a, b, 1.0), w, a, b, 1.0) <= LIMIT[dtype]


@dtypes
def test_zero_rows(backend, dtype):
    w, a, b = draw(12, 40, 4, dtype)
    w, b = w.clone(), b.clone()
    w[3], b[3] = 0, 0
    a, b = a.requires_grad_(), b.requires_grad_()
    n = weight_norm(w, a, b, 1.0)
    assert n[3] == 0 and (n[:3] > 0).all() and (n[4:] > 0).all()
    magnitude = torch.rand(12, requires_grad=True)
    gain = dora_gain(magnitude, n)
    assert gain[3] == 1
    gain.sum().backward()
    assert magnitude.grad[3] == 0 and magnitude.grad.isfinite().all() and (magnitude.grad[4:] > 0).all()
    assert a.grad.isfinite().all() and b.grad.isfinite().all() and (b.grad[3] == 0).all()


def test_a_row_that_cancels_to_zero(backend):
    a, b = torch.ones(2, 32), torch.ones(5, 2)
    w = torch.full((5, 32), -4.0)
    assert weight_norm(w, a, b, 2.0).equal(torch.zeros(5))


def test_dora_is_the_base_layer_at_its_start(backend):
    # b = 0 and magnitude = the norm by the same routine: the gain is 1 in every bit
    w, a, b = draw(48, 130, 8, torch.bfloat16, torch.float32, b_size=0.0)
    n = weight_norm(w, a, b, 2.0)
    gain = dora_gain(n.clone(), weight_norm(w, a, b, 2.0))
    assert gain.equal(torch.ones(48))
    x = torch.randn(5, 130).bfloat16()
    assert lora_linear(x, w, a, b, 2.0, gain=gain).equal(lora_linear(x, w, a, b, 2.0))


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.5, torch.tensor(-0.5)], ids=["number", "tensor"])
def test_gradients(backend, dtype, shape, scale):
    w, a, b = draw(*shape, dtype, torch.float32, b_size=0.3, w_size=0.3)
    scale = scale.clone().requires_grad_() if isinstance(scale, torch.Tensor) else scale
    leaves = [t.requires_grad_() for t in (a, b, scale) if isinstance(t, torch.Tensor)]
    dn = torch.randn(shape[0], generator=torch.Generator().manual_seed(4))
    grads = torch.autograd.grad(weight_norm(w, a, b, scale), leaves, dn)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(exact_norm(w, *wide, *([scale] if len(wide) == 2 else [])), wide, dn.double())
    for name, grad, wanted in zip("abs", grads, truth, strict=False):
        assert grad.dtype is torch.float32
        assert (grad.double() - wanted).norm() <= 2e-5 * wanted.norm() + 1e-6, name


@dtypes
def test_gradients_in_the_dtype_of_the_adapter(backend, dtype):
    w, a, b = draw(65, 129, 9, dtype, b_size=0.3, w_size=0.3)
    grads = torch.autograd.grad(weight_norm(w, a.requires_grad_(), b.requires_grad_(), 1.5).sum(), (a, b))
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    for grad, wanted in zip(grads, torch.autograd.grad(exact_norm(w, *wide, 1.5).sum(), wide), strict=True):
        assert grad.dtype is dtype
        if dtype is not torch.float32:
            assert_within_rounding(grad, wanted, dtype)


def test_gradients_where_rows_cancel(backend):
    w, a, b = draw(33, 64, 4, torch.float32, b_size=1.0)
    noise = 0.05 * torch.randn(33, 64, generator=torch.Generator().manual_seed(6))
    w = -(b @ a) + noise
    grads = torch.autograd.grad(weight_norm(w, a.requires_grad_(), b.requires_grad_(), 1.0).sum(), (a, b))
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    for grad, wanted in zip(grads, torch.autograd.grad(exact_norm(w, *wide, 1.0).sum(), wide), strict=True):
        assert (grad.double() - wanted).norm() <= 1e-4 * wanted.norm()


def test_the_norm_of_dora_does_not_see_the_length_of_a_row():
    # with the exact gradient, gain = m/n makes the layer blind to the length of a row: at W = 0, Σ
    # dB ⊙ B is zero
    a, b = torch.randn(4, 30, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    w = torch.zeros(20, 30, dtype=torch.float64)
    with use_backend("reference"):
        gain = dora_gain(torch.rand(20, dtype=torch.float64), weight_norm(w, a, b, 1.0))
        y = lora_linear(torch.randn(6, 30, dtype=torch.float64), w, a, b, 1.0, gain=gain)
    (db,) = torch.autograd.grad(y.sum(), b)
    assert (db * b).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_who_gets_a_gradient(backend, needs):
    w, a, b = draw(20, 30, 4, torch.float32, b_size=0.3)
    full = torch.autograd.grad(
        weight_norm(w, a.clone().requires_grad_(), (c := b.clone().requires_grad_()), 1.0).sum(), c
    )[0]
    a.requires_grad_(needs[0]), b.requires_grad_(needs[1])
    n = weight_norm(w, a, b, 1.0)
    assert n.requires_grad == any(needs)
    if any(needs):
        n.sum().backward()
    assert (a.grad is not None, b.grad is not None) == needs
    assert b.grad is None or b.grad.equal(full)


def test_gradcheck():
    w, a, b = draw(5, 7, 2, torch.float64, b_size=1.0, w_size=1.0)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with use_backend("reference"):
        inputs = (a.requires_grad_(), b.requires_grad_(), scale)
        assert torch.autograd.gradcheck(lambda a, b, s: weight_norm(w, a, b, s), inputs, nondet_tol=0.0)
        assert torch.autograd.gradcheck(
            lambda a, b, m: dora_gain(m, weight_norm(w, a, b, 1.0)), (a, b, torch.rand(5).double().requires_grad_())
        )


def test_cpu_refuses_float64_in_words():
    w, a, b = draw(5, 7, 2, torch.float64)
    with use_backend("cpu"):
        with pytest.raises(NotImplementedError, match="weight_norm_forward cannot run on cpu: .*float64"):
            weight_norm(w, a, b)
        with pytest.raises(NotImplementedError, match="row_norm_squared cannot run on cpu: .*float64"):
            row_norm_squared(w)


def test_a_saved_tensor_changed_in_place_raises(backend):
    for i in range(4):
        w, a, b = draw(5, 7, 2, torch.float32)
        n = weight_norm(w, a.requires_grad_(), b.requires_grad_(), 1.0)
        with torch.no_grad():
            (w, a, b, n)[i].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            n.sum().backward()


@dtypes
def test_row_norm_squared(backend, dtype):
    for shape in ((1, 1), (7, 2050), (65, 129)):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        found, truth = row_norm_squared(w), w.double().square().sum(1)
        assert found.dtype is torch.float32
        assert_componentwise(found, truth, truth, shape[1], torch.float32)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_no_features(backend, shape):
    n_out, n_in = shape
    w, a, b = torch.ones(shape), torch.ones(2, n_in, requires_grad=True), torch.ones(n_out, 2, requires_grad=True)
    n = weight_norm(w, a, b)
    assert row_norm_squared(w).equal(torch.zeros(n_out)) and n.equal(n.new_full((n_out,), 3 * n_in**0.5))
    n.sum().backward()
    assert a.grad.equal(torch.zeros(2, n_in)) and b.grad.equal(torch.zeros(n_out, 2))


@dtypes
def test_a_given_w_squared_changes_no_bit(backend, dtype):
    for shape in ((31, 17, 3), (65, 1290, 17)):
        w, a, b = draw(*shape, dtype)
        assert weight_norm(w, a, b, 2.0, row_norm_squared(w)).equal(weight_norm(w, a, b, 2.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["w", "a", "b", "all"])
def test_layouts(backend, layout, name):
    for dtype in DTYPES:
        tensors = dict(zip("wab", draw(33, 50, 6, dtype), strict=True))
        tensors |= {n: as_layout(tensors[n], layout) for n in ("wab" if name == "all" else name)}
        w, a, b = tensors["w"], tensors["a"].requires_grad_(), tensors["b"].requires_grad_()
        n = weight_norm(w, a, b, 1.5)
        assert relative_error(n.detach(), w, a.detach(), b.detach(), 1.5) <= 1e-6
        packed = [t.detach().contiguous() for t in (w, a, b)]
        again = weight_norm(packed[0], packed[1].requires_grad_(), packed[2].requires_grad_(), 1.5)
        dn = torch.ones(1).expand(33)
        for one, two in zip(
            torch.autograd.grad(n, (a, b), dn), torch.autograd.grad(again, packed[1:], dn), strict=True
        ):
            torch.testing.assert_close(one, two)
        torch.testing.assert_close(row_norm_squared(w), row_norm_squared(packed[0]))


def test_autocast_changes_nothing(backend):
    w, a, b = draw(65, 129, 8, torch.float32, b_size=0.3)
    a, b = a.requires_grad_(), b.requires_grad_()
    n = weight_norm(w, a, b, 1.5)
    plain = [n, row_norm_squared(w), *torch.autograd.grad(n.sum(), (a, b))]
    with torch.autocast("cpu", torch.bfloat16):
        n = weight_norm(w, a, b, 1.5)
        cast = [n, row_norm_squared(w), *torch.autograd.grad(n.sum(), (a, b))]
    assert all(one.equal(two) for one, two in zip(plain, cast, strict=True))


def test_the_number_of_threads_changes_no_bit():
    before, results = torch.get_num_threads(), []
    w, a, b = draw(65, 129, 9, torch.bfloat16)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("cpu"):
                results.append(torch.cat([weight_norm(w, a, b, 2.0), row_norm_squared(w)]))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["w", "b"])
def test_what_is_not_finite_stays_in_its_row(backend, bad, where):
    w, a, b = draw(9, 40, 4, torch.float32)
    clean = weight_norm(w, a, b, 1.0)
    (w if where == "w" else b)[4, 2] = bad
    n = weight_norm(w, a, b, 1.0)
    rest = [i for i in range(9) if i != 4]
    assert n[rest].equal(clean[rest]) and not n[4].isfinite()


def test_offsets_beyond_int32(backend):
    w, a, b = draw(3, 40, 4, torch.bfloat16)
    step = 2**30 + 5
    huge = torch.frombuffer(mmap.mmap(-1, 2 * (2 * step + 40)), dtype=torch.bfloat16).as_strided((3, 40), (step, 1))
    huge.copy_(w)
    assert weight_norm(huge, a, b).equal(weight_norm(w, a, b))
    assert row_norm_squared(huge).equal(row_norm_squared(w))


@pytest.mark.parametrize("shape", [(65, 1, 64), (65, 1, 16), (65, 3, 33)], ids=str)
def test_an_update_that_cancels_within_itself(backend, shape):
    # Σ b·a is small beside its terms: n² must not be taken from the Gram matrix then
    for seed in range(100):
        w, a, b = draw(*shape, torch.float32, torch.float32, 0.5, seed=seed)
        truth, terms = exact_norm(w, a, b, 1.0), w.double().abs() + b.double().abs() @ a.double().abs()
        allowed = LIMIT[torch.float32] * truth + 1e-6 * terms.square().sum(1).sqrt()
        assert ((weight_norm(w, a, b, 1.0).double() - truth).abs() <= allowed).all(), seed


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_anything(data):
    pick = data.draw
    n_out, n_in, rank = pick(st.integers(1, 70)), pick(st.integers(1, 300)), pick(st.sampled_from(RANKS[:6]))
    dtype, kind = pick(st.sampled_from(DTYPES)), pick(st.sampled_from(DTYPES))
    scale, b_size = pick(st.sampled_from([1.0, -0.5, 16.0])), pick(st.sampled_from([0.01, 0.5]))
    w, a, b = draw(n_out, n_in, rank, dtype, kind, b_size, seed=pick(st.integers(0, 99)))
    w, a, b = (as_layout(t, pick(st.sampled_from(list(LAYOUTS)))) for t in (w, a, b))
    for name in ("reference", "cpu"):
        with use_backend(name):
            n = weight_norm(w, a, b, scale)
            assert weight_norm(w, a, b, scale).equal(n)
            truth, terms = (
                exact_norm(w, a, b, scale),
                w.double().abs() + abs(scale) * (b.double().abs() @ a.double().abs()),
            )
            # relative to n wherever n is not the difference of much larger terms, which float32
            # inputs cannot resolve
            assert ((n.double() - truth).abs() <= LIMIT[dtype] * truth + 1e-6 * terms.square().sum(1).sqrt()).all()
