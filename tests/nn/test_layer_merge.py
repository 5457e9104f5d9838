"""Merging: the adapted weight rounded once, in a parameter of the layer's own; the base parameter
back afterwards."""

import copy
import pickle

import pytest
import torch
from layer_helpers import KINDS, TOLERANCES, adapter, bits, ours, theirs, trained
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from lora_kernels.nn import DoRALinear, LoRAEmbedding, LoRALinear

kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LAYERS = [*KINDS, "embedding"]
layers = pytest.mark.parametrize("kind", LAYERS)


def make(kind, dtype=torch.float32):
    if kind != "embedding":
        return ours(kind, dtype).eval()
    torch.manual_seed(0)
    return LoRAEmbedding(12, 10, r=3, init_lora_weights=False, dtype=dtype).eval()


def adapted(layer):
    """The merged weight in float64."""
    embedding = isinstance(layer, LoRAEmbedding)
    pair = (layer.lora_embedding_A, layer.lora_embedding_B) if embedding else (layer.lora_A, layer.lora_B)
    a, b = (t.detach().double() for t in pair)
    delta = layer.scaling * (b @ a)
    weight = layer.weight.detach().double() + (delta.T if embedding else delta)
    if isinstance(layer, DoRALinear):
        weight *= (layer.lora_magnitude_vector.detach().double() / weight.norm(dim=1))[:, None]
    return weight


def example(layer):
    return torch.arange(12) if isinstance(layer, LoRAEmbedding) else torch.randn(7, 12).to(layer.weight)


@layers
@dtypes
@pytest.mark.parametrize("safe", [False, True])
def test_the_base_comes_back_bit_for_bit(kind, dtype, safe):
    layer = make(kind, dtype)
    x = example(layer)
    weight, base, place, exact = layer.weight, bits(layer.weight), layer.weight.data_ptr(), adapted(layer)
    y = layer(x).detach()
    for _ in range(3):
        layer.merge(safe=safe)
        assert layer.merged
        assert "merged=True" in repr(layer)
        assert layer.weight is not weight
        assert bits(weight) == base
        assert bits(layer.weight) != base
        assert bits(layer.weight) == bits(layer.weight.detach().to(dtype))
        rounding = (exact.to(dtype).double() - exact).norm()
        assert (layer.weight.detach().double() - exact).norm() <= 1.01 * rounding + 1e-6 * exact.norm()
        plain = F.embedding if kind == "embedding" else F.linear
        if kind == "embedding":
            assert torch.equal(layer(x), plain(x, layer.weight))
        else:
            assert torch.equal(layer(x), plain(x, layer.weight, layer.bias))
        coarse = {torch.bfloat16: 0.2, torch.float16: 2e-2}.get(dtype, 1e-4)
        torch.testing.assert_close(layer(x).detach(), y, rtol=coarse, atol=coarse)
        layer.unmerge()
        assert not layer.merged
        assert (bits(layer.weight), layer.weight.data_ptr()) == (base, place)
        assert layer.weight is weight
        assert torch.equal(layer(x), y)


@kinds
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_merged_weight_is_pefts(kind, dtype):
    layer = ours(kind, dtype)
    other = theirs(layer)
    layer.merge()
    other.merge()
    torch.testing.assert_close(layer.weight.detach(), other.get_base_layer().weight.detach(), **TOLERANCES[dtype])


@layers
def test_a_16_bit_merge_is_the_rounded_exact_weight(kind):
    layer = make(kind, torch.bfloat16)
    exact = adapted(layer)
    layer.merge()
    # one rounding to 8 bits is at most 2⁻⁸ off; a second, of BA say, would show
    assert ((layer.weight.detach().double() - exact).abs() / exact.abs()).max() <= 2**-8 * (1 + 1e-3)


def test_a_new_dora_layer_merges_to_its_base():
    torch.manual_seed(0)
    layer = DoRALinear(64, 48, r=4)
    base = bits(layer.weight)
    layer.merge(safe=True)
    assert bits(layer.weight) == base


@layers
def test_merging_twice_and_unmerging_twice_are_refused(kind):
    layer = make(kind)
    name = type(layer).__name__
    with pytest.raises(RuntimeError, match=rf"{name}: unmerge\(\) on a layer that is not merged"):
        layer.unmerge()
    layer.merge()
    merged = bits(layer.weight)
    with pytest.raises(RuntimeError, match=rf"{name}: merge\(\) on a merged layer; call unmerge\(\) first"):
        layer.merge()
    with pytest.raises(RuntimeError, match=rf"{name}: set_scale\(\) on a merged layer; call unmerge\(\) first"):
        layer.set_scale(2.0)
    assert bits(layer.weight) == merged
    layer.unmerge()
    layer.set_scale(2.0)


@layers
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_safe_merge_refuses_what_is_not_finite(kind, value):
    layer = make(kind)
    table = layer.lora_embedding_B if kind == "embedding" else layer.lora_B
    with torch.no_grad():
        table[2] = value
        if value == 1e38:
            layer.set_scale(100.0)
    base = bits(layer.weight)
    with pytest.raises(ValueError, match=r"merge\(safe=True\): the merged weight must be finite, found \d+ of 120"):
        layer.merge(safe=True)
    assert not layer.merged
    assert bits(layer.weight) == base


@layers
def test_off_a_merged_layer_is_its_base(kind):
    layer = make(kind)
    x = example(layer)
    with layer.adapter_disabled():
        base = layer(x)
    layer.merge()
    merged = layer(x)
    with layer.adapter_disabled():
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), merged)


@layers
def test_the_state_dict_of_a_merged_layer_is_the_plain_layers(kind):
    layer = make(kind)
    before = {name: bits(t) for name, t in layer.state_dict().items()}
    model = nn.Sequential(nn.Identity(), layer)
    layer.merge()
    merged = bits(layer.weight)
    plain = ["weight"] if kind == "embedding" else ["weight", "bias"]
    assert {name: bits(t) for name, t in layer.state_dict().items()} == {**{n: before[n] for n in plain}, "weight": merged}
    other = nn.Embedding(12, 10) if kind == "embedding" else nn.Linear(12, 10)
    other.load_state_dict(layer.state_dict())
    x = example(layer)
    assert torch.equal(other(x), layer(x))
    for state in (model.state_dict(), {"1.weight": layer.weight.detach()}):
        with pytest.raises(RuntimeError, match=r"1\. is merged: call unmerge\(\) before load_state_dict\(\)"):
            model.load_state_dict(state, strict=False)
    assert bits(layer.weight) == merged
    layer.load_state_dict({}, strict=False)
    state = layer.state_dict()
    layer.unmerge()
    assert {name: bits(t) for name, t in layer.state_dict().items()} == before
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)


@layers
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_merged_layer_can_be_unmerged(kind, copied):
    layer = make(kind)
    base = bits(layer.weight)
    layer.merge()
    other = copied(layer)
    assert other.merged
    assert bits(other.weight) == bits(layer.weight)
    layer.unmerge()
    assert other.merged
    other.unmerge()
    assert bits(other.weight) == base
    assert other.weight.data_ptr() != layer.weight.data_ptr()


@layers
def test_a_merged_layer_can_be_cast(kind):
    layer = make(kind)
    base = layer.weight.detach().clone()
    layer.merge()
    layer.bfloat16()
    layer.unmerge()
    assert layer.weight.dtype is torch.bfloat16
    assert torch.equal(layer.weight, base.bfloat16())


@kinds
def test_a_graph_from_before_a_merge_has_the_gradients_of_before(kind):
    layer = ours(kind)
    for change in (layer.merge, layer.unmerge):
        x = torch.randn(3, 12, requires_grad=True)
        (wanted,) = torch.autograd.grad(layer(x).sum(), x)
        y = layer(x)
        change()
        y.sum().backward()
        assert torch.equal(x.grad, wanted)
    layer(torch.randn(3, 12)).sum().backward()
    assert all(p.grad is not None for p in adapter(layer))


class Tied(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 10, dtype=dtype)
        self.head = nn.Linear(10, 12, bias=False, dtype=dtype)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


@pytest.mark.parametrize("side", ["head", "table", "both"])
@dtypes
def test_merging_a_tied_layer_leaves_what_it_is_tied_to(side, dtype):
    model = Tied(dtype)
    shared, base = model.table.weight, bits(model.table.weight)
    if side != "table":
        model.head = trained(LoRALinear.from_linear(model.head, r=3))
    if side != "head":
        model.table = trained(LoRAEmbedding.from_embedding(model.table, r=3))
    ids = torch.arange(12)
    adapted = [m for m in (model.head, model.table) if hasattr(m, "merge")]
    y = model(ids).detach()
    for layer in adapted:
        layer.merge()
    assert bits(shared) == base
    coarse = {torch.bfloat16: 0.1, torch.float16: 1e-2}.get(dtype, 1e-5)
    assert (model(ids) - y).norm() <= coarse * y.norm()
    copied = copy.deepcopy(model)
    for each in (model, copied):
        for layer in (each.head, each.table):
            if hasattr(layer, "unmerge"):
                layer.unmerge()
        assert each.head.weight is each.table.weight
        assert bits(each.table.weight) == base
        assert torch.equal(each(ids), y)
    assert model.table.weight is shared


def test_a_tied_layer_stays_tied_when_it_is_cast_while_merged():
    model = Tied(torch.float32)
    model.head = trained(LoRALinear.from_linear(model.head, r=3))
    model.head.merge()
    model.double()
    model.head.unmerge()
    assert model.head.weight is model.table.weight
    assert model.head.weight.dtype is torch.float64


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", nn.ReLU())


@layers
@pytest.mark.parametrize("change", [pruned, parametrized])
def test_a_weight_that_is_computed_is_not_merged_or_unmerged(kind, change):
    layer = make(kind)
    layer.requires_grad_(False)
    change(layer)
    x = example(layer)
    y, keys = layer(x), sorted(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"merge\(\) needs weight to be a parameter, but pruning or a parametrization"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer(x), y)
    assert sorted(layer.state_dict()) == keys
    layer = make(kind)
    layer.merge()
    change(layer)
    with pytest.raises(RuntimeError, match=r"unmerge\(\) needs weight to be a parameter"):
        layer.unmerge()
    assert layer.merged


@layers
def test_merging_in_inference_mode_leaves_a_layer_that_trains(kind):
    layer = make(kind)
    x = example(layer)
    with torch.inference_mode():
        y = layer(x)
        layer.merge()
        merged = layer(x)
    if kind != "embedding":
        layer(x.clone().requires_grad_()).sum().backward()
    torch.testing.assert_close(layer(x), merged)
    with torch.inference_mode():
        layer.unmerge()
    again = layer(x)
    again.sum().backward()
    assert torch.equal(again, y)


@layers
def test_a_layer_made_in_inference_mode_merges(kind):
    with torch.inference_mode():
        layer = make(kind)
        base = bits(layer.weight)
        layer(example(layer))
        layer.merge()
        layer(example(layer))
    layer.unmerge()
    assert bits(layer.weight) == base


def test_an_embedding_with_max_norm_is_not_merged():
    layer = LoRAEmbedding(5, 4, max_norm=1.0, r=2)
    with pytest.raises(ValueError, match="LoRAEmbedding: an embedding with max_norm cannot be merged"):
        layer.merge()
    assert not layer.merged
