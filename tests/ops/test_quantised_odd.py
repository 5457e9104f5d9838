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

from lora_kernels import QuantisedWeight, _cpu, dora_linear, lora_linear, merged_weight, use_backend, weight_norm
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.testing import LAYOUTS, as_layout, assert_problem, make_problem
from tests.ops.cpu import at_level
from tests.ops.quantised import FORMATS, KINDS, NF4, make_format, make_quantised
from tests.ops.test_cpu_levels import levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_anything(data):
    def one_of(*values):
        return data.draw(st.sampled_from(values))

    lead = one_of((), (0,), (1,), (2, 3), (1, 0, 4), (20,), (33,), (64,), (130,))
    n_in, n_out, rank = one_of(1, 5, 31, 64, 90, 257, 1025), one_of(1, 3, 40, 65, 130), one_of(1, 2, 8, 33)
    dtype, kind, seed = one_of(*DTYPES), one_of(*KINDS, *FORMATS), data.draw(st.integers(0, 9))
    block = one_of(1, 2, 7, 16, 64, 256, n_in, n_in * n_out, 2 * n_in + 1)
    if kind in KINDS:
        w = make_quantised(kind, n_out, n_in, block, dtype, seed)
    else:
        w = make_format(kind, n_out, n_in, dtype, block, one_of(1, 2, 3, 128), seed)
    n_out = w.shape[0]
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


@pytest.mark.parametrize("kind", ["nested", "float8"])
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
@pytest.mark.parametrize("rows", [0, 3])
def test_no_numbers(backend, shape, rows):
    some, (n_out, n_in) = make_quantised("nested", 1, 2), shape
    w = replace(some, codes=some.codes[:0], shape=shape, scales=some.scales[:0], outer=some.outer[:0])
    w = replace(w, block_rows=3) if rows else w
    x, a, b = torch.randn(5, n_in), torch.randn(4, n_in, requires_grad=True), torch.randn(n_out, 4)
    with use_backend(backend):
        y = lora_linear(x, w, a, b, 0.5, torch.ones(n_out))
        y.sum().backward()
        assert torch.equal(y, torch.ones(5, n_out))
        assert not a.grad.any()
        assert w.dequantise().shape == merged_weight(w, a, b).shape == shape
        assert not weight_norm(w, a, b).any()


def test_parts_that_require_grad_get_none():
    w, (x, a, b) = make_quantised("nested", 33, 66), layer()
    wanted = lora_linear(x, w, a, b)
    learnt = replace(w, outer=w.outer.clone().requires_grad_(), offset=w.offset.clone().requires_grad_())
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            y = lora_linear(x, learnt, a, b)
        assert not y.requires_grad
        torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("block", [2**40, 2**61])
def test_blocks_larger_than_the_weight(block):
    w = make_quantised("nibbles", 8, 16, 128)
    huge = replace(w, block=block, outer_block=block)
    tiles = replace(huge, block_rows=block)
    assert torch.equal(huge.dequantise(), w.dequantise())
    for each in (w, huge, tiles):
        assert torch.equal(dequantised(each), w.dequantise())


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("int8", {"table": torch.ones(16)}, "table must be None without codes of 4 bits"),
    ("nibbles", {"offset": torch.ones(1)}, "offset must be None without outer"),
    ("nibbles", {"outer_table": torch.ones(256)}, "outer_table must be None without outer"),
    ("nibbles", {"shape": (-8, -16)}, r"shape must be \[out, in\] or \[experts, out, in\], found \[-8, -16\]"),
])  # fmt: skip
def test_parts_that_do_not_belong(kind, change, message):
    with pytest.raises(ValueError, match=f"QuantisedWeight: {message}"):
        replace(make_quantised(kind, 8, 16), **change)


LAYOUT = [0, 8, 16, 0, 64, 256]
BAD_LAYOUTS = [
    (0, 4), (0, -1), (1, 7), (1, -8), (1, 2**60), (1, 2**62), (2, -16), (2, 2**61), (3, 3), (3, -1), (4, 0), (4, -64),
    (4, 2**63 - 1), (5, 0), (5, 2**63 - 1), (4, 2**63), (4, 64.5), (2, None),
]  # fmt: skip
BAD_PARTS = [
    None, [], [torch.ones(16)], [torch.ones(16), None], [torch.ones(16), 2.0], [torch.ones(16), torch.ones(1)],
    [torch.ones(15), torch.ones(2)], [torch.ones(16), torch.ones(4)[::2]], [torch.ones(16), torch.ones(1).expand(2)],
    [torch.ones(16), torch.ones(2).double()], [torch.ones(16), torch.ones(2).int()], [torch.ones(16), torch.ones(2).half()],
    [torch.ones(16), torch.ones(2, device="meta")], [torch.ones(16), torch.ones(2).to_sparse()],
    [torch.ones(16), torch._efficientzerotensor(2)], [torch.ones(16), torch.ones(2), torch.ones(2)],
]  # fmt: skip


def bad_weights():
    """As no QuantisedWeight gives them: each wrong in one way."""
    codes, parts = torch.zeros(64, dtype=torch.uint8), [torch.tensor(NF4), torch.ones(2)]
    freed = codes.clone()
    freed.untyped_storage().resize_(0)
    for other in (codes[:63], codes.float(), None, codes.new_zeros(128)[::2], codes.view(8, 8).T, freed, codes.int()):
        yield other, parts, LAYOUT, 0, 8
    for other in BAD_PARTS:
        yield codes, other, LAYOUT, 0, 8
    for place, number in BAD_LAYOUTS:
        yield codes, parts, [*LAYOUT[:place], number, *LAYOUT[place + 1 :]], 0, 8
    for other in (None, [], LAYOUT[:5], [*LAYOUT, 0]):
        yield codes, parts, other, 0, 8
    for first, rows in ((-1, 8), (0, 9), (0, -1), (1, 8), (2**62, 2**62), (2**63 - 1, 1), (2**63, 8), (0, "8"), (0.5, 8)):
        yield codes, parts, LAYOUT, first, rows
    good = codes, parts, LAYOUT, 0, 8
    yield from (good[:4], (*good, 1), (), list(good), (torch.ones(8, 16),), None, "w", 3)


def test_the_bindings_refuse_what_they_cannot_read():
    """In words: nothing is read, and nothing ends the process."""
    x, y, a, b, h = torch.ones(3, 16), torch.zeros(3, 8), torch.ones(2, 16), torch.ones(8, 2), torch.zeros(3, 2)
    calls = [
        lambda w: _cpu.dequantise(w, torch.zeros(8, 16), 1),
        lambda w: _cpu.forward_small(x, w, a, b, y, None, None, None, None, 1.0, None, 1),
        lambda w: _cpu.base_product(x, w, y, 1),
    ]
    if _cpu.has_tiles():
        calls.append(lambda w: _cpu.tiles(x, w, a, b, y, None, None, None, h, 1.0, None, False, 1))
    for call in calls:
        call((torch.zeros(64, dtype=torch.uint8), [torch.tensor(NF4), torch.ones(2)], LAYOUT, 0, 8))
        for w in bad_weights():
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                call(w)
