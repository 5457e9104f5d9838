"""torch.compile of fused models: one graph, the bits of eager, and every later change of the
adapter is seen."""

import copy

import peft
import pytest
import torch
import torch._dynamo.testing
from fuse_helpers import LLAMA_LAYERS, fused_copy, inputs, llama, model, pair, randomise, step, tokens
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

from lora_kernels import fuse, unfuse

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.4},
    "dora dropout": {"use_dora": True, "lora_dropout": 0.4},
}


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(one, backend="aot_eager"):
    return torch.compile(one, fullgraph=True, backend=backend)


def kernel_calls(one, x):
    """How often our op stands in the one graph of a model."""
    backend = torch._dynamo.testing.EagerAndRecordGraphs()
    compiled(one, backend)(x)
    (graph,) = backend.graphs
    return sum("lora_linear_forward" in str(node.target) for node in graph.graph.nodes)


def results(call, one, x):
    """The output and every gradient."""
    torch.manual_seed(4)
    x = x.clone().requires_grad_()
    y = call(x)
    wanted = [x, *(p for p in one.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), wanted)]


def equal(ones, others):
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_model_gives_the_bits_of_eager(kind, dtype):
    _, fused = pair(dtype, **KINDS[kind])
    call = compiled(fused)
    assert equal(results(call, fused, inputs(dtype)), results(fused, fused, inputs(dtype)))
    with torch.no_grad():
        fused.eval()
        assert torch.equal(call(inputs(dtype)), fused(inputs(dtype)))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_inductor_gives_the_bits_of_eager(use_dora):
    # one layer, all of it our ops and DoRA's division: elsewhere inductor's own functions may round
    # another way
    layer = pair(use_dora=use_dora)[1].base_model.model.a
    assert equal(results(compiled(layer, "inductor"), layer, inputs()), results(layer, layer, inputs()))


def test_the_graph_holds_our_op_and_not_pefts_formula():
    stock, fused = pair()
    _, dora = pair(use_dora=True)  # PEFT's own DoRA layer cannot be compiled as one graph
    with torch.no_grad():
        assert [kernel_calls(one, inputs()) for one in (stock, fused, dora)] == [0, 2, 2]


def test_a_model_compiled_first_and_fused_later():
    one = model()
    with torch.no_grad():
        call = compiled(one)
        expected = call(inputs())
        report = fuse(call)
        assert len(report.fused) == 2 and kernel_calls(one, inputs()) == 2
        torch.testing.assert_close(call(inputs()), expected)
        unfuse(call)
        assert torch.equal(call(inputs()), expected)


def set_active(one):
    one.add_adapter("other", peft.LoraConfig(r=2, target_modules=["a"]))
    randomise(one, 7)
    one.set_adapter("other")


CHANGES = {
    "weights in place": lambda one: randomise(one, 9),
    "weights by .data": lambda one: one.base_model.model.a.lora_B["default"].weight.data.mul_(2),
    "scale": lambda one: one.base_model.model.a.set_scale("default", 3.0),
    "another adapter": set_active,
    "disabled": lambda one: one.base_model.disable_adapter_layers(),
    "merged": lambda one: one.merge_adapter(),
    "two adapters": lambda one: (set_active(one), one.base_model.set_adapter(["default", "other"])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_compiled_model_sees_every_change(change):
    stock = model()
    fused = fused_copy(stock)
    call = compiled(fused)
    before = call(inputs())
    for one in (stock, fused):
        CHANGES[change](one)
    torch.testing.assert_close(call(inputs()), stock(inputs()))
    assert torch.equal(call(inputs()), fused(inputs()))
    # a merged adapter computes the same, by other means
    assert torch.allclose(before, call(inputs()), atol=1e-5) is (change == "merged")


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora dropout"])
def test_a_changing_scale_is_a_symbol_of_one_more_graph(kind):
    """PEFT's LoRA has two graphs, too; a graph for each value would reach the compiler's limit."""
    _, fused = pair(**KINDS[kind])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(fused, fullgraph=True, backend=counter)
    for factor in (1.0, 0.3, 2.7, -1.1):
        fused.base_model.model.a.set_scale("default", factor)
        assert equal(results(call, fused, inputs()), results(fused, fused, inputs()))
    assert counter.frame_count == 2


class Lookup(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Embedding(12, 24)

    def forward(self, ids):
        return self.a(ids)


class Window(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Conv1d(24, 8, 3)

    def forward(self, x):
        return self.a(x)


OTHERS = {
    "lora_bias": ({"lora_bias": True}, inputs()),
    "embedding": ({"net": Lookup, "target_modules": ["a"]}, torch.arange(6)),
    "convolution": ({"net": Window, "target_modules": ["a"]}, inputs().T[None].contiguous()),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_changing_scale_of_other_layers_is_a_symbol_too(kind):
    values, x = OTHERS[kind]
    _, fused = pair(**values)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(fused, fullgraph=True, backend=counter)
    with torch.no_grad():
        for factor in (1.0, 0.3, 2.7, -1.1):
            fused.base_model.model.a.set_scale("default", factor)
            torch.testing.assert_close(call(x), fused(x))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_a_changing_scale_in_inductor():
    layer = pair()[1].base_model.model.a
    call = compiled(layer, "inductor")
    for factor in (1.0, 0.3, 2.7):
        layer.set_scale("default", factor)
        assert equal(results(call, layer, inputs()), results(layer, layer, inputs()))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(24, 24)

    def forward(self, x):
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize("scales, graphs", [([1.0] * 12, 1), ([1 + i / 8 for i in range(12)], 2)], ids=["one", "twelve"])
def test_equal_blocks_with_scales_of_their_own_share_their_graphs(scales, graphs):
    _, fused = pair(net=lambda: torch.nn.Sequential(*(Block() for _ in range(12))), target_modules=["linear"], use_dora=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    blocks = fused.base_model.model
    for block, scale in zip(blocks, scales, strict=True):
        block.linear.set_scale("default", scale)
    with torch.no_grad():
        expected = fused(inputs())
        for block in blocks:
            block.compile(fullgraph=True, backend=counter)
        assert torch.equal(fused(inputs()), expected)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_scales_that_are_tensors_need_one_graph(use_dora):
    """As PEFT makes them for adapters that are swapped under a compiled model."""
    twelve = torch.nn.Sequential(*(Block() for _ in range(12)))
    _, fused = pair(net=lambda: twelve, target_modules=["linear"], use_dora=use_dora)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    blocks = fused.base_model.model
    for i, block in enumerate(blocks):
        block.linear.set_scale("default", 1 + i / 8)
    prepare_model_for_compiled_hotswap(fused, target_rank=4)
    with torch.no_grad():
        expected = fused(inputs())
        for block in blocks:
            block.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(fused(inputs()), expected)
    assert counter.frame_count == 1


def test_a_compiled_dora_model_sees_new_weights_without_gradients():
    stock, fused = pair(use_dora=True)
    call = compiled(fused)
    with torch.no_grad():
        for seed in (5, 6):
            for one in (stock, fused):
                randomise(one, seed)
            torch.testing.assert_close(call(inputs()), stock(inputs()))


def test_compiled_layers_of_a_llama():
    eager = fused_copy(model(net=llama, target_modules=LLAMA_LAYERS, task_type="CAUSAL_LM", use_dora=True)).train()
    other = copy.deepcopy(eager)
    for layer in other.get_base_model().model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    ones, others = step(eager, tokens()), step(other, tokens())
    assert ones.keys() == others.keys() and equal(ones.values(), others.values())
