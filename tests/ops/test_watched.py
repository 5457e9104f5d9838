"""Calls that something watches, and tensors that are not what they seem: the same values, or an
error, never other ones."""

from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lora_kernels import lora_linear, weight_norm
from lora_kernels.ops import FallbackWarning, NormCache


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(80, 64), torch.randn(48, 64), torch.randn(4, 64), torch.randn(48, 4)


def gradients(x, w, a, b, call):
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    call(lambda x: lora_linear(x, w, leaves[1], leaves[2], 1.0), leaves[0]).square().sum().backward()
    return [t.grad for t in leaves]


def test_selective_checkpointing(tensors):
    """It keeps results of mm for the backward; in between no kernel may have changed them."""
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    plain = gradients(*tensors, lambda f, x: f(x))
    found = gradients(*tensors, lambda f, x: checkpoint(f, x, use_reentrant=False, context_fn=contexts))
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one, other)


def test_traces_hold_the_op(tensors):
    x, w, a, b = tensors
    graph = make_fx(lambda x: lora_linear(x, w, a, b, 1.0))(x)
    assert "lora_kernels.lora_linear_forward" in graph.code
    assert torch.equal(graph(x), lora_linear(x, w, a, b, 1.0))
    assert torch.equal(torch.func.functionalize(lambda x: lora_linear(x, w, a, b, 1.0))(x), lora_linear(x, w, a, b, 1.0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert lora_linear(x, w, a, b, 1.0).shape == (80, 48)


class Wrapper(torch.Tensor):
    """A tensor that holds another one and has no memory of its own, as quantised weights do."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(t.held if isinstance(t, cls) else t for t in args), **(kwargs or {}))


@pytest.mark.parametrize("which", range(4))
def test_wrapped_tensors(tensors, which):
    wanted = lora_linear(*tensors, 1.0)
    wrapped = [Wrapper(t) if i == which else t for i, t in enumerate(tensors)]
    assert torch.equal(lora_linear(*wrapped, 1.0), wanted)


@pytest.mark.parametrize("tokens", [8, 80])
def test_wrapped_vectors_and_tensors_of_no_memory_are_refused(tensors, tokens):
    x, w, a, b = tensors
    x = x[:tokens]
    for name in ("bias", "gain"):
        with pytest.raises(ValueError, match="in the memory of the CPU"):
            lora_linear(x, w, a, b, 1.0, **{name: Wrapper(torch.ones(48))})
    zeros = torch._efficientzerotensor
    for args in ((zeros(tokens, 64), w, a, b), (x, w, zeros(4, 64), b), (x, w, a, zeros(48, 4))):
        with pytest.raises(ValueError, match="in the memory of the CPU"):
            lora_linear(*args, 1.0)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.filterwarnings("ignore::lora_kernels.FallbackWarning")
def test_negated_views(tensors, which):
    """Their memory holds the opposite of their values."""
    negated = [torch._neg_view(t) if i == which else t for i, t in enumerate(tensors)]
    plain = [t.resolve_neg() for t in negated]
    torch.testing.assert_close(lora_linear(*negated, 0.5), lora_linear(*plain, 0.5))
    if which:
        torch.testing.assert_close(weight_norm(*negated[1:], 0.5), weight_norm(*plain[1:], 0.5))
        cache = NormCache()
        with torch.no_grad():
            cache(*tensors[1:], 0.5)
            torch.testing.assert_close(cache(*negated[1:], 0.5), weight_norm(*plain[1:], 0.5))
    assert issubclass(FallbackWarning, UserWarning)


def test_a_norm_is_not_kept_for_another_weight_at_the_same_address(tensors):
    _, w, a, b = tensors
    cache = NormCache()
    with torch.no_grad():
        for row in range(48):
            other = w.clone()
            other[row, 1::2] *= 0.5
            assert torch.equal(cache(other, a, b, 1.0), weight_norm(other, a, b, 1.0))
            del other
    with torch.inference_mode():
        inside = w.clone()  # has no version
        cache(inside, a, b, 1.0)
        inside[5, 5] = 100.0
        assert torch.equal(cache(inside, a, b, 1.0), weight_norm(inside, a, b, 1.0))


def test_kinds():
    x, w, a, b = torch.randn(3, 6), torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2)
    for bad in ([1.0], None, x.numpy()):
        with pytest.raises(TypeError, match="lora_linear: x must be a tensor, found"):
            lora_linear(bad, w, a, b)
    with pytest.raises(TypeError, match="lora_linear: scale must be a number or a tensor, found str"):
        lora_linear(x, w, a, b, "2")
    with pytest.raises(TypeError, match="lora_linear: bias must be a tensor, found str"):
        lora_linear(x, w, a, b, bias="abc")
    with pytest.raises(TypeError, match="lora_linear: seed must be a tensor, found int"):
        lora_linear(x, w, a, b, dropout=0.1, seed=3)
    with pytest.raises(TypeError, match="weight_norm: scale must be a number or a tensor, found str"):
        weight_norm(w, a, b, "1")
    with pytest.raises(ValueError, match=r"weight_norm: a must have at least one row \(the rank\), found \[0, 6\]"):
        weight_norm(w, a[:0], b[:, :0])
