"""lora_linear_group: values and gradients against float64 and against the single op, over sizes,
dtypes, layouts and flags."""

from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from lora_kernels import Member, lora_linear, lora_linear_group, use_backend
from lora_kernels.testing import (
    LAYOUTS,
    as_layout,
    assert_group,
    exact,
    make_group,
    member,
    rms,
    run,
    run_group,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = [{"n_out": 48, "rank": 8}, {"n_out": 20, "rank": 3}, {"n_out": 33, "rank": 17}]
GROUPS = {
    "lora": PLAIN,
    "one": [{"n_out": 39, "rank": 5, "gain": True, "bias": True, "dropout": 0.3}],
    "two": [{"n_out": 96, "bias": True}, {"n_out": 96, "bias": True}],
    "bias": [m | {"bias": i != 1} for i, m in enumerate(PLAIN)],
    "dora": [m | {"gain": True} for m in PLAIN],
    "mixed": [PLAIN[0] | {"gain": True, "bias": True}, PLAIN[1], PLAIN[2] | {"gain": True, "scale": -0.5}],
    "dropout": [m | {"dropout": 0.1 + 0.2 * i} for i, m in enumerate(PLAIN)],
    "one drops": [PLAIN[0], PLAIN[1] | {"dropout": 0.5, "gain": True}, PLAIN[2] | {"gain": True}],
    "mixed_dropout": [
        PLAIN[0] | {"gain": True, "bias": True, "dropout": 0.3},
        PLAIN[1] | {"bias": True, "dropout": 0.3},
        PLAIN[2] | {"gain": True, "dropout": 0.3},
    ],
}
FLAGS = [(name, "peft") for name in GROUPS] + [("mixed_dropout", "lora_only"), ("one", "lora_only")]


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@dtypes
@pytest.mark.parametrize("name, semantics", FLAGS)
@pytest.mark.parametrize("tokens", [5, 130])
def test_flags(backend, dtype, name, semantics, tokens):
    assert_group(make_group(GROUPS[name], tokens, 129, dtype, dropout_semantics=semantics))


@pytest.mark.parametrize("name, semantics", FLAGS)
def test_flags_in_float64(name, semantics):
    with use_backend("reference"):
        assert_group(make_group(GROUPS[name], 6, 33, torch.float64, dropout_semantics=semantics))


@dtypes
@pytest.mark.parametrize("tokens", [0, 1, 2, 33, 64, 65, (), (2, 3), (3, 0, 2), (2, 40)], ids=str)
def test_tokens(backend, dtype, tokens):
    assert_group(make_group(GROUPS["mixed_dropout"], tokens, 67, dtype))


@pytest.mark.parametrize(
    "dtype, adapters",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=dtype_id,
)
@pytest.mark.parametrize("tokens", [4, 90])
def test_adapters_in_another_dtype(backend, dtype, adapters, tokens):
    assert_group(make_group(GROUPS["mixed"], tokens, 129, dtype, adapter_dtype=adapters))
    own = [PLAIN[0] | {"adapter_dtype": adapters}, PLAIN[1]]
    assert_group(make_group(own, tokens, 129, dtype))


@pytest.mark.parametrize("tokens", [3, 80])
def test_tensor_scales(backend, tokens):
    members = [PLAIN[0] | {"scale": torch.tensor(0.75)}, PLAIN[1], PLAIN[2] | {"scale": torch.full((1, 1), -0.5), "gain": True}]
    results = assert_group(make_group(members, tokens, 50, torch.bfloat16))
    assert ["scale" in result for result in results] == [True, False, True]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "w", "a", "b", "dy", "all"])
def test_layouts(backend, layout, name):
    for tokens, dtype in ((5, torch.float32), (130, torch.bfloat16)):
        problems = make_group(GROUPS["mixed"], tokens, 50, dtype)
        x = as_layout(problems[0].x, layout if name in ("x", "all") else "contiguous")
        names = ["w", "a", "b", "dy"] if name == "all" else [name] if name != "x" else []
        assert_group([replace(p, x=x, **{n: as_layout(getattr(p, n), layout) for n in names}) for p in problems])


@dtypes
@pytest.mark.parametrize("name, semantics", FLAGS)
def test_bits_of_the_single_op(backend, dtype, name, semantics):
    if backend == "triton":
        pytest.skip("its kernels of the group sum in another order")
    for tokens in (3, 90):
        problems = make_group(GROUPS[name], tokens, 129, dtype, dropout_semantics=semantics)
        for result, problem in zip(run_group(problems), problems, strict=True):
            alone = run(problem)
            assert [n for n in alone if n != "x" and not result[n].equal(alone[n])] == []
            with torch.no_grad():
                assert lora_linear_group(problem.x, [member(problem)], problem.dropout, semantics)[0].equal(alone["y"])


def test_the_input_gradient_is_rounded_once(backend):
    # the sum of rounded gradients has about √3 times the error
    problems = make_group([{"n_out": 96, "rank": 8}] * 3, 200, 160, torch.bfloat16)
    truth = sum(exact(p).values["x"] for p in problems)
    error = rms(run_group(problems)[0]["x"].double() - truth)
    assert error <= 1.02 * rms(truth.bfloat16().double() - truth)
    assert rms(sum(run(p)["x"] for p in problems).double() - truth) > 1.3 * error


@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_twice_gives_the_same_bits(backend, tokens):
    for dtype in DTYPES:
        one, two = (run_group(make_group(GROUPS["mixed_dropout"], tokens, 129, dtype)) for _ in range(2))
        assert all(r[name].equal(s[name]) for r, s in zip(one, two, strict=True) for name in r)


def test_inputs_are_left_alone(backend):
    problems = make_group(GROUPS["mixed_dropout"], 6, 40)
    before = [{n: t.clone() for n, t in vars(p).items() if isinstance(t, torch.Tensor)} for p in problems]
    run_group(problems)
    assert all(getattr(p, n).equal(t) for p, kept in zip(problems, before, strict=True) for n, t in kept.items())


@pytest.mark.parametrize("tokens", [2, 100])
def test_autocast(backend, tokens):
    problems = make_group(GROUPS["mixed_dropout"], tokens, 130, adapter_dtype=torch.float32)
    x = problems[0].x.bfloat16()
    cast = [replace(p, x=x, w=p.w.bfloat16(), dy=p.dy.bfloat16()) for p in problems]
    wanted = run_group(cast)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_group([replace(p, dy=c.dy) for p, c in zip(problems, cast, strict=True)])
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    for one, two in zip(found, wanted, strict=True):
        assert one["x"].dtype is torch.float32
        assert all(one[name].equal(two[name].to(one[name].dtype)) for name in one)


def test_members_draw_masks_of_their_own_in_order(backend):
    problems = [replace(p, seed=None) for p in make_group([PLAIN[0] | {"dropout": 0.4}] * 2, 9, 64)]
    torch.manual_seed(7)
    alone = [lora_linear(*p.arguments()) for p in problems]
    torch.manual_seed(7)
    one, two = lora_linear_group(problems[0].x, [member(p) for p in problems], 0.4)
    assert one.equal(alone[0]) and two.equal(alone[1])
    first = problems[0]
    same = lora_linear_group(first.x, [member(first)] * 2, (0.4, 0.4))
    assert not same[0].equal(same[1])
    with torch.no_grad():
        state = torch.random.get_rng_state()
        lora_linear_group(first.x, [member(first)] * 2)
    assert state.equal(torch.random.get_rng_state())  # without dropout nothing is drawn


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    "error, changed, message",
    [
        (ValueError, {"w": ones(5, 7)}, r"x must have 7 features \(w is \[5, 7\]\), found \[4, 6\]"),
        (ValueError, {"a": ones(2, 5)}, r"a must have shape \[2, 6\], found \[2, 5\]"),
        (ValueError, {"b": ones(5, 3)}, r"b must have shape \[5, 2\], found \[5, 3\]"),
        (ValueError, {"w": ones(5, 6).requires_grad_()}, "w is frozen"),
        (TypeError, {"w": ones(5, 6).half()}, "w must have the dtype of x, torch.float32, found torch.float16"),
        (ValueError, {"w": ones(5, 6).to("meta")}, r"all tensors must be on cpu \(x\), found w meta"),
        (ValueError, {"bias": ones(4)}, r"bias must have shape \[5\], found \[4\]"),
        (TypeError, {"gain": ones(5).int()}, "gain must be floating"),
        (ValueError, {"scale": float("nan")}, "scale must be finite"),
        (TypeError, {"scale": "2"}, "scale must be a number or a tensor, found str"),
        (ValueError, {"seed": torch.tensor(1.0)}, "seed must be one int64"),
        (TypeError, {"a": None}, "a must be a tensor, found NoneType"),
    ],
    ids=str,
)
def test_a_wrong_member_is_named(error, changed, message):
    good = Member(ones(5, 6), ones(2, 6), ones(5, 2))
    for at in (0, 2):
        members = [good, good, good]
        members[at] = good._replace(**changed)
        with pytest.raises(error, match=f"^lora_linear_group: member {at}: {message}"):
            lora_linear_group(ones(4, 6), members)


def test_wrong_groups():
    good = Member(ones(5, 6), ones(2, 6), ones(5, 2))
    with pytest.raises(ValueError, match="^lora_linear_group: there must be at least one member, found none"):
        lora_linear_group(ones(4, 6), [])
    with pytest.raises(TypeError, match="^lora_linear_group: member 1 must be a Member, found tuple"):
        lora_linear_group(ones(4, 6), [good, tuple(good)])
    with pytest.raises(ValueError, match="^lora_linear_group: dropout must be a number or one for each of 2 members, found 3"):
        lora_linear_group(ones(4, 6), [good, good], [0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match=r"^lora_linear_group: member 1: dropout must be in \[0, 1\), found 1.0"):
        lora_linear_group(ones(4, 6), [good, good], [0.1, 1.0])
    with pytest.raises(ValueError, match="^lora_linear_group: member 0: dropout_semantics must be"):
        lora_linear_group(ones(4, 6), [good], 0.1, "tune")
    with pytest.raises(TypeError, match="^lora_linear_group: member 0: x must be a tensor, found list"):
        lora_linear_group([1.0], [good])


def test_cpu_refuses_in_words():
    x, double = ones(3, 6), ones(2, 6, dtype=torch.float64)
    members = [Member(ones(5, 6), ones(2, 6), ones(5, 2)), Member(ones(5, 6), double, ones(5, 2, dtype=torch.float64))]
    message = "lora_linear_group_forward cannot run on cpu: member 1: a is torch.float64"
    with use_backend("cpu"), pytest.raises(NotImplementedError, match=message):
        lora_linear_group(x, members)
    negated = torch._neg_view(ones(5, 6))
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="member 0: w is a negated view"):
        lora_linear_group(x, [members[0]._replace(w=negated)])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(data=st.data())
def test_anything(data):
    draw = data.draw
    lead = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 7, 20, 66]), max_size=2)))
    dtype = draw(st.sampled_from(DTYPES))
    members = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "n_out": st.integers(1, 70),
                    "rank": st.sampled_from([1, 3, 8, 17, 64]),
                    "bias": st.booleans(),
                    "gain": st.booleans(),
                    "dropout": st.sampled_from([0.0, 0.1, 0.5]),
                    "scale": st.sampled_from([1.0, -0.5, 2.0]),
                    "adapter_dtype": st.sampled_from([None, *DTYPES]),
                }
            ),
            min_size=1,
            max_size=4,
        )
    )
    semantics = draw(st.sampled_from(["peft", "lora_only"]))
    problems = make_group(members, lead, draw(st.integers(1, 70)), dtype, draw(st.integers(0, 99)), dropout_semantics=semantics)
    for name in ("reference", "cpu"):
        with use_backend(name):
            assert_group([replace(p) for p in problems])
