"""The layers as modules: copies, files, compilation, checkpointing, threads."""

import copy
import threading

import pytest
import torch
from layer_helpers import KINDS, adapter, bits, fit, gradients, linear, ours, through_pickle, through_torch_save
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.nn import DoRALinear, LoRALinear
from lora_kernels.ops import NormCache

kinds = pytest.mark.parametrize("kind", KINDS)
simple_kinds = pytest.mark.parametrize("kind", ["lora", "dora"])


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch.compiler.reset()


@kinds
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_computes_the_same_and_shares_nothing(kind, copied):
    layer = ours(kind, lora_dropout=0.2).eval()
    layer.set_scale(1.5)
    x = torch.randn(5, 12)
    with torch.no_grad():
        y = layer(x)
        other = copied(layer)
        assert torch.equal(other(x), y)
    assert (other.r, other.scaling, other.lora_dropout, other.enabled) == (layer.r, layer.scaling, 0.2, True)
    assert other.training is False
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in layer.named_parameters() if p.requires_grad
    ]
    with torch.no_grad():
        other.lora_B.data.mul_(2)
        assert not torch.equal(other(x), y)
        assert torch.equal(layer(x), y)
    assert fit(other, adapter(other), dtype=torch.float32)[-1] > 0


@kinds
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_goes_round(kind, assign):
    layer = ours(kind)
    state = layer.state_dict()
    names = ["weight", "bias", "lora_A", "lora_B"] + (["lora_magnitude_vector"] if "dora" in kind else [])
    assert sorted(state) == sorted(names)
    cls, options = KINDS[kind]
    other = cls.from_linear(linear(seed=5), **options)
    x = torch.randn(5, 12)
    with torch.no_grad():
        before = other(x)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert torch.equal(other(x), layer(x))
        assert not torch.equal(other(x), before)
    assert {n: bits(t) for n, t in other.state_dict().items()} == {n: bits(t) for n, t in state.items()}
    small = cls.from_linear(linear(), r=2)
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        small.load_state_dict(state)


@kinds
def test_casts_and_moves_reach_every_tensor(kind):
    layer = ours(kind).double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    x = torch.randn(5, 12, dtype=torch.float64)
    layer(x).sum().backward()
    assert {p.grad.dtype for p in adapter(layer)} == {torch.float64}
    layer.to("meta")
    assert all(p.is_meta for p in layer.parameters())


@simple_kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_it_compiles_into_one_graph(kind, dropout, bias):
    layer = ours(kind, lora_dropout=dropout, bias=bias)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(7, 12), torch.randn(7, 10)
    torch.manual_seed(4)
    y, grads = gradients(layer, adapter(layer), x, dy)
    torch.manual_seed(4)
    y_compiled, grads_compiled = gradients(compiled, adapter(layer), x, dy)
    assert torch.equal(y_compiled, y)
    for mine, its in zip(grads_compiled, grads, strict=True):
        assert torch.equal(mine, its)
    with torch.no_grad():
        layer.eval()
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("options", [{"detach_norm": False}, {"lora_dropout": 0.3, "dropout_semantics": "lora_only"}])
def test_the_options_of_dora_compile_too(options):
    layer = ours("dora", **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(2, 3, 12), torch.randn(2, 3, 10)
    results = []
    for module in (layer, compiled):
        torch.manual_seed(4)
        y, grads = gradients(module, adapter(layer), x, dy)
        results.append([y, *grads])
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)


@simple_kinds
def test_a_compiled_layer_sees_what_changes(kind):
    layer = ours(kind).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 12)
    changes = [
        lambda: layer.set_scale(2.0),
        lambda: layer.set_scale(0.3),
        lambda: layer.lora_B.data.mul_(2),
        lambda: layer.enable_adapter(False),
        layer.enable_adapter,
        layer.merge,
        layer.unmerge,
    ]
    with torch.no_grad():
        for change in changes:
            before = compiled(x)
            change()
            assert torch.equal(compiled(x), layer(x))
            assert not torch.equal(compiled(x), before)


def test_both_compile_with_inductor():
    model = nn.Sequential(ours("lora"), nn.GELU(), ours("dora", n_in=10, n_out=12))
    x = torch.randn(7, 12)
    compiled = torch.compile(model, fullgraph=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    found = torch.autograd.grad(compiled(x).square().sum(), parameters)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_gives_the_same_bits(kind, use_reentrant, dropout):
    layer = ours(kind, lora_dropout=dropout)
    x, dy = torch.randn(7, 12), torch.randn(7, 10)
    results = []
    for call in (layer, lambda t: checkpoint(layer, t, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(dy)
        results.append([bits(t) for t in (y, leaf.grad, *(p.grad for p in adapter(layer)))])
    assert results[0] == results[1]


@kinds
def test_a_step_is_the_same_when_run_twice(kind):
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        layer = ours(kind, lora_dropout=0.2)
        losses = fit(layer, adapter(layer), dtype=torch.float32)
        runs.append([bits(losses), *(bits(p) for p in adapter(layer))])
    assert runs[0] == runs[1]


@kinds
@pytest.mark.parametrize("grad", [False, True])
def test_threads_do_not_disturb_one_another(kind, grad):
    layer = ours(kind).eval()
    inputs = [torch.randn(n, 12) for n in (1, 5, 33, 64)]
    dys = [torch.randn(len(x), 10) for x in inputs]

    def call(x, dy):
        if not grad:
            with torch.no_grad():
                return [bits(layer(x))]
        y, grads = gradients(layer, adapter(layer), x, dy)
        return [bits(t) for t in (y, *grads)]

    expected = [call(x, dy) for x, dy in zip(inputs, dys, strict=True)]
    wrong = []
    start = threading.Barrier(len(inputs))

    def work(i):
        start.wait()
        wrong.extend(i for _ in range(50) if call(inputs[i], dys[i]) != expected[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_never_take_the_norm_of_earlier_weights():
    layer = ours("dora").eval()
    x = torch.randn(3, 12)
    first = layer.lora_B.detach().clone()
    with torch.no_grad():
        for step in range(20):
            layer.lora_B.data.copy_(first * (1 + step))
            results = []
            threads = [threading.Thread(target=append_output, args=(results, layer, x)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            expected = copy.deepcopy(layer)(x)
            assert len(results) == 3
            assert all(torch.equal(result, expected) for result in results)


@torch.no_grad()
def append_output(results, layer, x):
    results.append(layer(x))


def test_a_tied_weight_stays_tied():
    table = nn.Embedding(10, 12)
    head = nn.Linear(12, 10, bias=False)
    head.weight = table.weight
    layer = LoRALinear.from_linear(head, r=2)
    assert layer.weight is table.weight
    model = copy.deepcopy(nn.ModuleList([table, layer]))
    assert model[1].weight is model[0].weight


@simple_kinds
def test_a_hooked_layer_in_a_model_trains(kind):
    seen = []
    layer = ours(kind)
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    model = nn.Sequential(nn.Linear(4, 12), layer, nn.ReLU())
    model(torch.randn(3, 4)).sum().backward()
    assert seen == ["forward", "backward"]
    assert all(p.grad is not None for p in adapter(layer))
    assert model[0].weight.grad.any()


def test_the_cache_is_no_part_of_the_state():
    layer = DoRALinear(4, 4, r=2)
    assert isinstance(layer._norm, NormCache)
    assert not list(layer.buffers())
    assert copy.deepcopy(layer)._norm is not layer._norm
