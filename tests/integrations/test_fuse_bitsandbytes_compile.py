"""torch.compile of fused layers over bitsandbytes' weights: one graph of our ops, the bits of
eager, and every change of the base is seen."""

import pytest
import torch
import torch._dynamo.testing

from lora_kernels.integrations.peft import linear
from tests.integrations.fuse_helpers import fused_copy, gradients, quietly

pytest.importorskip("bitsandbytes")
from tests.integrations.bitsandbytes_helpers import edits, inputs, model

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_a(made):
    return made.get_submodule("base_model.model.a")


def compiled(one, backend="aot_eager"):
    return torch.compile(one, fullgraph=True, backend=backend)


def equal(call, fused, x):
    """The output and every gradient have the bits of eager."""
    torch.manual_seed(4)
    found = gradients(call, x)
    torch.manual_seed(4)
    wanted = gradients(fused, x)
    # the wrapper of torch.compile names the parameters after itself
    assert all(torch.equal(found[name if name in found else f"_orig_mod.{name}"], t) for name, t in wanted.items())


DROPPED_DORA = {"use_dora": True, "lora_dropout": 0.4}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind,compute,dtype,lora",
    [
        ("nf4", BF16, F32, DROPPED_DORA),
        ("int8", None, BF16, {}),
        pytest.param("nf4", BF16, F32, {}, marks=slow),
        pytest.param("fp4", None, F32, DROPPED_DORA, marks=slow),
        pytest.param("int8", None, BF16, DROPPED_DORA, marks=slow),
    ],
)
def test_the_bits_of_eager(kind, compute, dtype, lora):
    fused = fused_copy(model(kind, compute, nested=kind == "nf4", **lora)).train()
    call = compiled(fused)
    equal(call, fused, inputs(dtype))
    with torch.no_grad():
        fused.eval()
        assert torch.equal(call(inputs(dtype)), fused(inputs(dtype)))
    assert linear.fallbacks(layer_a(fused)) == {}


@slow
def test_inductor():
    layer = layer_a(fused_copy(model("nf4")))
    equal(compiled(layer, "inductor"), layer, inputs())


@torch.no_grad()
def test_the_graph_holds_our_ops():
    fused = fused_copy(model("nf4", use_dora=True))
    for disabled in (False, True):
        torch._dynamo.reset()
        backend = torch._dynamo.testing.EagerAndRecordGraphs()
        with fused.disable_adapter() if disabled else torch.no_grad():
            y = compiled(fused, backend)(inputs())
            assert torch.equal(y, fused(inputs()))
        (graph,) = backend.graphs
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert sum("lora_linear_forward" in call for call in calls) == 2
        assert not any("bitsandbytes" in call or "dequantise" in call for call in calls)


@slow
def test_autocast():
    fused = fused_copy(model("nf4", F32))
    with torch.autocast("cpu", BF16):
        equal(compiled(fused), fused, inputs())


@pytest.mark.parametrize("kind,nested", [pytest.param("nf4", False, marks=slow), ("nf4", True), ("int8", False)])
@torch.no_grad()
def test_edits_of_the_base_are_seen(kind, nested):
    fused, x = fused_copy(model(kind, nested=nested)), inputs()
    call = compiled(fused)
    before = call(x)
    for name, edit in edits(layer_a(fused).base_layer):
        edit()
        after = call(x)
        assert torch.equal(after, fused(x)) and not torch.equal(after, before), name
        before = after


@slow
def test_merged_packed_and_disabled():
    stock = model("nf4")
    fused, x = fused_copy(stock), inputs().requires_grad_()
    call = compiled(fused)
    before = call(x)
    for change in ("merge_adapter", "unmerge_adapter"):
        for one in (stock, fused):
            quietly(getattr(one, change))
        torch.testing.assert_close(call(x), stock(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(call(x), fused(x))
    assert not torch.equal(call(x), before)
    with stock.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(call(x), stock(x), rtol=1e-5, atol=1e-5)
