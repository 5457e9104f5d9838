"""What a group keeps between its layers' calls: in each thread its own, never past the module's
call, and the same in a checkpoint's recomputation."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch._dynamo.testing
from group_helpers import KINDS, alone_since, block, inputs, kinds, learnt, ops, pair, qkv, results, siblings
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_kernels.integrations.peft import groups

reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
GROUP, SINGLE = "lora_linear_group_forward", "lora_linear_forward"


@pytest.fixture(autouse=True)
def always_pays(monkeypatch):
    monkeypatch.setattr(groups, "group_pays", lambda x: True)


@pytest.fixture
def made(monkeypatch):
    """Weak references to what the groups computed."""
    refs, op = [], groups.lora_linear_group

    def recorded(*args):
        ys = op(*args)
        refs.extend(map(weakref.ref, ys))
        return ys

    monkeypatch.setattr(groups, "lora_linear_group", recorded)
    return refs


def raises(b, x):
    b.q(x)
    raise RuntimeError("between the layers")


def generator(b, x):
    yield b.q(x)
    yield b.k(x)
    yield b.v(x)


def handles_an_error(b, x):
    q = b.q(x)
    try:
        b.k(x[:, :3])
    except ValueError:
        return q, b.v(x.clone())
    raise AssertionError


ENDS = {
    "as expected": (qkv, {}),
    "it raises": (raises, {"k was not called": 1}),
    "early": (lambda b, x: b.q(x), {"k was not called": 1}),
    "in the middle": (lambda b, x: (b.q(x), b.k(x)), {"v was not called": 1}),
    "an error that it handles": (handles_an_error, {"k: another tensor came": 1}),
    "a generator": (lambda b, x: generator(b, x), {}),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_nothing_outlives_the_modules_call(end, grad, made):
    act, counted = ENDS[end]
    _, one = learnt(use_dora=True)
    x = inputs().requires_grad_(grad)

    def call():
        with torch.set_grad_enabled(grad):
            try:
                ys = one(x, act)
                if end == "a generator":
                    next(ys), next(ys)
            except RuntimeError as error:
                assert act is raises and str(error) == "between the layers"

    assert alone_since(one, call) == counted
    assert len(made) == (0 if end == "a generator" else 3) and [ref() for ref in made if ref() is not None] == []
    assert siblings(one)._thread.round is None and not siblings(one)._thread.inside


def test_after_an_interrupt_the_next_call_drops_what_was_kept(made):
    """torch runs no hook then."""
    alone, one = learnt()

    def interrupted(b, x):
        b.q(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one(inputs(), interrupted)
    one(inputs(), lambda b, x: b.o(torch.zeros(1, 40)))
    assert [ref() for ref in made if ref() is not None] == []
    assert torch.equal(one(inputs()), alone(inputs())) and siblings(one).alone() == {}


def test_an_output_that_nobody_calls_for_costs_no_gradient():
    alone, one = learnt()
    expected, found = (results(each, inputs(), lambda b, x: b.q(x)) for each in (alone, one))
    assert siblings(one).alone() == {"k was not called": 1}
    for name, value in expected.items():
        assert found[name] is value is None or torch.equal(found[name], value), name


@kinds
def test_a_group_saves_no_more_for_backward_than_its_layers(kind):
    def saved(one):
        ys = one(inputs(), qkv)
        nodes = {(y.grad_fn.next_functions[0][0] if "View" in y.grad_fn.name() else y.grad_fn) for y in ys}
        assert len(nodes) == (1 if one is grouped else 3)
        kept = [t for node in nodes for t in node.saved_tensors if t is not None]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())

    alone, grouped = learnt(**KINDS[kind])
    assert saved(grouped) <= saved(alone)


def steps(one, count, reentrant, rows=5):
    """The gradients of some steps with one checkpoint around the module."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        x = inputs(rows=rows, seed=seed).requires_grad_()
        checkpoint(one, x, use_reentrant=reentrant).square().sum().backward()
        found.append([x.grad] + [p.grad.clone() for p in one.parameters() if p.grad is not None])
        one.zero_grad()
    return found


@kinds
@reentrant
def test_a_group_that_is_learnt_under_checkpoints(kind, reentrant):
    """Its recomputation saves for backward what its forward saved, which torch checks."""
    alone, grouped = pair(**KINDS[kind])
    for found, expected in zip(steps(grouped, 5, reentrant), steps(alone, 5, reentrant), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found[1:], expected[1:], strict=True))
        torch.testing.assert_close(found[0], expected[0])
    x = inputs().requires_grad_()
    assert GROUP in ops(lambda: checkpoint(grouped, x, use_reentrant=reentrant).sum().backward())
    assert siblings(grouped).groups() and siblings(grouped).alone() == {}


@pytest.mark.parametrize("given_up", [False, True])
def test_recomputations_do_as_their_own_forward_did(given_up):
    """Forwards before and after the group was formed, and after it was given up, and then all their
    backwards."""
    alone, grouped = pair()

    def losses(one):
        found = [checkpoint(one, inputs(seed=seed), use_reentrant=False).square().sum() for seed in range(4)]
        with torch.no_grad():
            for _ in range(3 if given_up else 0):
                one(inputs(), lambda b, x: b.q(x))
        return [*found, checkpoint(one, inputs(), use_reentrant=False).sum()]

    grads = []
    for one in (alone, grouped):
        one.zero_grad()
        for loss in losses(one):
            loss.backward()
        grads.append([p.grad for p in one.parameters() if p.grad is not None])
    assert all(torch.equal(found, expected) for found, expected in zip(*grads, strict=True))


def test_nested_checkpoints():
    alone, grouped = pair()

    def nested(one, x):
        return checkpoint(lambda x: checkpoint(one, x, use_reentrant=False) + one(x), x, use_reentrant=False)

    for seed in range(4):
        grads = []
        for one in (alone, grouped):
            x = inputs(seed=seed).requires_grad_()
            grads.append(torch.autograd.grad(nested(one, x).square().sum(), x)[0])
        # a number may be little beside the sums that it is made of
        torch.testing.assert_close(*grads, rtol=0, atol=2.0**-20 * float(grads[0].abs().max()))
    assert siblings(grouped).groups()


def test_selective_checkpoints_and_other_hooks_run_alone():
    alone, grouped = learnt()
    policy = {torch.ops.lora_kernels.lora_linear_forward.default: CheckpointPolicy.MUST_SAVE}

    def contexts():
        return create_selective_checkpoint_contexts(lambda _, op, *a, **k: policy.get(op, CheckpointPolicy.PREFER_RECOMPUTE))

    def selective(one):
        x = inputs().requires_grad_()
        return torch.autograd.grad(checkpoint(one, x, use_reentrant=False, context_fn=contexts).sum(), x)[0]

    def offloaded(one):
        x = inputs().requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            y = one(x)
        return torch.autograd.grad(y.sum(), x)[0]

    for run in (selective, offloaded):
        assert torch.equal(run(grouped), run(alone)) and GROUP not in ops(run, grouped)
    assert siblings(grouped).alone() == {}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_each_thread_has_its_own_round(grad):
    alone, one = learnt(use_dora=True)
    threads, calls = 2, 40
    start, between = Barrier(threads), Barrier(threads)

    def act(b, x):
        q = b.q(x)
        between.wait()  # every thread is between its layers
        return q, b.k(x), b.v(x)

    def run(thread):
        start.wait()
        with torch.set_grad_enabled(grad):
            return [[y.detach() for y in one(inputs(rows=1 + thread, seed=seed), act)] for seed in range(calls)]

    with ThreadPoolExecutor(threads) as pool:
        for thread, found in enumerate(pool.map(run, range(threads))):
            for seed, ys in enumerate(found):
                expected = alone(inputs(rows=1 + thread, seed=seed), qkv)
                assert all(torch.equal(y, other) for y, other in zip(ys, expected, strict=True))
    assert siblings(one).alone() == {}


def test_threads_learn_at_once():
    alone, one = pair()
    start = Barrier(2)

    def run(thread):
        start.wait()
        return [one(inputs(rows=1 + thread, seed=seed)).detach() for seed in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for thread, found in enumerate(pool.map(run, range(2))):
            assert all(torch.equal(y, alone(inputs(rows=1 + thread, seed=seed))) for seed, y in enumerate(found))
    one(inputs()), one(inputs())
    assert GROUP in ops(one, inputs())


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["learnt", "compiled"])
def test_a_compiler_sees_each_call_and_no_group(first, fresh_compiler):
    alone, one = learnt() if first == "learnt" else pair()
    backend = torch._dynamo.testing.EagerAndRecordGraphs()
    compiled = torch.compile(one, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(inputs()), alone(inputs()))
        (graph,) = backend.graphs
        targets = [str(node.target) for node in graph.graph.nodes]
        assert sum(SINGLE in t for t in targets) == 4 and not any(GROUP in t for t in targets)
        for seed in range(3):  # eager calls learn, and are a group's, beside it
            assert torch.equal(one(inputs(seed=seed)), alone(inputs(seed=seed)))
        assert GROUP in ops(one, inputs())
        assert torch.equal(compiled(inputs(seed=5)), alone(inputs(seed=5))) and len(backend.graphs) == 1
    assert siblings(one).alone() == {} and block(one)._forward_hooks
