"""lora_linear_group, autograd and compilers: gradcheck, who gets a gradient, what is saved,
opcheck, compiled bits."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear, lora_linear_group, use_backend
from lora_kernels.testing import make_group, member, run_group

OPS = torch.ops.lora_kernels
MEMBERS = [
    {"n_out": 20, "rank": 4, "gain": True, "bias": True},
    {"n_out": 7, "rank": 2},
    {"n_out": 12, "rank": 3, "gain": True},
    {"n_out": 9, "rank": 3, "bias": True},
]
SUBSETS = [(0, ("a",)), (1, ("b",)), (2, ("gain",)), (3, ("bias", "x")), (0, ("x",)), (0, ("gain", "bias")), (0, ())]
FLAGS = [{}, {"dropout": 0.3}, {"dropout": 0.3, "dropout_semantics": "lora_only"}]
flags_of = pytest.mark.parametrize("flags", FLAGS, ids=str)


def call(problems):
    first = problems[0]
    dropout = [p.dropout for p in problems]
    return lora_linear_group(first.x, [member(p) for p in problems], dropout, first.dropout_semantics)


def leaves_of(problems, names=("a", "b", "bias", "gain", "scale")):
    found = [t for p in problems for t in p.require_grad(names).values()]
    return [problems[0].x.requires_grad_(), *found]


@flags_of
def test_gradcheck(flags):
    members = [m | {"scale": torch.tensor(0.7, dtype=torch.float64) if i == 1 else 0.7} for i, m in enumerate(MEMBERS[:3])]
    members[0] = members[0] | {"n_out": 3, "rank": 2}
    problems = make_group(members, 4, 5, torch.float64, **flags)
    names = [list(p.require_grad(("a", "b", "bias", "gain", "scale"))) for p in problems]

    def changed(x, *tensors):
        given = iter(tensors)
        return call([replace(p, x=x, **{n: next(given) for n in own}) for p, own in zip(problems, names, strict=True)])

    assert torch.autograd.gradcheck(changed, leaves_of(problems), nondet_tol=0.0)


@pytest.mark.parametrize("tokens, flags", [(3, {"dropout": 0.3}), (90, {})])
def test_who_gets_a_gradient(backend, tokens, flags):
    wanted = run_group(make_group(MEMBERS, tokens, 40, torch.bfloat16, **flags))
    for at, subset in SUBSETS:
        problems = make_group(MEMBERS, tokens, 40, torch.bfloat16, **flags)
        problems[at].require_grad(subset)
        ys = call(problems)
        assert all(y.requires_grad == bool(subset) and y.equal(r["y"]) for y, r in zip(ys, wanted, strict=True))
        if subset:
            torch.autograd.backward(ys, [p.dy for p in problems])
        for i, p in enumerate(problems):
            for name in ("x", "a", "b", "bias", "gain"):
                grad = None if getattr(p, name) is None else getattr(p, name).grad
                if name in subset and (i == at or name == "x"):
                    assert grad.equal(wanted[i][name]), (at, name)
                else:
                    assert grad is None, (i, name)


def test_an_output_that_is_not_used_costs_nothing(backend):
    problems = make_group(MEMBERS, 6, 40)
    leaves = leaves_of(problems)
    call(problems)[2].backward(problems[2].dy)
    alone = make_group(MEMBERS, 6, 40)
    leaves_of(alone)
    call(alone[2:3])[0].backward(alone[2].dy)
    assert problems[0].x.grad.equal(alone[2].x.grad) and problems[2].a.grad.equal(alone[2].a.grad)
    used = {id(problems[0].x), *(id(t) for t in (problems[2].a, problems[2].b, problems[2].gain))}
    assert all((leaf.grad is not None) == (id(leaf) in used) for leaf in leaves)


def test_saved_are_the_tensors_of_the_single_op_and_x_once(backend):
    def saved(forward):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((tuple(t.shape), t.dtype)) or t, lambda t: t):
            forward()
        return sorted(sizes, key=str)

    for flags in FLAGS:
        problems = make_group(MEMBERS, 30, 40, torch.bfloat16, **flags)
        for frozen in ([], [problems[0].gain]):
            leaves_of(problems)
            for t in frozen:
                t.requires_grad_(False)
            singles = saved(lambda p=problems: [lora_linear(*each.arguments()) for each in p])
            together = saved(lambda p=problems: call(p))
            assert sorted([*together, *[((30, 40), torch.bfloat16)] * (len(problems) - 1)], key=str) == singles


def test_first_derivatives_under_create_graph_are_the_same(backend):
    plain = run_group(problems := make_group(MEMBERS, 3, 24, dropout=0.2))
    leaves = leaves_of(problems)
    grads = torch.autograd.grad(call(problems), leaves, [p.dy for p in problems], create_graph=True)
    wanted = [plain[0]["x"], *(r[n] for r in plain for n in ("a", "b", "bias", "gain") if n in r)]
    assert all(g.equal(w) for g, w in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("name", ["x", "w", "a", "b", "gain", "y"])
def test_a_saved_tensor_changed_in_place_raises(backend, name):
    problems = make_group(MEMBERS, 3, 24)
    leaves_of(problems)
    ys = call(problems)
    with torch.no_grad():
        (ys[2] if name == "y" else getattr(problems[2], name)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(ys, [p.dy for p in problems])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(backend, reentrant):
    problems = [replace(p, seed=None) for p in make_group(MEMBERS, (2, 9), 24, dropout=0.4)]
    leaves, results = leaves_of(problems), []
    for wrap in (False, True):
        torch.manual_seed(5)
        for leaf in leaves:
            leaf.grad = None

        def run(*_):
            return call(problems)

        ys = checkpoint(run, *leaves, use_reentrant=reentrant) if wrap else run()
        torch.rand(3)
        torch.autograd.backward(ys, [p.dy for p in problems])
        results.append([*(y.detach() for y in ys), *(leaf.grad for leaf in leaves)])
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


def forward_arguments(tokens, dtype, flags, keep=True):
    problems = make_group(MEMBERS, tokens, 24, dtype, **flags)
    w, a, b, scale, bias, gain, dropout, seed = (
        [getattr(p, n) for p in problems] for n in ("w", "a", "b", "scale", "bias", "gain", "dropout", "seed")
    )
    drop_base = bool(flags) and problems[0].dropout_semantics == "peft"
    return problems, (problems[0].x, w, a, b, scale, bias, gain, dropout, seed, drop_base, keep, keep)


def backward_arguments(problems, arguments, needs):
    x, *rest = arguments[:-2]
    y, h, z = OPS.lora_linear_group_forward.default(*arguments)
    kept_z = [t if t.numel() else None for t in z]
    kept_y = [t if p.gain is not None and k is None else None for t, k, p in zip(y, kept_z, problems, strict=True)]
    return (x, [p.dy for p in problems], *rest, h, kept_y, kept_z, needs)


def all_needs(problems):
    return [True, *(need for p in problems for need in (True, True, p.bias is not None, p.gain is not None))]


@flags_of
@pytest.mark.parametrize("tokens, dtype", [(3, torch.float32), (70, torch.bfloat16)], ids=str)
def test_opcheck(backend, tokens, dtype, flags):
    problems, arguments = forward_arguments(tokens, dtype, flags)
    torch.library.opcheck(OPS.lora_linear_group_forward.default, arguments)
    torch.library.opcheck(
        OPS.lora_linear_group_backward.default, backward_arguments(problems, arguments, all_needs(problems))
    )


@flags_of
@pytest.mark.parametrize("tokens", [0, 3, 70])
def test_the_fake_has_the_shapes_and_strides_of_the_op(backend, tokens, flags):
    for dtype in (torch.float32, torch.bfloat16):
        for keep in (False, True):
            problems, arguments = forward_arguments(tokens, dtype, flags, keep)
            compare_with_fake(OPS.lora_linear_group_forward.default, arguments)
        needs = all_needs(problems)
        for some in (needs, [False, *needs[1:]], [n and i % 2 == 0 for i, n in enumerate(needs)], [True] + [False] * 16):
            compare_with_fake(OPS.lora_linear_group_backward.default, backward_arguments(problems, arguments, some))


def compare_with_fake(op, arguments):
    def flat(results):
        return [t for r in results for t in ([r] if isinstance(r, torch.Tensor) else r)]

    real = op(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = op(*arguments)
    for one, two in zip(flat(real), flat(fake), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride())


def assert_compiled_is_eager(problems, compiler):
    torch._dynamo.reset()
    leaves, results = leaves_of(problems), []
    for step in (call, torch.compile(call, fullgraph=True, backend=compiler)):
        ys = step(problems)
        results.append([*ys, *torch.autograd.grad(ys, leaves, [p.dy for p in problems])])
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


@flags_of
@pytest.mark.parametrize("tokens", [3, (2, 35)], ids=str)
def test_compiled_gives_the_bits_of_eager(backend, tokens, flags):
    members = [*MEMBERS[:3], MEMBERS[3] | {"scale": torch.tensor(0.5)}]
    problems = make_group(members, tokens, 24, torch.bfloat16, adapter_dtype=torch.float32, **flags)
    assert_compiled_is_eager(problems, "aot_eager")


def test_inductor_gives_the_bits_of_eager(backend):
    # no tensor scale: its gradient is a sum of autograd's, which inductor takes in its own order
    assert_compiled_is_eager(make_group(MEMBERS, 5, 24, torch.bfloat16, dropout=0.2), "inductor")


def test_compiled_without_gradients_and_with_autocast(backend):
    torch._dynamo.reset()
    problems = make_group(MEMBERS, 5, 24)

    def inside():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return call(problems)

    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")()
    assert all(one.equal(two) for one, two in zip(inside(), compiled, strict=True))


def test_one_graph_serves_every_number_of_tokens(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (5, 9, 70, 300):
        problems = make_group(MEMBERS, tokens, 24)
        assert all(one.equal(two) for one, two in zip(compiled(problems), call(problems), strict=True))
    assert counter.frame_count == 1


def test_export_holds_the_op(backend):
    problems = make_group(MEMBERS, 6, 24)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return lora_linear_group(x, [member(p) for p in problems])

    with torch.no_grad():
        program = torch.export.export(Layer(), (problems[0].x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}})
        assert any("lora_linear_group_forward" in str(node.target) for node in program.graph.nodes)
        for tokens in (6, 90):
            x = make_group(MEMBERS, tokens, 24)[0].x
            assert all(one.equal(two) for one, two in zip(program.module()(x), Layer()(x), strict=True))


def test_tensors_in_lists_that_are_subclasses_go_through_the_dispatcher(backend):
    problems, seen = make_group(MEMBERS, 3, 24), []

    class Held(torch.Tensor):
        """Holds another tensor and has no memory of its own."""

        @staticmethod
        def __new__(cls, held):
            return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

        def __init__(self, held):
            self.held = held

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*torch.utils._pytree.tree_map_only(cls, lambda t: t.held, args), **(kwargs or {}))

    wanted = call(problems)
    for name in ("w", "a", "b"):
        changed = [problems[0], replace(problems[1], **{name: Held(getattr(problems[1], name))}), *problems[2:]]
        assert all(one.equal(two) for one, two in zip(call(changed), wanted, strict=True))
    assert "lora_kernels.lora_linear_group_forward.default" in seen


def test_float64_is_the_reference():
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="lora_linear_group_forward cannot run on cpu: .*float64"):
        call(make_group(MEMBERS, 3, 24, torch.float64))
