"""Quantised weights in odd hands: drawn calls, copies, compilers, other devices, what the bindings
refuse."""

import copy
import io
import pickle
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import QuantisedWeight, dora_linear, lora_linear, merged_weight, use_backend, weight_norm
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.testing import LAYOUTS, as_layout, assert_problem, make_problem
from tests.ops.cpu import at_level
from tests.ops.quantised import KINDS, make_quantised
from tests.ops.test_cpu_levels import levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_anything(data):
    def one_of(*values):
        return data.draw(st.sampled_from(values))

    lead = one_of((), (0,), (1,), (2, 3), (1, 0, 4), (20,), (33,), (64,), (130,))
    n_in, n_out, rank = one_of(1, 5, 31, 64, 90, 257, 1025), one_of(1, 3, 40, 65, 130), one_of(1, 2, 8, 33)
    dtype, kind = one_of(*DTYPES), one_of(*KINDS)
    block = one_of(1, 2, 7, 16, 64, 256, n_in, n_in * n_out, 2 * n_in + 1)
    w = make_quantised(kind, n_out, n_in, block, dtype, seed=data.draw(st.integers(0, 9)))
    flags = {"bias": one_of(True, False), "gain": one_of(True, False), "dropout": one_of(0.0, 0.1, 0.5)}
    flags |= {"dropout_semantics": one_of("peft", "lora_only"), "scale": one_of(1.0, -0.5, torch.tensor(0.25))}
    problem = make_problem(lead, n_in, n_out, rank, dtype, one_of(None, *DTYPES), **flags)
    layouts = {name: as_layout(getattr(problem, name), one_of(*list(LAYOUTS)[:-1])) for name in ("x", "a", "b", "dy")}
    problem = replace(problem, w=dequantised(w), **layouts)
    with at_level(one_of(*levels())), use_backend("cpu"):
        assert torch.equal(w.dequantise(), problem.w)
        assert_problem(problem, w)
        norm = weight_norm(problem.w, problem.a, problem.b, 0.75)
        torch.testing.assert_close(weight_norm(w, problem.a, problem.b, 0.75), norm, rtol=1e-5, atol=1e-6)
        assert torch.equal(merged_weight(w, problem.a, problem.b, 0.75), merged_weight(problem.w, problem.a, problem.b, 0.75))


def layer(dtype=torch.float32):
    problem = make_problem(5, 66, 33, 4, dtype)
    return problem.x, problem.a, problem.b


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    w = make_quantised(kind, 33, 66)
    saved = io.BytesIO()
    torch.save(w, saved)
    saved.seek(0)
    copies = [copy.copy(w), copy.deepcopy(w), torch.load(saved, weights_only=False)]
    if kind != "float8":  # which torch itself does not pickle
        copies.append(pickle.loads(pickle.dumps(w)))
    assert all(torch.equal(each.dequantise(), w.dequantise()) for each in copies)
    copies[1].scales.zero_()
    assert w.scales.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_function_takes_the_weight(kind):
    """As an argument and by its name, in one graph, and another weight needs no other."""
    x, a, b = layer()
    counter = CompileCounter()
    by_argument = torch.compile(lambda w: lora_linear(x, w, a, b, 0.5), fullgraph=True, backend=counter)
    for seed in range(2):
        w = make_quantised(kind, 33, 66, seed=seed)
        assert torch.equal(by_argument(w), lora_linear(x, w, a, b, 0.5))
    assert counter.frame_count == 1

    def ops(a, b):
        y, norm = dora_linear(x, w, a, b, torch.ones(33), 0.5)
        return y, norm, merged_weight(w, a, b, 0.5), w.dequantise()

    for one, other in zip(torch.compile(ops, fullgraph=True, backend="aot_eager")(a, b), ops(a, b), strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()


def test_an_exported_program_has_the_codes():
    x, a, b = layer()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = make_quantised("nested", 33, 66)

        def forward(self, x):
            return lora_linear(x, self.w, a, b, 0.5)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Layer(), (x,)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), Layer()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_without_memory(kind):
    """Fake tensors and those of the device meta: shapes, dtypes, gradients."""
    w, (x, a, b) = make_quantised(kind, 33, 66, dtype=torch.bfloat16), layer(torch.bfloat16)
    codes, parts, layout = w.fields()
    mode = FakeTensorMode()
    for inside, given in ((mode, mode.from_tensor), (torch.no_grad(), lambda t: t.to("meta"))):
        w_given = QuantisedWeight.of_fields(given(codes), [given(t) for t in parts], layout)
        x_given, a_given, b_given = given(x), given(a).requires_grad_(), given(b)
        with inside, torch.enable_grad():
            y = lora_linear(x_given, w_given, a_given, b_given, 0.5)
            y.sum().backward()
            merged, norm = merged_weight(w_given, a_given, b_given), weight_norm(w_given, a_given, b_given)
        assert (y.shape, y.dtype, a_given.grad.shape) == ((5, 33), torch.bfloat16, a.shape)
        assert merged.shape == w_given.dequantise().shape == (33, 66)
        assert (norm.shape, norm.dtype) == ((33,), torch.float32)


def test_transforms():
    """torch.func over every op: as over W as a tensor."""
    w, (x, a, b) = make_quantised("nested", 33, 66), layer()
    dense, batch, gain = w.dequantise(), torch.stack((a, 2 * a)), torch.ones(33)
    for op in (
        lambda w, a: lora_linear(x, w, a, b, 0.5), lambda w, a: weight_norm(w, a, b, 0.5),
        lambda w, a: merged_weight(w, a, b, 0.5), lambda w, a: dora_linear(x, w, a, b, gain, 0.5)[0],
    ):  # fmt: skip
        of_codes, of_dense = (lambda a, w=w, op=op: op(w, a) for w in (w, dense))
        torch.testing.assert_close(torch.vmap(of_codes)(batch), torch.vmap(of_dense)(batch))
        torch.testing.assert_close(torch.func.jvp(of_codes, (a,), (a,)), torch.func.jvp(of_dense, (a,), (a,)))


def test_other_kinds_of_x():
    w, (x, a, b) = make_quantised("int8", 33, 66), layer()
    rows = lora_linear(x, w, a, b)
    assert torch.equal(lora_linear(x.to_sparse(), w, a, b), rows)
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor([x[:3], x[3:]], layout=layout)
        assert torch.equal(torch.cat(lora_linear(nested, w, a, b).unbind()), rows)
    with torch.inference_mode():
        assert torch.equal(lora_linear(x, w, a, b), rows)
    for reentrant in (True, False):
        given = x.clone().requires_grad_()
        checkpoint(lambda x, w: lora_linear(x, w, a, b), given, w, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(given.grad, torch.ones(5, 33) @ (w.dequantise() + b @ a))


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_numbers(kind):
    w, (x, a, b) = make_quantised(kind, 33, 66), layer()
    counts = []
    for each in (w, w.dequantise()):
        with FlopCounterMode(display=False) as counter:
            lora_linear(x.clone().requires_grad_(), each, a.clone().requires_grad_(), b).sum().backward()
            weight_norm(each, a, b)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("shape", [(0, 66), (33, 0), (0, 0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_numbers(backend, shape):
    some, (n_out, n_in) = make_quantised("nested", 1, 2), shape
    w = replace(some, codes=some.codes[:0], shape=shape, scales=some.scales[:0], outer=some.outer[:0])
    x, a, b = torch.randn(5, n_in), torch.randn(4, n_in, requires_grad=True), torch.randn(n_out, 4)
    with use_backend(backend):
        y = lora_linear(x, w, a, b, 0.5, torch.ones(n_out))
        y.sum().backward()
        assert torch.equal(y, torch.ones(5, n_out))
        assert not a.grad.any()
        assert w.dequantise().shape == merged_weight(w, a, b).shape == shape
        assert not weight_norm(w, a, b).any()
