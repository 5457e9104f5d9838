"""expert_lora_linear: y and every gradient of each expert against float64, over sizes, dtypes,
layouts and flags."""

import re
from dataclasses import replace

import pytest
import torch

from lora_kernels import expert_lora_linear, lora_linear, use_backend
from lora_kernels.testing import assert_expert_problem, make_expert_problem, run_experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLAGS = {
    "lora": {},
    "bias": {"bias": True},
    "dora": {"gain": True},
    "dora_bias": {"gain": True, "bias": True},
    "no_adapter": {"rank": 0, "bias": True},
    "no_adapter_gain": {"rank": 0, "gain": True},
    "scale_zero": {"scale": 0.0, "gain": True},
}
SIZES = {
    "one": [7],
    "empty first and last": [0, 3, 0, 1, 0],
    "ragged": [1, 2, 13, 5, 30, 3],
    "one has all": [0, 0, 41, 0],
    "none has any": [0, 0, 0],
    "many": [1, 0, 2] * 12,
}


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@dtypes
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_sizes(backend, dtype, sizes, transposed):
    for i, flags in enumerate(FLAGS.values()):
        if (i + list(SIZES).index(sizes)) % 3 == 0:
            flags = {"left": i % 2 * 4, "peft": i % 2 == 1} | flags
            assert_expert_problem(make_expert_problem(SIZES[sizes], 45, 39, dtype=dtype, transposed=transposed, **flags))


@dtypes
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_flags(backend, dtype, flags, transposed):
    sizes = [3, 0, 70, 14]
    assert_expert_problem(make_expert_problem(sizes, 129, 97, dtype=dtype, left=2, transposed=transposed, **FLAGS[flags]))


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_in_float64(flags):
    with use_backend("reference"):
        assert_expert_problem(make_expert_problem([3, 0, 4], 33, 29, dtype=torch.float64, left=1, **FLAGS[flags]))


@dtypes
@pytest.mark.parametrize("rank", [1, 3, 17, 70, 512])
@pytest.mark.parametrize("peft", [False, True], ids=["", "peft"])
def test_ranks(backend, dtype, rank, peft):
    assert_expert_problem(make_expert_problem([2, 0, 40], 50, 67, rank, dtype, gain=True, peft=peft))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_adapters_in_another_dtype(backend, dtype, transposed):
    other = torch.float32 if dtype is not torch.float32 else torch.bfloat16
    for flags in ({}, {"gain": True, "bias": True}):
        assert_expert_problem(make_expert_problem([2, 30, 0], 70, 40, 5, dtype, other, transposed=transposed, **flags))


@pytest.mark.parametrize("experts, index", [(1, torch.int64), (2, torch.int32), (256, torch.int64)], ids=str)
def test_experts(backend, experts, index):
    generator = torch.Generator().manual_seed(experts)
    sizes = torch.randint(0, 4, (experts,), generator=generator).tolist()
    assert_expert_problem(make_expert_problem(sizes, 20, 24, 2, torch.bfloat16, index=index, left=3, bias=True))


@dtypes
def test_factors_that_lie_side_by_side(backend, dtype):
    """As PEFT's do, of more experts in a row than are moved at once, and of fewer."""
    sizes = [2, 1, 3, 1, 1, 2, 1, 1, 1, 2, 0, 1, 14, 1]
    for n_in, n_out in ((20, 24), (9, 43), (9, 45)):
        assert_expert_problem(make_expert_problem(sizes, n_in, n_out, 3, dtype, gain=True, peft=True))


def test_an_expert_has_the_bits_of_its_own_layer(backend):
    """So no token sees another expert's weights, nor its neighbours'."""
    for dtype in DTYPES:
        p = make_expert_problem([3, 0, 20, 1], 70, 50, 6, dtype, gain=True, bias=True)
        y = expert_lora_linear(*p.arguments())
        for e, (first, last) in enumerate(((0, 3), (3, 3), (3, 23), (23, 24))):
            alone = lora_linear(p.x[first:last], p.w[e], p.a[e], p.b[e], p.scale, p.bias[e], p.gain[e])
            # bits follow the memory's alignment in the library, the tile's rows in Triton
            if backend != "cpu":
                torch.testing.assert_close(y[first:last], alone)
            else:
                assert y[first:last].equal(alone), (dtype, e)


def test_twice_has_the_same_bits(backend):
    for dtype in DTYPES:
        p = make_expert_problem([3, 0, 40, 1], 70, 50, 6, dtype, gain=True, bias=True, left=1)
        one, two = run_experts(p), run_experts(p)
        assert all(one[name].equal(two[name]) for name in one)


def test_weights_of_experts_without_tokens_are_not_read(backend):
    for flags in ({"bias": True}, {"bias": True, "transposed": True}, {}, {"transposed": True}):
        p = make_expert_problem([3, 0, 20, 0], 70, 50, 6, gain=True, **flags)
        wanted = run_experts(p)
        for t in (p.w, p.a, p.b, p.gain, *(() if p.bias is None else (p.bias,))):
            with torch.no_grad():
                t[1::2] = torch.nan
        found = run_experts(p)
        assert all(found[name].equal(wanted[name]) for name in wanted)


def test_rows_of_no_expert_are_not_read(backend):
    p = make_expert_problem([3, 0, 20], left=5, gain=True)
    p.x[23:], p.dy[23:] = torch.nan, torch.nan
    assert all(t.isfinite().all() for t in run_experts(p).values())


def test_no_tokens_and_no_features(backend):
    for sizes, n_in, n_out in (([0, 0], 8, 8), ([2, 1], 8, 0)):
        results = run_experts(make_expert_problem(sizes, n_in, n_out, 2, bias=True))
        assert not any(t.count_nonzero() for t in results.values())
    p = make_expert_problem([2, 1], 4, 6, 2, bias=True)
    p = replace(p, x=p.x[:, :0], w=p.w[:, :, :0], a=p.a[:, :, :0])
    results = run_experts(p)
    torch.testing.assert_close(results["y"], p.bias[[0, 0, 1]])
    torch.testing.assert_close(results["bias"], torch.stack([p.dy[:2].sum(0), p.dy[2]]))


@pytest.mark.parametrize("name", ["x", "dy", "w", "a", "b"])
def test_strides(backend, name):
    for dtype in (torch.float32, torch.bfloat16):
        p = make_expert_problem([3, 0, 20, 1], 40, 24, 6, dtype, bias=True)
        t = getattr(p, name)
        apart = torch.full([*t.shape[:-1], 2 * t.shape[-1]], torch.nan, dtype=dtype)[..., ::2].copy_(t)
        turned = t.mT.contiguous().mT
        for view in (apart, turned):
            assert_expert_problem(replace(p, **{name: view.detach()}))


def test_gradients_lie_as_their_tensors_do(backend):
    """So that those of PEFT's parameters need no copy."""
    p = make_expert_problem([3, 0, 20, 1], rank=6, peft=True, bias=True, gain=True)
    turned = {name: getattr(p, name).T.contiguous().T for name in ("bias", "gain")}
    for each in (p, replace(p, **turned)):
        results = run_experts(each)
        assert all(results[name].stride() == getattr(each, name).stride() for name in ("a", "b", "bias", "gain"))


def test_a_zero_gain_still_gets_its_gradient(backend):
    p = make_expert_problem([3, 9], gain=True)
    p.gain[1, 5] = 0
    assert_expert_problem(replace(p, experts=[replace(e, gain=p.gain[i].clone()) for i, e in enumerate(p.experts)]))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.zeros(4, 7)}, ValueError, "x must have 64 features (w is [experts, out, in] [2, 48, 64]), found [4, 7]"),
        ({"x": torch.zeros(4)}, ValueError, "x must have two dimensions and w three, found x [4], w [2, 48, 64]"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, ValueError, "offsets must have shape [2], one end for each expert"),
        ({"offsets": torch.zeros(2)}, TypeError, "offsets must be int32 or int64, found torch.float32"),
        ({"offsets": torch.tensor([3, 2])}, ValueError, "offsets must go from 0 to the 4 tokens of x and never fall, found 2"),
        ({"offsets": torch.tensor([3, 5])}, ValueError, "offsets must go from 0 to the 4 tokens of x and never fall, found 5"),
        (
            {"offsets": torch.tensor([-1, 4])},
            ValueError,
            "offsets must go from 0 to the 4 tokens of x and never fall, found -1",
        ),
        ({"w": torch.zeros(2, 48, 64).half()}, TypeError, "w must have the dtype of x, torch.float32, found torch.float16"),
        ({"w": torch.zeros(2, 48, 64, requires_grad=True)}, ValueError, "w is frozen and gets no gradient"),
        ({"a": None}, ValueError, "a and b must both be given or both be None, found a None, b [2, 48, 8]"),
        ({"a": torch.zeros(2, 8, 63)}, ValueError, "a must have shape [2, r, 64] with r of at least 1, found [2, 8, 63]"),
        ({"a": torch.zeros(8, 64)}, ValueError, "a must have shape [2, r, 64] with r of at least 1, found [8, 64]"),
        ({"b": torch.zeros(2, 48, 7)}, ValueError, "b must have shape [2, 48, 8], found [2, 48, 7]"),
        ({"b": torch.zeros(2, 48, 8).half()}, TypeError, "a and b must share one floating dtype"),
        ({"bias": torch.zeros(48)}, ValueError, "bias must have shape [2, 48], found [48]"),
        ({"gain": torch.zeros(2, 48).long()}, TypeError, "gain must be floating, found torch.int64"),
        ({"gain": torch.zeros(2, 48, device="meta")}, ValueError, "gain must be on cpu (x), found meta"),
        ({"scale": torch.zeros(2)}, ValueError, "scale must be a number or hold one, found [2]"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, found inf"),
        ({"x": torch.zeros(4, 64).long(), "w": torch.zeros(2, 48, 64).long()}, TypeError, "x must be float32"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_named(backend, change, error, words):
    if backend == "triton" and "never fall" in words:
        pytest.skip("to read the offsets would wait for the GPU")
    p = replace(make_expert_problem([3, 1]), **change)
    with pytest.raises(error, match=re.escape(f"expert_lora_linear: {words}")):
        expert_lora_linear(*p.arguments())
