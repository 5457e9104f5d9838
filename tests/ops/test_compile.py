"""The registered ops: opcheck, torch.compile and export give the bits of the eager call."""

import pytest
import torch
import torch._dynamo.testing

from lora_kernels import lora_linear, weight_norm
from lora_kernels.testing import make_problem, run

OPS = torch.ops.lora_kernels
FLAGS = [
    {},
    {"bias": True},
    {"gain": True},
    {"gain": True, "bias": True, "dropout": 0.3},
    {"gain": True, "dropout": 0.3, "dropout_semantics": "lora_only"},
]


def forward_arguments(tokens, dtype, flags, keep=True):
    p = make_problem(tokens, 24, 20, 4, dtype, **flags)
    drop_base = p.dropout > 0 and p.gain is not None and p.dropout_semantics == "peft"
    keep_z = keep and p.gain is not None and (p.bias is not None or drop_base)
    return p, (p.x, p.w, p.a, p.b, p.scale, p.bias, p.gain, p.dropout, p.seed, drop_base, keep, keep_z)


CASES = [
    (3, torch.float32, FLAGS[0]),
    (70, torch.float32, FLAGS[3]),
    (3, torch.bfloat16, FLAGS[2]),
    (70, torch.float16, FLAGS[4]),
    (0, torch.float32, FLAGS[1]),
]


def check(op, arguments):
    # the Functions outside carry the gradients, so an op is checked on tensors that want none
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_lora_linear(backend, case):
    p, arguments = forward_arguments(*case)
    check(OPS.lora_linear_forward.default, arguments)
    y, h, z = OPS.lora_linear_forward.default(*arguments)
    wants = [True, True, True, p.bias is not None, p.gain is not None]
    kept = (h, y if p.gain is not None and not arguments[-1] else None, z if arguments[-1] else None)
    check(OPS.lora_linear_backward.default, (p.dy, *arguments[:-2], *kept, wants))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_weight_norm(backend, dtype):
    p = make_problem(3, 24, 20, 4, dtype)
    squared = OPS.row_norm_squared.default(p.w)
    check(OPS.row_norm_squared.default, (p.w,))
    check(OPS.weight_norm_forward.default, (p.w, p.a, p.b, 1.5, squared))
    n = OPS.weight_norm_forward.default(p.w, p.a, p.b, 1.5, None)
    check(OPS.weight_norm_backward.default, (torch.ones(20), n, p.w, p.a, p.b, 1.5, [True, True]))


@pytest.mark.parametrize(
    "needs", [[False] * 5, [True, False, True, False, True], [False, True, False, True, False]], ids=str
)
def test_the_fake_has_the_shapes_and_strides_of_the_op(backend, needs):
    for tokens in (0, 3, 70):
        for dtype in (torch.float32, torch.bfloat16):
            for flags in FLAGS[3:]:
                for keep in (False, True):
                    p, arguments = forward_arguments(tokens, dtype, flags, keep)
                    compare_with_fake(OPS.lora_linear_forward.default, arguments)
                p.bias, p.gain = torch.ones(20), torch.ones(20)
                y, h, z = OPS.lora_linear_forward.default(*arguments)
                rest = (
                    p.scale,
                    p.bias,
                    p.gain,
                    p.dropout,
                    p.seed,
                    arguments[9],
                    h,
                    y,
                    z if arguments[-1] else None,
                    needs,
                )
                compare_with_fake(OPS.lora_linear_backward.default, (p.dy, p.x, p.w, p.a, p.b, *rest))


def compare_with_fake(op, arguments):
    real = op(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for one, two in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride())


def compiled_step(p, backend):
    torch._dynamo.reset()

    def step(x, w, a, b, scale, bias, gain, dropout, semantics, seed):
        n = weight_norm(w, a, b, scale)
        return lora_linear(x, w, a, b, scale, bias, gain, dropout, semantics, seed), n

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend=backend)):
        leaves = p.require_grad()
        for leaf in leaves.values():
            leaf.grad = None
        y, n = call(*p.arguments())
        torch.autograd.backward([y, n], [p.dy, torch.ones_like(n)])
        results.append({"y": y, "n": n} | {name: leaf.grad for name, leaf in leaves.items()})
    return results


@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[3], {"scale": torch.tensor(0.5), "gain": True}], ids=str)
@pytest.mark.parametrize("tokens", [3, (2, 35)], ids=str)
def test_compiled_gives_the_bits_of_eager(backend, flags, tokens):
    eager, compiled = compiled_step(
        make_problem(tokens, 24, 20, 4, torch.bfloat16, torch.float32, **flags), "aot_eager"
    )
    for name in eager:
        assert eager[name].equal(compiled[name]), name


def test_inductor_gives_the_bits_of_eager(backend):
    eager, compiled = compiled_step(make_problem(5, 24, 20, 4, gain=True, bias=True, dropout=0.2), "inductor")
    for name in eager:
        assert eager[name].equal(compiled[name]), name


def test_compiled_without_gradients_and_with_autocast(backend):
    torch._dynamo.reset()
    p = make_problem(5, 24, 20, 4, gain=True, bias=True)

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return lora_linear(*p.arguments())

    assert call().equal(torch.compile(call, fullgraph=True, backend="aot_eager")())


def test_one_graph_serves_every_number_of_tokens(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    call = torch.compile(lora_linear, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (5, 9, 70, 300):
        p = make_problem(tokens, 24, 20, 4)
        assert call(*p.arguments()).equal(lora_linear(*p.arguments()))
    assert counter.frame_count == 1


def test_dropout_drawn_inside_a_graph_follows_manual_seed(backend):
    torch._dynamo.reset()
    p = make_problem(6, 24, 20, 4, dropout=0.4)
    p.seed = None
    call = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    one, two = call(*p.arguments()), call(*p.arguments())
    torch.manual_seed(3)
    assert call(*p.arguments()).equal(one) and not one.equal(two)


def test_export(backend):
    p = make_problem(6, 24, 20, 4, gain=True, bias=True)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return lora_linear(x, p.w, p.a, p.b, p.scale, p.bias, p.gain)

    with torch.no_grad():
        program = torch.export.export(Layer(), (p.x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}})
        assert any("lora_linear_forward" in str(node.target) for node in program.graph.nodes)
        for tokens in (6, 3, 90):
            x = make_problem(tokens, 24, 20, 4).x
            assert program.module()(x).equal(lora_linear(x, *p.arguments()[1:]))


def test_tensor_subclasses_go_through_the_dispatcher(backend):
    p = make_problem(3, 24, 20, 4)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Marked(torch.Tensor):
        pass

    with Spy(), torch.no_grad():
        y = lora_linear(p.x.as_subclass(Marked), *p.arguments()[1:])
    assert "lora_kernels.lora_linear_forward.default" in seen
    assert torch.Tensor.equal(y.as_subclass(torch.Tensor), run(p)["y"])
