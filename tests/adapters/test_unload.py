"""A model with adapters as a plain one: merged and unloaded, unloaded, or with its adapters off."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lora_kernels import adapter_disabled, merge_and_unload, unload
from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter, save_adapter
from lora_kernels.nn import LoRALinear

KINDS = {
    "lora": {"target_modules": ["q", "o"], "r": 4},
    "dora": {"target_modules": ["q", "o", "head"], "r": 4, "use_dora": True},
    "embedding": {"target_modules": ["table", "q"], "r": 3, "bias": "lora_only"},
    "saved": {"target_modules": ["q"], "modules_to_save": ["head"], "bias": "all"},
}
IDS = torch.arange(26).reshape(2, 13) % 13
kinds = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(13, 12)
        self.q, self.o = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, ids):
        return self.head(self.norm(self.o(torch.tanh(self.q(self.table(ids))))))


def net():
    torch.manual_seed(0)
    model = Net()
    model.q.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    return model


def trained(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def injected(kind):
    model = net()
    inject_adapter(model, LoraConfig(**KINDS[kind]))
    return trained(model)


def shape_of(model):
    return (
        [(name, type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        sorted(model.state_dict()),
    )


def output(model):
    with torch.no_grad():
        return model(IDS)


@kinds
@pytest.mark.parametrize("safe", [False, True])
def test_a_merged_and_unloaded_model_is_a_plain_one(kind, safe):
    model = injected(kind).eval()
    y = output(model)
    assert merge_and_unload(model, safe=safe) is model
    assert shape_of(model) == shape_of(net().eval())
    torch.testing.assert_close(output(model), y, rtol=1e-5, atol=1e-5)
    plain = net()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output(plain), output(model))
    inject_adapter(model, LoraConfig(**KINDS[kind]))


@kinds
def test_an_unloaded_model_is_the_one_of_before(kind):
    base, model = net(), injected(kind)
    unload(model)
    assert shape_of(model) == shape_of(base)
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(output(model), output(base))


@kinds
@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double(), lambda m: m])
def test_in_the_block_the_model_is_its_base(kind, change):
    model = change(injected(kind))
    base = net().to(model.q.weight.dtype)
    y, reference = output(model), output(base)
    assert not torch.allclose(y, reference, atol=1e-2)
    with adapter_disabled(model):
        assert torch.equal(output(model), reference)
        with adapter_disabled(model):
            assert torch.equal(output(model), reference)
        assert torch.equal(output(model), reference)
    assert torch.equal(output(model), y)
    with pytest.raises(ZeroDivisionError), adapter_disabled(model):
        1 / 0  # noqa: B018
    assert torch.equal(output(model), y)
    flags = [(n, p.requires_grad) for n, p in injected(kind).named_parameters()]
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags


@kinds
def test_a_loaded_adapter_has_the_same_base(kind, tmp_path):
    save_adapter(injected(kind), tmp_path)
    model, base = net(), net()
    load_adapter(model, tmp_path)
    with adapter_disabled(model):
        assert torch.equal(output(model), output(base))
    y = output(model)
    again = copy.deepcopy(model)
    torch.testing.assert_close(output(merge_and_unload(model)), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(output(unload(again)), output(base))
    assert shape_of(model) == shape_of(again) == shape_of(base)


def test_the_reference_is_pefts():
    values = {"target_modules": ["q"], "modules_to_save": ["head"]}
    model = net()
    inject_adapter(model, LoraConfig(**values))
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**values))
    trained(model), trained(theirs)
    with adapter_disabled(model), theirs.disable_adapter():
        torch.testing.assert_close(output(model), output(theirs))


def test_merged_layers_and_layers_put_in_by_hand_are_unloaded_too():
    model, base = net(), net()
    model.head = trained(LoRALinear.from_linear(model.head, r=2))
    shared = base.head.requires_grad_(True)
    y = output(model)
    model.head.merge()
    again = copy.deepcopy(model)
    merge_and_unload(model)
    torch.testing.assert_close(output(model), y, rtol=1e-5, atol=1e-5)
    unload(again)
    assert torch.equal(output(again), output(base))
    for each in (model, again):
        assert type(each.head) is nn.Linear
        assert [p.requires_grad for p in each.head.parameters()] == [p.requires_grad for p in shared.parameters()]


def test_hooks_and_attributes_of_the_plain_module_stay():
    model, calls = net().eval(), []
    model.q.mark = "mine"
    handle = model.q.register_forward_hook(lambda *_: calls.append(1))
    inject_adapter(model, LoraConfig(target_modules=["q"]))
    merge_and_unload(model)
    output(model)
    assert (calls, model.q.mark, model.q.training) == ([1], "mine", False)
    handle.remove()
    output(model)
    assert calls == [1]


def test_what_cannot_be_merged_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4, max_norm=1.0))
    inject_adapter(model, LoraConfig(target_modules=["0", "1"]))
    with pytest.raises(ValueError, match="an embedding with max_norm cannot be merged"):
        merge_and_unload(model)
    assert isinstance(model[0], LoRALinear)
    model = net()
    inject_adapter(model, LoraConfig(target_modules=["q", "o"]))
    with torch.no_grad():
        model.o.lora_B[0] = float("inf")
    with pytest.raises(ValueError, match="must be finite"):
        merge_and_unload(model, safe=True)
    assert isinstance(model.q, LoRALinear)
    for function in (merge_and_unload, unload, lambda m: adapter_disabled(m).__enter__()):
        with pytest.raises(AdapterError, match="the model has no adapter"):
            function(net())


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_a_residual_is_no_base(init):
    model = net()
    y = output(model)
    inject_adapter(model, LoraConfig(target_modules=["q"], init_lora_weights=init))
    with pytest.raises(AdapterError, match="base weights are residuals .* at q"), adapter_disabled(model):
        pass
    with pytest.raises(RuntimeError, match="the weight is a residual; merge it"):
        unload(model)
    torch.testing.assert_close(output(merge_and_unload(model)), y, rtol=1e-4, atol=1e-5)
    assert shape_of(model) == shape_of(net())


def llama(tie):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("way", ["merge", "merge_and_unload"])
@pytest.mark.parametrize("target", ["q_proj", "lm_head", "embed_tokens"])
@pytest.mark.parametrize("tie", [False, True])
def test_save_pretrained_of_a_merged_model_writes_the_merged_weights(tie, target, way, tmp_path):
    model = llama(tie)
    inject_adapter(model, LoraConfig(target_modules=[target], r=4, init_lora_weights=False))
    with torch.no_grad():
        y = model(IDS).logits
    if way == "merge":
        for layer in model.modules():
            if hasattr(layer, "merge"):
                layer.merge()
    else:
        merge_and_unload(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not any("lora" in key for key in load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, y, rtol=1e-4, atol=1e-5)
