"""Modules that take a layer's weight without calling the layer: torch's encoder is kept off that
path, others are named."""

import copy
import pickle
from importlib import import_module

import peft
import pytest
import torch
from fuse_helpers import fused_copy, model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from lora_kernels import LoraConfig, fuse, inject_adapter, integrations, load_adapter, save_adapter, unfuse
from lora_kernels.integrations import peft as ours
from lora_kernels.nn import LoRALinear
from lora_kernels.nn.passed_over import weights_read


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2).eval()


def by_hand():
    one = encoder()
    for layer in one.layers:
        layer.linear1, layer.linear2 = LoRALinear.from_linear(layer.linear1), LoRALinear.from_linear(layer.linear2)
    fuse(one)
    return one


def injected():
    one = encoder()
    inject_adapter(one, LoraConfig(r=4, target_modules=["linear1", "linear2"]))
    return one


def fused(**values):
    return fused_copy(model(net=encoder, target_modules=["linear1", "linear2"], **values))


MADE = {"fuse": fused, "fuse with DoRA": lambda: fused(use_dora=True), "inject_adapter": injected, "by hand": by_hand}
each_way = pytest.mark.parametrize("way", MADE)


def made(way):
    torch.manual_seed(0)
    one = MADE[way]().eval()
    with torch.no_grad():
        for name, p in one.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.normal_(std=0.3)
    return one


def x():
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))


def right(one, **keywords):
    """Whether eval mode gives what train mode does, which with no dropout are the same numbers."""
    with torch.no_grad():
        found = one(x(), **keywords)
        wanted = one.train()(x(), **keywords)
    one.eval()
    keep = ~keywords["src_key_padding_mask"] if keywords else torch.ones(3, 5, dtype=torch.bool)
    return torch.allclose(found[keep], wanted[keep], atol=1e-5)


PADDED = {"src_key_padding_mask": torch.arange(5) >= torch.tensor([[5], [3], [2]])}


@each_way
@pytest.mark.parametrize("keywords", [{}, PADDED], ids=["whole", "padded"])
def test_eval_is_train_without_dropout(way, keywords):
    one = made(way)
    assert right(one, **keywords)
    assert right(copy.deepcopy(one), **keywords)
    assert right(pickle.loads(pickle.dumps(one)), **keywords)


def test_a_single_encoder_layer():
    one = model(net=lambda: encoder().layers[0], target_modules=["linear1"]).eval()
    assert not right(one)  # PEFT's own
    report = fuse(one)
    assert right(one) and list(report.kept_off) == ["base_model.model"]


def test_the_report_and_unfuse():
    stock = model(net=encoder, target_modules=["linear1"]).eval()
    before = [dict(vars(m)) for m in stock.modules()]
    with torch.no_grad():
        plain = stock(x())
    report = fuse(stock)
    again = fuse(stock)
    assert report.kept_off == again.kept_off and len(report.kept_off) == 3 and len(report.fused) == 2
    assert "TransformerEncoderLayer takes weights without calling the layers: 2 modules: base_model.model.l" in str(report)
    unfuse(stock)
    assert [vars(m).keys() for m in stock.modules()] == [b.keys() for b in before]
    assert [m.activation_relu_or_gelu for m in stock.modules() if isinstance(m, nn.TransformerEncoderLayer)] == [1, 1]
    with torch.no_grad():
        assert torch.equal(stock(x()), plain)


def test_unfuse_leaves_native_layers_right():
    one = made("inject_adapter")
    fuse(one)
    unfuse(one)
    assert right(one)


def test_a_loaded_adapter(tmp_path):
    save_adapter(made("inject_adapter"), tmp_path)
    torch.manual_seed(0)
    one = encoder()
    load_adapter(one, tmp_path)
    assert right(one)


@pytest.mark.parametrize("fails", [(ours, "fuse_classes"), (integrations, "leave_fast_path")], ids=lambda place: place[1])
def test_a_fuse_that_fails_leaves_the_encoder(fails, monkeypatch):
    one = model(net=encoder, target_modules=["linear1"]).eval()
    before = [dict(vars(m)) for m in one.modules()]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*fails, interrupted)
        fuse(one)
    assert [vars(m).keys() for m in one.modules()] == [b.keys() for b in before]
    assert all(m.activation_relu_or_gelu == 1 for m in one.modules() if isinstance(m, nn.TransformerEncoderLayer))


def test_other_encoders_stay_on_their_path():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = encoder(), encoder()

    one = model(net=Two, target_modules=r"first\..*linear1")
    fuse(one)
    switches = {n: m.activation_relu_or_gelu for n, m in one.named_modules() if isinstance(m, nn.TransformerEncoderLayer)}
    assert [on for n, on in switches.items() if "second" in n] == [1, 1] and sum(switches.values()) == 2


def mamba():
    return MambaForCausalLM(MambaConfig(hidden_size=16, vocab_size=20, num_hidden_layers=1))


def test_weights_that_fused_kernels_take():
    """PEFT itself refuses out_proj there, and the others not."""
    one = model(net=mamba, target_modules=["in_proj", "x_proj", "dt_proj"])
    report = fuse(one)
    assert {name.rpartition(".")[2] for name in report.left} == {"x_proj", "dt_proj"}
    assert set(report.left.values()) == {"MambaMixer may compute with its weight without calling the layer"}
    assert {name.rpartition(".")[2] for name in report.fused} == {"in_proj"}
    with pytest.raises(ValueError, match="may compute with its weight"):
        fuse(one, strict=True)
    stock = copy.deepcopy(one)
    unfuse(stock)
    ids = torch.randint(20, (1, 6))
    torch.testing.assert_close(one(ids).logits, stock(ids).logits)  # what does call them runs as before


@pytest.mark.parametrize(
    "kind, wanted",
    [
        ("bamba.BambaMixer", {"out_proj"}),
        ("mamba2.Mamba2Mixer", {"out_proj"}),
        ("wavlm.WavLMAttention", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("deberta.DisentangledSelfAttention", {"in_proj"}),
        ("llama.LlamaForCausalLM", set()),
        ("t5.T5DenseGatedActDense", set()),
        ("bloom.BloomAttention", set()),
        ("gpt2.GPT2Attention", set()),
    ],
)
def test_models_of_transformers(kind, wanted):
    module, name = kind.split(".")
    found = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), name)
    assert {each for each in weights_read(found) if each.endswith("proj") or not wanted} == wanted


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.init_weight = self.a.weight

    def reset(self):
        self.b.weight.data.zero_()

    def forward(self, x):
        if not isinstance(self.c.weight, torch.Tensor) or x.dtype is not self.d.weight.dtype:
            return x
        return torch.nn.functional.linear(x, self.a.weight) @ self.b.weight


class Inherits(Reads):
    @torch.no_grad()
    def other(self, x):
        return self.c.weight.t() @ x


def test_what_a_source_says():
    assert weights_read(Reads) == {"a", "b"} and weights_read(Inherits) == {"a", "b", "c"}
    assert weights_read(type("Made", (nn.Module,), {"forward": lambda self, x: x @ self.a.weight})) == {"a"}
    unseen = {}
    exec("def forward(self, x):\n    return x @ self.a.weight", unseen)  # without a source
    assert not weights_read(type("Unseen", (nn.Module,), {"forward": unseen["forward"]}))
    assert not weights_read(nn.Sequential)


def test_an_attention_of_torch_is_named():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    one = peft.get_peft_model(Attends(), peft.LoraConfig(target_modules=["out_proj"]))
    report = fuse(one)
    assert list(report.left.values()) == ["MultiheadAttention may compute with its weight without calling the layer"]
