"""The short way of few tokens on the CPU gives the bits of the long one, its errors, and is taken
where nothing else is asked."""

import math
from importlib import import_module
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import explain, lora_linear, use_backend
from lora_kernels.ops.cpu_gemm import choice

op = import_module("lora_kernels.ops.lora_linear.op")
pytestmark = pytest.mark.skipif(op.plain_forward is None, reason="the CPU extension is not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((20,), (1, 20), (3, 20), (2, 3, 20), (1, 1, 20), (2, 1, 3, 20), (0, 20), (2, 0, 20), (300, 20), (1,) * 8 + (20,))
LAYOUTS = {
    "plain": lambda t: t,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "negated": lambda t: torch._neg_view(-t),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}
WRONG = {
    "none": lambda args: args,
    "x of another width": lambda args: {**args, "x": args["x"][..., :-1]},
    "x an integer": lambda args: {**args, "x": args["x"].long()},
    "x on meta": lambda args: {**args, "x": args["x"].to("meta")},
    "w of another dtype": lambda args: {**args, "w": args["w"].double()},
    "w learns": lambda args: {**args, "w": args["w"].detach().requires_grad_()},
    "b of another rank": lambda args: {**args, "b": args["b"][:, :-1]},
    "a in three dimensions": lambda args: {**args, "a": args["a"][None]},
    "bias too long": lambda args: {**args, "bias": torch.ones(99)},
    "gain is a list": lambda args: {**args, "gain": [1.0]},
    "x is a list": lambda args: {**args, "x": [1.0]},
    "scale is infinite": lambda args: {**args, "scale": float("inf")},
    "scale is text": lambda args: {**args, "scale": "2"},
    "a tensor scale": lambda args: {**args, "scale": torch.tensor(0.5)},
    "an int for a scale": lambda args: {**args, "scale": 2},
    "an unknown semantics": lambda args: {**args, "dropout_semantics": "none"},
}


def call_of(shape=(1, 20), dtype=torch.float32, adapter=torch.float32, bias=False, gain=False, n_out=12):
    g = torch.Generator().manual_seed(sum(shape))
    made = [torch.randn(size, generator=g, dtype=torch.float64) for size in (shape, (n_out, 20), (4, 20), (n_out, 4), (n_out,))]
    args = dict(zip("xwab", [t.to(d) for t, d in zip(made, (dtype, dtype, adapter, adapter), strict=False)], strict=True))
    vector = made[-1].float()
    return args | {"scale": 0.5, "bias": vector if bias else None, "gain": vector.abs() + 1 if gain else None}


def outcome(args):
    """The output, or the error; and whether the short way gave it."""
    with mock.patch.object(op, "plain_forward", mock.Mock(side_effect=op.plain_forward)) as short:
        given = []
        short.side_effect = lambda *a, run=short.side_effect: given.append(run(*a)) or given[-1]
        try:
            y = lora_linear(**args)
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}", False
    return y, bool(given) and given[-1] is not None


def the_long_way(args):
    with mock.patch.object(op, "plain_forward", None):
        return outcome_of_long(args)


def outcome_of_long(args):
    try:
        return lora_linear(**args)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def agree(args):
    """Both ways alike, and whether the short one was taken."""
    (found, was_short), wanted = outcome(args), the_long_way(args)
    assert type(found) is type(wanted)
    if isinstance(wanted, str):
        assert found == wanted
        return was_short
    assert (found.dtype, found.shape, found.device, found.requires_grad) == (
        wanted.dtype,
        wanted.shape,
        wanted.device,
        wanted.requires_grad,
    )
    assert found.is_contiguous()
    if found.device.type == "cpu":
        assert found.isfinite().all()
        assert torch.equal(found, wanted)
    return was_short


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    adapter=st.sampled_from(DTYPES),
    bias=st.booleans(),
    gain=st.booleans(),
    layouts=st.lists(st.tuples(st.sampled_from("xwab"), st.sampled_from(list(LAYOUTS))), max_size=2),
    wrong=st.sampled_from(["none"] * len(WRONG) + list(WRONG)),
    learns=st.sampled_from(["", "", "x", "a", "bias"]),
    grad=st.booleans(),
)
@settings(max_examples=250, deadline=None)
def test_both_ways_are_alike(shape, dtype, adapter, bias, gain, layouts, wrong, learns, grad):
    args = call_of(shape, dtype, adapter, bias, gain)
    for name, layout in layouts:
        args[name] = LAYOUTS[layout](args[name])
    if learns and args[learns] is not None:
        args[learns] = args[learns].detach().requires_grad_()
    with torch.set_grad_enabled(grad):
        agree(WRONG[wrong](args))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s and len(s) < 9 and s[0] < 9])
def test_few_tokens_take_it(shape, dtype):
    few = math.prod(shape[:-1]) <= choice(dtype).small  # of this processor
    for bias in (False, True):
        with torch.no_grad():
            assert agree(call_of(shape, dtype, bias=bias, gain=bias)) == few
        assert agree(call_of(shape, dtype, bias=bias, gain=bias)) == few, "no tensor learns"


def test_many_tokens_do_not():
    most = choice(torch.float32).small
    assert agree(call_of((most, 20)))
    assert not agree(call_of((most + 1, 20)))


@pytest.mark.parametrize("name", ["x", "a", "b", "bias", "gain"])
def test_a_gradient_is_never_lost(name):
    args = call_of(bias=True, gain=True)
    args[name].requires_grad_()
    assert not agree(args)
    lora_linear(**args).sum().backward()
    assert args[name].grad is not None
    with torch.no_grad():
        assert agree(args)


@pytest.mark.parametrize("name", ["x", "w", "a", "b", "bias", "gain"])
def test_a_negated_view_is_not_read_as_it_lies(name):
    args = call_of(bias=True, gain=True)
    assert not agree({**args, name: torch._neg_view(args[name])})


class Watcher(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_looks_sees_the_op():
    args = call_of()
    assert [d.chosen for d in explain(lora_linear, **args).decisions] == ["cpu"]
    with use_backend("reference"):
        assert not outcome(args)[1]
    with Watcher() as watcher:
        assert not outcome(args)[1]
    assert "lora_kernels.lora_linear_forward.default" in watcher.seen
    with torch.autocast("cpu", torch.bfloat16):
        y, was_short = outcome(args)
        assert y.dtype is torch.bfloat16 and was_short, "the cast call itself is plain"
    with forward_ad.dual_level():
        assert not outcome(args)[1]
        x = forward_ad.make_dual(args["x"], torch.ones_like(args["x"]))
        assert forward_ad.unpack_dual(lora_linear(**{**args, "x": x})).tangent is not None
    assert torch.func.vmap(lambda x: lora_linear(**{**args, "x": x}))(args["x"][None]).shape == (1, 1, 12)


def test_inference_mode():
    args = call_of()
    with torch.inference_mode():
        y, was_short = outcome(args)
    assert was_short and y.is_inference()


def test_each_level_gives_the_same_both_ways():
    from lora_kernels import _cpu

    before = _cpu.level()
    try:
        for level in _cpu.levels():
            _cpu.set_level(level)
            with torch.no_grad():
                assert agree(call_of((1, 20), torch.bfloat16))
    finally:
        _cpu.set_level(before)
