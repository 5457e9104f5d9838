"""lora_linear: y and every gradient against float64, on every backend, over sizes, dtypes, layouts
and flags."""

import mmap
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from lora_kernels import lora_linear, use_backend
from lora_kernels.testing import (
    LAYOUTS,
    RANKS,
    SHAPES,
    TOKENS,
    as_layout,
    assert_componentwise,
    assert_no_worse_than_torch,
    assert_problem,
    assert_within_rounding,
    exact,
    make_problem,
    run,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLAGS = {
    "lora": {},
    "bias": {"bias": True},
    "dora": {"gain": True},
    "dora_bias": {"gain": True, "bias": True},
    "dropout": {"dropout": 0.3},
    "dora_dropout": {"gain": True, "dropout": 0.3},
    "dora_dropout_bias": {"gain": True, "bias": True, "dropout": 0.3},
    "dora_lora_only": {"gain": True, "bias": True, "dropout": 0.3, "dropout_semantics": "lora_only"},
    "scale_tensor": {"scale": torch.tensor(0.75), "gain": True},
    "scale_1x1x1": {"scale": torch.full((1, 1, 1), -0.5)},
    "scale_negative": {"scale": -2.0, "bias": True},
    "scale_zero": {"scale": 0.0, "gain": True},
}


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(backend, dtype, shape):
    for i, flags in enumerate(FLAGS.values()):
        if (i + SHAPES.index(shape)) % 3 == 0:
            assert_problem(make_problem(*shape, dtype=dtype, **flags))


@dtypes
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("tokens", [5, 130])
def test_flags(backend, dtype, flags, tokens):
    assert_problem(make_problem(tokens, 129, 97, 8, dtype, **FLAGS[flags]))


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_in_float64(flags):
    with use_backend("reference"):
        assert_problem(make_problem(6, 33, 29, 4, torch.float64, **FLAGS[flags]))


@dtypes
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(backend, dtype, tokens):
    assert_problem(make_problem(tokens, 67, 59, 7, dtype))
    assert_problem(make_problem(tokens, 64, 96, 16, dtype, gain=True, bias=True, dropout=0.2))


@dtypes
@pytest.mark.parametrize("rank", RANKS)
def test_ranks(backend, dtype, rank):
    for tokens in (3, 70):
        assert_problem(make_problem(tokens, 45, 39, rank, dtype, gain=True))


@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
    ids=dtype_id,
)
@pytest.mark.parametrize("tokens", [4, 90])
def test_adapters_in_another_dtype(backend, dtype, adapter_dtype, tokens):
    assert_problem(make_problem(tokens, 129, 96, 8, dtype, adapter_dtype, gain=True, bias=True))
    assert_problem(make_problem(tokens, 129, 96, 8, dtype, adapter_dtype, dropout=0.3, scale=torch.tensor(0.3)))


def test_float64_with_float32_adapters_and_scale():
    with use_backend("reference"):
        scale = torch.tensor(0.3, dtype=torch.float64)
        assert_problem(make_problem(4, 33, 29, 3, torch.float64, torch.float32, scale=scale))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
def test_bias_and_gain_in_another_dtype(backend, kind):
    problem = make_problem(6, 40, 24, 4, torch.bfloat16, bias=True, gain=True)
    changed = replace(problem, bias=problem.bias.to(kind), gain=problem.gain.to(kind))
    if backend != "reference" and kind is torch.float64:
        with pytest.raises(NotImplementedError, match=f"lora_linear_forward cannot run on {backend}: bias is torch.float64"):
            run(changed)
    else:
        assert_problem(changed)


@dtypes
@pytest.mark.parametrize("tokens", [(), (4,), (2, 3), (2, 3, 2, 5), (3, 0, 2), (2, 40)], ids=str)
def test_leading_dimensions(backend, dtype, tokens):
    assert_problem(make_problem(tokens, 40, 24, 4, dtype, gain=True, bias=True, dropout=0.2))


@pytest.mark.parametrize("tokens, n_in, n_out", [((2, 3), 0, 4), (3, 0, 4), (3, 4, 0), ((2, 0), 4, 5)])
def test_no_features(backend, tokens, n_in, n_out):
    problem = make_problem(tokens, max(n_in, 1), n_out, 2, bias=True)
    if not n_in:
        problem = replace(problem, x=problem.x[..., :0], w=problem.w[:, :0], a=problem.a[:, :0])
    results = run(problem)
    torch.testing.assert_close(results["y"], torch.zeros_like(results["y"]) + problem.bias)
    assert all(results[name].shape == getattr(problem, name).shape for name in ("x", "a", "b", "bias"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "w", "a", "b", "dy", "all", "bias and gain"])
def test_layouts(backend, layout, name):
    names = {"all": ["x", "w", "a", "b", "dy"], "bias and gain": ["bias", "gain"]}.get(name, [name])
    for i, tokens in enumerate((5, 130)):
        dtype = (torch.float32, torch.bfloat16)[i]
        problem = make_problem(tokens, 50, 38, 6, dtype, gain=True, bias=True, dropout=0.2 * i)
        changed = replace(problem, **{n: as_layout(getattr(problem, n), layout) for n in names})
        results = assert_problem(changed)
        if layout != "expanded":
            packed = run(replace(problem))
            for key in results:
                torch.testing.assert_close(results[key], packed[key], rtol=0.02, atol=0.02)


def test_a_middle_dimension_is_strided(backend):
    problem = make_problem((4, 6), 40, 24, 4, gain=True)
    turned = make_problem((6, 4), 40, 24, 4, gain=True)
    assert_problem(replace(problem, x=turned.x.transpose(0, 1), dy=turned.dy.transpose(0, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("flags", ["lora", "bias", "dora_bias", "dora_lora_only"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_decoding_rounds_once(backend, dtype, flags, tokens):
    problem = make_problem(tokens, 511, 700, 16, dtype, **FLAGS[flags])
    y, truth = lora_linear(*problem.arguments()), exact(problem)
    assert_within_rounding(y, truth.values["y"], dtype, 1.02)
    assert_componentwise(y, truth.values["y"], truth.magnitudes["y"], 511 + 16, dtype)


@dtypes
@pytest.mark.parametrize("tokens", [3, 200])
def test_no_worse_than_unfused_torch(backend, dtype, tokens):
    p = make_problem(tokens, 300, 170, 16, dtype, gain=True)
    leaves = p.require_grad()
    y = torch.nn.functional.linear(p.x, p.w) + p.scale * ((p.x @ p.a.T) @ p.b.T)
    y = (y * p.gain).to(dtype)
    unfused = {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))
    ours, truth = run(p), exact(p)
    for name in ours:
        assert_no_worse_than_torch(ours[name], truth.values[name], unfused[name], name)


@pytest.mark.parametrize("tokens", [3, 200])
def test_small_integers_are_exact(backend, tokens):
    # every product and sum fits float32, and every result bfloat16
    problem = make_problem(tokens, 31, 21, 3, torch.bfloat16, scale=1.0)
    generator = torch.Generator().manual_seed(1)
    for name in ("x", "w", "a", "b"):
        values = torch.randint(-1, 2, getattr(problem, name).shape, generator=generator)
        setattr(problem, name, values.bfloat16())
    y = lora_linear(*problem.arguments())
    assert y.double().equal(exact(problem).values["y"].bfloat16().double())
    assert y.abs().max() < 256


@dtypes
@pytest.mark.parametrize("tokens", [2, 100])
def test_autocast(backend, dtype, tokens):
    cast = torch.bfloat16
    problem = make_problem(tokens, 300, 190, 16, dtype, torch.float32, gain=True, bias=True, dropout=0.2)
    leaves = problem.require_grad()
    with torch.autocast("cpu", cast):
        y = lora_linear(*problem.arguments())
        inside = torch.autograd.grad(y, list(leaves.values()), problem.dy.to(cast), retain_graph=True)
    outside = torch.autograd.grad(y, list(leaves.values()), problem.dy.to(cast))
    assert y.dtype is cast
    rounded = replace(problem, x=problem.x.detach().to(cast), w=problem.w.to(cast), dy=problem.dy.to(cast))
    truth = exact(rounded)
    assert_within_rounding(y, truth.values["y"], cast, 1.02 if tokens == 2 and backend == "reference" else 1.5)
    for name, leaf, one, two in zip(leaves, leaves.values(), inside, outside, strict=True):
        assert one.dtype is two.dtype is leaf.dtype and one.equal(two), name
        assert_within_rounding(one, truth.values[name], cast, name=name)
    if backend == "reference":
        # float32 sums
        assert outside[2].double().sub(truth.values["b"]).norm() < 1e-4 * truth.values["b"].norm()


def test_autocast_leaves_float64_alone():
    problem = make_problem(3, 20, 20, 2, torch.float64)
    with use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        assert_problem(problem)


def test_the_autocast_policy_is_off_inside_the_op_and_on_after(backend):
    problem = make_problem(70, 64, 64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*problem.arguments())
        assert torch.is_autocast_enabled("cpu") and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    cast = replace(problem, x=problem.x.bfloat16(), w=problem.w.bfloat16())
    assert y.equal(lora_linear(*cast.arguments()))


@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_twice_gives_the_same_bits(backend, tokens):
    for dtype in DTYPES:
        one, two = (run(make_problem(tokens, 129, 97, 9, dtype, gain=True, bias=True, dropout=0.2)) for _ in range(2))
        for name in one:
            assert one[name].equal(two[name]), (dtype, name)


@pytest.mark.parametrize("tokens", [3, 90])
@dtypes
def test_a_nan_stays_in_its_row(backend, dtype, tokens):
    for flags in ("lora", "dora_dropout_bias"):
        problem = make_problem(tokens, 129, 97, 9, dtype, **FLAGS[flags])
        clean = lora_linear(*problem.arguments())
        for bad in (torch.nan, torch.inf):
            x = problem.x.clone()
            x[1, 4] = bad
            y = lora_linear(*replace(problem, x=x).arguments())
            rest = [t for t in range(tokens) if t != 1]
            assert y[rest].equal(clean[rest])
            assert not y[1].isfinite().any()


def test_inputs_are_left_alone(backend):
    problem = make_problem(6, 40, 24, 4, gain=True, bias=True, dropout=0.2)
    before = {n: getattr(problem, n).clone() for n in ("x", "w", "a", "b", "bias", "gain", "dy", "seed")}
    run(problem)
    assert all(getattr(problem, n).equal(t) for n, t in before.items())


@pytest.mark.parametrize("name", ["x", "w", "dy"])
@pytest.mark.parametrize("tokens", [3, 65])
def test_offsets_beyond_int32(backend, name, tokens):
    problem = make_problem(tokens, 40, tokens if name == "w" else 24, 4, torch.bfloat16, gain=True)
    small = getattr(problem, name)
    step = 2**31 // (small.shape[0] - 1) + 8
    # pages that nothing touches are never committed
    memory = mmap.mmap(-1, 2 * (step * small.shape[0] + small.shape[1]))
    huge = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(small.shape, (step, 1))
    huge.copy_(small)
    results, packed = run(replace(problem, **{name: huge})), run(problem)
    assert huge[-1:].storage_offset() > 2**31 - 1
    for key in results:
        assert results[key].equal(packed[key]), key


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_anything(data):
    draw = data.draw
    lead = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 20]), max_size=3)))
    sizes = [draw(st.integers(1, 70)) for _ in range(2)] + [draw(st.sampled_from(RANKS[:6]))]
    dtype, adapter_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([None, *DTYPES]))
    flags = {k: draw(st.booleans()) for k in ("bias", "gain")}
    flags["dropout"] = draw(st.sampled_from([0.0, 0.1, 0.5]))
    flags["dropout_semantics"] = draw(st.sampled_from(["peft", "lora_only"]))
    flags["scale"] = draw(st.sampled_from([1.0, -0.5, 2.0, torch.tensor(0.25)]))
    problem = make_problem(lead, *sizes, dtype, adapter_dtype, seed=draw(st.integers(0, 99)), **flags)
    layouts = {n: draw(st.sampled_from(list(LAYOUTS)[:-1])) for n in ("x", "w", "a", "b", "dy")}
    problem = replace(problem, **{n: as_layout(getattr(problem, n), layout) for n, layout in layouts.items()})
    for name in ("reference", "cpu"):
        with use_backend(name):
            assert_problem(replace(problem))
