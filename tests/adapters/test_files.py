"""Files: PEFT loads what we save, we load what PEFT saves, and a bad file changes nothing."""

import copy
import json
import os
import pickle
import socket
import struct
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter, save_adapter
from lora_kernels.nn import LoRALinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
B = "base_model.model.body.0.q.lora_B.weight"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(13, 12)
        self.body = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(12, 20), "o": nn.Linear(20, 12, bias=False), "norm": nn.LayerNorm(12)})
            for _ in range(2)
        )
        self.head = nn.Linear(12, 5)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.body:
            x = block["norm"](x + block["o"](torch.tanh(block["q"](x))))
        return self.head(x)


KINDS = {
    "lora": {"target_modules": ["q", "o"], "r": 4, "lora_alpha": 6},
    "rslora": {"target_modules": "all-linear", "r": 5, "use_rslora": True},
    "dora": {"target_modules": ["q", "o"], "r": 4, "use_dora": True},
    "patterns": {"target_modules": r".*\.(q|o)", "rank_pattern": {"o": 3, "0.q": 2}, "alpha_pattern": {"q": 2.5}},
    "bias all": {"target_modules": ["q"], "r": 2, "bias": "all", "use_dora": True},
    "bias lora_only": {"target_modules": ["q", "o"], "r": 2, "bias": "lora_only", "use_rslora": True},
    "embedding": {"target_modules": ["table", "q"], "r": 3, "lora_alpha": 5},
    "saved": {"target_modules": ["q"], "modules_to_save": ["head", "norm"]},
    "saved and bias": {"target_modules": ["q"], "modules_to_save": ["head"], "bias": "all"},
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(26).reshape(2, 13) % 13


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def trained(model):
    """Moves all that requires grad, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def injected(values, dtype=torch.float32):
    model = net(dtype)
    inject_adapter(model, LoraConfig(**values))
    return trained(model)


def wrapped(values, dtype=torch.float32, model=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trained(peft.get_peft_model(model or net(dtype), peft.LoraConfig(**values)).eval())


def assert_same_output(one, other, dtype):
    with torch.no_grad():
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(one(IDS), other(IDS), rtol=tolerance, atol=tolerance)


def assert_same_file(one, other):
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


class Snapshot:
    """Everything of a model that a failed call must leave as it was."""

    def __init__(self, model):
        self.before = self.snapshot(model)

    @staticmethod
    def snapshot(model):
        modules = {n: (id(m), type(m), m.training, set(vars(m))) for n, m in model.named_modules()}
        tensors = {
            name: (
                id(t),
                t.data_ptr(),
                t.dtype,
                t.requires_grad,
                bytes(t.detach().view(torch.uint8).flatten().tolist()),
            )
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        }
        return modules, tensors, getattr(model, "_lora_config", None), torch.get_rng_state().tolist()

    def check(self, model):
        assert self.snapshot(model) == self.before


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_save(kind, dtype, tmp_path):
    model = injected(KINDS[kind], dtype)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(dtype), str(tmp_path / "ours"), is_trainable=True).eval()
    assert_same_output(model, theirs, dtype)
    with torch.no_grad():
        assert not torch.allclose(model(IDS), net(dtype)(IDS), atol=1e-2)

    theirs.save_pretrained(tmp_path / "theirs")
    reloaded = load_file(tmp_path / "theirs" / WEIGHTS)
    for key, tensor in load_file(tmp_path / "ours" / WEIGHTS).items():
        assert torch.equal(reloaded[key], tensor), key


@dtypes
@pytest.mark.parametrize("into_layers", [False, True], ids=["plain", "injected"])
@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_peft_saves(kind, into_layers, dtype, tmp_path):
    theirs = wrapped(KINDS[kind], dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    model = net(dtype)
    base = {name: p.clone() for name, p in model.named_parameters()}
    if into_layers:
        inject_adapter(model, LoraConfig(**KINDS[kind]))
    with torch.no_grad():
        before = model(IDS)
    names = load_adapter(model, tmp_path / "theirs")
    assert names == [n for n, m in model.named_modules() if hasattr(m, "lora_alpha")]
    assert_same_output(model, theirs, dtype)
    with torch.no_grad():
        assert not torch.equal(model(IDS), before)
    for name, weight in base.items():
        if not name.endswith("bias") and "head" not in name and "norm" not in name:
            assert torch.equal(dict(model.named_parameters())[name], weight), name

    save_adapter(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    written = load_file(tmp_path / "theirs" / WEIGHTS)
    # for modules_to_save with bias="all" PEFT also writes the biases of both copies
    assert {k for k in written if "modules_to_save" not in k and "original_module" not in k} == again.keys()
    for key, tensor in again.items():
        assert torch.equal(written[key].to(tensor.dtype), tensor), key


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_round_trip_is_bitwise(kind, tmp_path):
    model = injected(KINDS[kind])
    save_adapter(model, tmp_path / "one")
    plain, layered = net(), net()
    inject_adapter(layered, LoraConfig.from_pretrained(tmp_path / "one"))
    for other in (plain, layered):
        load_adapter(other, tmp_path / "one")
        save_adapter(other, tmp_path / "two")
        assert_same_file(tmp_path / "one", tmp_path / "two")
        assert (tmp_path / "one" / CONFIG).read_text() == (tmp_path / "two" / CONFIG).read_text()
        with torch.no_grad():
            assert torch.equal(other(IDS), model(IDS))


def test_the_file_is_pefts(tmp_path):
    save_adapter(injected(KINDS["bias all"]), tmp_path / "ours")
    wrapped(KINDS["bias all"]).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}
    content = (tmp_path / "ours" / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}
    assert sorted(os.listdir(tmp_path / "ours")) == [CONFIG, WEIGHTS]
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["inference_mode"] is True


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_goes_both_ways(kind, tmp_path):
    def classifier():
        torch.manual_seed(0)
        if kind == "bert":
            return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32, **SIZES)).eval()
        config = transformers.LlamaConfig(vocab_size=32, pad_token_id=0, num_key_value_heads=2, **SIZES)
        return transformers.LlamaForSequenceClassification(config).eval()

    values = {"target_modules": "all-linear", "task_type": "SEQ_CLS", "r": 2}
    theirs = wrapped(values, model=classifier())
    theirs.save_pretrained(tmp_path / "theirs")
    model = classifier()
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(classifier(), str(tmp_path / "ours")).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits)
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_is_never_repeated_by_loading(init, tmp_path):
    values = {**KINDS["lora"], "init_lora_weights": init}
    theirs = wrapped(values)
    theirs.save_pretrained(tmp_path)
    model = net()
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=f"init_lora_weights='{init}' means"):
        load_adapter(model, tmp_path)
    unchanged.check(model)

    inject_adapter(model, LoraConfig.from_pretrained(tmp_path))
    load_adapter(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", False])
def test_any_other_initialisation_is_inert_on_load(init, tmp_path):
    model = injected(KINDS["lora"])
    save_adapter(model, tmp_path)
    edit(tmp_path, init_lora_weights=init)
    other = net()
    load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("trainable", [False, True])
def test_is_trainable(trainable, tmp_path):
    save_adapter(injected(KINDS["saved and bias"]), tmp_path)
    model = net()
    load_adapter(model, tmp_path, is_trainable=trainable)
    flags = {name for name, p in model.named_parameters() if p.requires_grad}
    fresh = net()
    inject_adapter(fresh, LoraConfig(**KINDS["saved and bias"]))
    assert flags == ({name for name, p in fresh.named_parameters() if p.requires_grad} if trainable else set())
    load_adapter(fresh, tmp_path)
    assert any(p.requires_grad for p in fresh.parameters())


def edit(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **SIZES)
    return transformers.LlamaForCausalLM(config).eval()


def test_repeated_base_weights_of_embeddings_must_match_or_be_asked_for(tmp_path):
    theirs = wrapped({"target_modules": ["embed_tokens", "q_proj"], "r": 2}, model=llama())
    with torch.no_grad():
        theirs.get_base_model().model.embed_tokens.base_layer.weight[3] += 1
    theirs.save_pretrained(tmp_path / "changed")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / "changed" / WEIGHTS)
    model = llama()
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=f"{key} differs from the base weight .* load_embedding_layers=True"):
        load_adapter(model, tmp_path / "changed")
    unchanged.check(model)
    load_adapter(model, tmp_path / "changed", load_embedding_layers=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits)

    save_adapter(model, tmp_path / "whole", save_embedding_layers=True)
    saved = load_file(tmp_path / "whole" / WEIGHTS)
    assert {key, "base_model.model.lm_head.weight"} <= saved.keys()
    back = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "whole")).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(IDS).logits, theirs(IDS).logits)


def test_what_cannot_be_saved_is_refused_and_an_older_adapter_stays(tmp_path, monkeypatch):
    with pytest.raises(AdapterError, match="the model has no adapter"):
        save_adapter(net(), tmp_path / "new")
    model = injected(KINDS["lora"])
    save_adapter(model, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    with pytest.raises(AdapterError, match=r"config: r is 16 for body\.0\.q, in the model it is 4"):
        save_adapter(model, tmp_path, LoraConfig(**{**KINDS["lora"], "r": 16}))
    with pytest.raises(AdapterError, match=r"also has one at body\.0\.o, body\.1\.o"):
        save_adapter(model, tmp_path, LoraConfig(target_modules=["q"], r=4, lora_alpha=6))
    with torch.no_grad():
        model.body[0].q.lora_B[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=f"{B} has 1 of 80 values that are not finite"):
        save_adapter(model, tmp_path)
    with torch.no_grad():
        model.body[0].q.lora_B[0, 0] = 1.0

    written = []

    def disk_is_full(_):
        written.append(1)
        if len(written) == 2:
            raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(injected({**KINDS["lora"], "lora_alpha": 60}), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    assert before == {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="must be a directory"):
        save_adapter(model, tmp_path / "file")


def test_a_link_is_replaced_and_its_target_is_not_touched(tmp_path):
    (tmp_path / "precious").write_text("precious")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / WEIGHTS).symlink_to(tmp_path / "precious")
    save_adapter(injected(KINDS["lora"]), folder)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (folder / WEIGHTS).is_symlink()


def test_layers_put_in_by_hand_are_saved_with_a_config(tmp_path):
    model = net().requires_grad_(False)
    model.head = LoRALinear.from_linear(model.head, r=2, lora_alpha=4)
    trained(model)
    with pytest.raises(AdapterError, match="give config="):
        save_adapter(model, tmp_path)
    save_adapter(model, tmp_path, LoraConfig(target_modules=["head"], r=2, lora_alpha=4))
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    assert_same_output(model, theirs, torch.float32)


def test_a_changed_scale_is_not_lost_in_silence(tmp_path):
    model = injected(KINDS["lora"])
    model.body[0].q.set_scale(3.0)
    with pytest.warns(UserWarning, match=r"set_scale is not saved; changed in body\.0\.q"):
        save_adapter(model, tmp_path)


def test_a_copy_of_the_model_saves_the_same(tmp_path):
    model = injected(KINDS["dora"])
    save_adapter(model, tmp_path / "one")
    save_adapter(pickle.loads(pickle.dumps(copy.deepcopy(model))), tmp_path / "two")
    assert_same_file(tmp_path / "one", tmp_path / "two")
