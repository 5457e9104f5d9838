"""PEFT's MultiheadAttention over time: no weight is merged, what stays PEFT's is named."""

import copy
import pickle

import peft
import pytest
import torch
from attention_helpers import BATCH, HEADS, NAME, WIDTH, Net, made, masks, results, right, tensors
from fuse_helpers import errs_as_stock, randomise
from peft.tuners.lora import layer as peft_layer
from torch import nn

from lora_kernels import fuse, unfuse
from lora_kernels.integrations.peft import FusedMultiheadAttention, attention


def test_weights_stay_and_no_module_is_called():
    """PEFT makes a new parameter in each call, of W + sBA - sBA."""
    stock = made()
    fused, _ = right(stock, tensors())
    base = fused.base_model.model.attention.base_layer
    held = [base.in_proj_weight, base.out_proj.base_layer.weight]
    bits = [p.detach().clone() for p in held]
    for _ in range(3):
        fused(*tensors())[0].sum().backward()
    assert held[0] is base.in_proj_weight and held[1] is base.out_proj.base_layer.weight
    assert all(map(torch.equal, held, bits))


def test_states_that_change():
    stock = made()
    stock.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=2, target_modules=["attention"]))
    randomise(stock)
    fused = copy.deepcopy(stock)
    report, qkv = fuse(fused), tensors("cross")
    for change in (
        lambda one: one.set_adapter("other"),
        lambda one: one.base_model.set_adapter(["default", "other"]),
        lambda one: one.set_adapter("default"),
        lambda one: one.merge_adapter(),
        lambda one: one.unmerge_adapter(),
        lambda one: one.base_model.disable_adapter_layers(),
        lambda one: one.base_model.enable_adapter_layers(),
    ):
        for one in (stock, fused):
            change(one)
        found, theirs = results(fused, qkv), results(stock, qkv)
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    reasons = [
        "several adapters are active, of which PEFT's MultiheadAttention trains the last alone",
        "an adapter is merged into the base weight",
        "the adapters are disabled",
    ]
    assert report.fallbacks() == {NAME: dict.fromkeys(reasons, 2)}


def test_steps_and_files(tmp_path):
    stock = made()
    fused = copy.deepcopy(stock)
    fuse(fused)
    for one in (stock, fused):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            one(*tensors("three", seed=step))[0].square().mean().backward()
            optimizer.step()
    state = fused.state_dict()
    torch.testing.assert_close(state, stock.state_dict(), rtol=1e-4, atol=1e-6)
    fused.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    fuse(loaded, strict=True)
    base = loaded.base_model.model.attention.base_layer
    with torch.no_grad():
        for p, source in zip(base.parameters(), fused.base_model.model.attention.base_layer.parameters(), strict=True):
            p.copy_(source)
    torch.testing.assert_close(loaded(*tensors())[0], fused(*tensors())[0])
    merged = fused.merge_and_unload()
    assert type(merged.attention) is nn.MultiheadAttention
    torch.testing.assert_close(merged(*tensors())[0], stock(*tensors())[0], rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_unfuse():
    stock = made()
    fused, _ = right(stock, tensors())
    for one in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(one.base_model.model.attention) is FusedMultiheadAttention
        torch.testing.assert_close(one(*tensors()), stock(*tensors()))
    assert fused.state_dict().keys() == stock.state_dict().keys()
    unfuse(fused)
    assert {type(m) for m in fused.modules()} == {type(m) for m in stock.modules()}
    torch.testing.assert_close(fused(*tensors()), stock(*tensors()))


def test_autocast():
    stock = made(add_bias_kv=True)
    fused = copy.deepcopy(stock)
    report, found = fuse(fused), []
    for one in (fused, stock):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(results(one, tensors("cross")))
    exact = results(copy.deepcopy(stock).double(), tensors("cross", torch.float64))
    errs_as_stock(*found, exact, 3)
    assert not report.fallbacks()


def test_calls_that_are_pefts():
    stock = made()
    fused = copy.deepcopy(stock)
    report, (q, k, v) = fuse(fused), tensors("three")
    padding, each = masks("bool")
    x = tensors()[0]
    reasons = []
    for args, kwargs, reason in (
        ((q, k), {}, "the arguments are not those of attention"),
        ((q, k, v), {"adapter_names": ["default"] * BATCH}, "the arguments are not those of attention"),
        ((q[..., :6], k, v), {}, "query, key and value are (5, 3, 6), (7, 3, 12), (7, 3, 12)"),
        ((q, k, v[1:]), {}, "query, key and value are (5, 3, 12), (7, 3, 12), (6, 3, 12)"),
        ((q, k.double(), v), {}, "query, key and value are torch.float32, torch.float64 and torch.float32"),
        ((q.double(), k.double(), v.double()), {}, "the input is torch.float64, the base weight torch.float32"),
        ((x, x, x), {"attn_mask": each[:, :2]}, "attn_mask is (6, 2, 5)"),
        ((x, x, x), {"key_padding_mask": padding[:2]}, "key_padding_mask is (2, 5)"),
        ((x, x, x), {"attn_mask": each.int()}, "a mask is torch.int32"),
        ((x, x, x), {"is_causal": True}, "is_causal without attn_mask"),
        ((x, x, x), {"attn_mask": each.float(), "key_padding_mask": padding}, "the masks are torch.bool and torch.float32"),
    ):
        wanted, found = (outcome(one.base_model.model.attention, args, kwargs) for one in (stock, fused))
        assert type(found) is type(wanted) and (isinstance(wanted, tuple) or str(found).replace("Fused", "") == str(wanted))
        reasons.append(reason)
    vmapped = torch.func.vmap(fused)(x[None], x[None], x[None])
    torch.testing.assert_close(vmapped[0][0], stock(x, x, x)[0])
    reasons.append("a functional transform, a trace or forward-mode differentiation is under way")
    counts = report.fallbacks()[NAME]
    assert set(counts) == set(reasons) and sum(counts.values()) == len(reasons)


def outcome(one, args, kwargs):
    try:
        return one(*args, **kwargs)
    except Exception as error:
        return error


def test_layers_that_are_pefts():
    def hooked(layer):
        layer.base_layer.register_forward_hook(lambda module, args, y: None)

    def trained(layer):
        layer.base_layer.in_proj_weight.requires_grad_()

    def other_state(layer):
        layer.base_layer.out_proj.merge()

    for change, reason in (
        (hooked, "base_layer is MultiheadAttention, or a hook waits for its call"),
        (trained, "the base weight requires grad"),
        (other_state, "the adapters of out_proj are in another state than the layer's"),
    ):
        one = made()
        change(one.base_model.model.attention)
        assert fuse(one).left == {NAME: reason}
    config = peft.LoraConfig(r=4, target_modules=["attention"])
    one = peft.get_peft_model(Net(), config, low_cpu_mem_usage=True)
    assert "meta device" in fuse(one).left[NAME]


@pytest.mark.parametrize("terms", [(1.0, 1.0), (1.0, 0.0)])
def test_another_peft_that_adds_out_projs_adapter_once(terms, monkeypatch):
    """The installed one is asked, not its version."""
    merge, unmerge = peft_layer.MultiheadAttention.merge, peft_layer.MultiheadAttention.unmerge

    def delta(layer, name):
        inner = layer.base_layer.out_proj
        return inner.base_layer, inner.get_delta_weight(name).detach()

    def merge_once(self, safe_merge=False, adapter_names=None):
        merge(self, safe_merge, adapter_names)
        for name in adapter_names:
            inner, d = delta(self, name)
            inner.weight = inner.weight - d if terms[1] else (inner.weight - d).detach()

    def unmerge_once(self):
        inner, d = delta(self, self.merged_adapters[0])
        inner.weight = inner.weight + d
        unmerge(self)

    assert attention.out_proj_terms() == (2.0, 1.0)
    monkeypatch.setattr(peft_layer.MultiheadAttention, "merge", merge_once)
    monkeypatch.setattr(peft_layer.MultiheadAttention, "unmerge", unmerge_once)
    monkeypatch.setattr(attention, "_terms", None)
    stock = made()
    fused = copy.deepcopy(stock)
    state = torch.get_rng_state()
    fuse(fused)
    assert torch.equal(state, torch.get_rng_state()) and attention.out_proj_terms() == terms
    found, theirs = (results(one, tensors()) for one in (fused, stock))
    if not terms[1]:
        # ours are zeros there
        assert not any("out_proj" in name for name in found)
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


def test_second_derivatives_checkpoints_and_compile():
    stock = made()
    fused = copy.deepcopy(stock)
    report, found = fuse(fused), []
    for one in (fused, stock, copy.deepcopy(stock).double()):
        layer = one.base_model.model.attention
        q, k, v = (t.requires_grad_() for t in tensors("three", layer.base_layer.in_proj_weight.dtype))
        b = layer.lora_B["default"].weight
        (g,) = torch.autograd.grad(one(q, k, v)[0].tanh().sum(), q, create_graph=True)
        found.append(dict(zip("bk", torch.autograd.grad(g.square().sum(), [b, k]), strict=True)))
    errs_as_stock(*found)
    wanted, again = (results(one, tensors()) for one in (stock, Checkpointed(fused)))
    torch.testing.assert_close({n.removeprefix("inner."): t for n, t in again.items()}, wanted, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors()), stock(*tensors()))
    assert not report.fallbacks()


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return torch.utils.checkpoint.checkpoint(self.inner, *args, use_reentrant=False)


def test_within_torchs_encoder_layer():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)

        def forward(self, x, mask):
            return self.encoder(x, src_key_padding_mask=mask)

    torch.manual_seed(0)
    stock = peft.get_peft_model(Encoder(), peft.LoraConfig(r=4, target_modules=["self_attn", "linear1"]))
    randomise(stock)
    fused = copy.deepcopy(stock)
    report, x = fuse(fused), tensors(batch_first=True)[0]
    assert len(report.fused) == 2 and not report.left and len(report.kept_off) == 1
    for one in (stock, fused):
        one(x, masks("bool")[0]).square().mean().backward()
    found, wanted = ({n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (fused, stock))
    assert len(found) == 6
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert not report.fallbacks()
