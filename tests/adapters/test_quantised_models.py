"""Models whose linears are bitsandbytes': adapters put in, saved, loaded, merged and taken out."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from lora_kernels import LoraConfig, adapter_disabled, inject_adapter, load_adapter, merge_and_unload, save_adapter, unload
from lora_kernels.adapters.config import AdapterError
from lora_kernels.nn import DoRALinear, LoRALinear
from lora_kernels.testing.tolerances import rms
from tests.nn.layer_helpers import trained
from tests.nn.quantised_modules import CODES, bnb, dense, module


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)



class Net(nn.Module):
    def __init__(self, codes, **options):
        super().__init__()
        self.up = module(codes, 64, 128, seed=1, **options)
        self.down = module(codes, 128, 64, bias=False, seed=2, **options)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(x + self.down(self.up(x).tanh()))


def config(**options):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"]} | options))


def floating(model):
    """The same model with nn.Linear in the places of the quantised layers."""
    model = copy.deepcopy(model)
    for name in ("up", "down"):
        base = getattr(model, name)
        plain = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        with torch.no_grad():
            plain.weight.copy_(dense(base))
            if base.bias is not None:
                plain.bias.copy_(base.bias)
        setattr(model, name, plain)
    return model


def close(one, other, bound=1e-5):
    assert rms((one - other).double()) <= bound * rms(other.double())


def adapted(model, **options):
    inject_adapter(model, config(**options))
    for name in ("up", "down"):
        trained(getattr(model, name))
    return model


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("codes", CODES)
def test_in_and_out(codes, use_dora, tmp_path):
    model, x = Net(codes), torch.randn(3, 64)
    plain, before = floating(model), {name: t.clone() for name, t in model.state_dict().items()}
    kinds = type(model.up), model.up.weight
    adapted(model, use_dora=use_dora)
    assert type(model.up) is (DoRALinear if use_dora else LoRALinear) and model.up.weight is kinds[1]
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if use_dora else set())
    y = model(x)
    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)  # the files know of no codes
    close(y, plain(x))
    again = Net(codes)
    assert load_adapter(again, tmp_path) == ["up", "down"]
    assert torch.equal(again(x), y)
    with adapter_disabled(model):
        close(model(x), floating(Net(codes))(x))
    unload(model)
    assert type(model.up) is kinds[0] and model.up.weight is kinds[1]
    after = model.state_dict()
    assert [*after] == [*before] and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("codes", ["nested", "int8"])
def test_files_of_peft(codes, tmp_path):
    """PEFT reads what is written over codes, and this what PEFT has written."""
    model, x = adapted(Net(codes)), torch.randn(3, 64)
    save_adapter(model, tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(Net(codes), tmp_path / "ours").train()
    close(other(x), model(x), 1e-4)
    other.save_pretrained(tmp_path / "theirs")
    again = Net(codes)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("codes", CODES)
def test_merged_to_a_plain_model(codes, use_dora):
    model, x = adapted(Net(codes), use_dora=use_dora), torch.randn(3, 64)
    y = model(x)
    merge_and_unload(model)
    assert type(model.up) is type(model.down) is nn.Linear and model.down.weight.dtype is torch.float32
    assert {*model.state_dict()} == {"up.weight", "up.bias", "down.weight", "norm.weight", "norm.bias"}
    close(model(x), y)


@pytest.mark.parametrize("codes", CODES)
def test_the_dtype_of_a_merged_model(codes):
    """That of the weights before they were quantised, or of the model beside them."""
    model = adapted(Net(codes, dtype=torch.bfloat16)).to(torch.bfloat16)
    wanted = copy.deepcopy(model)(x := torch.randn(3, 64, dtype=torch.bfloat16))
    merge_and_unload(model)
    assert model.up.weight.dtype is model.down.weight.dtype is torch.bfloat16
    close(model(x), wanted, 2e-2)
    model = adapted(Net(codes))
    merge_and_unload(model, dtype=torch.float16)
    assert model.up.weight.dtype is torch.float16


@pytest.mark.parametrize("codes", CODES)
def test_merged_to_codes(codes):
    model, x = Net(codes), torch.randn(3, 64)
    kind = type(model.up)
    y = adapted(model)(x)
    exact = {name: getattr(model, name)._adapted_weight(torch.float32) for name in ("up", "down")}
    with pytest.warns(UserWarning, match=r"2 merged weights were quantised again, with relative errors of 0\.\d+ to 0\.\d+"):
        merge_and_unload(model, requantise=True)
    assert type(model.up) is kind
    for name, w in exact.items():
        found, wanted = getattr(model, name), module(codes, w.shape[1], w.shape[0], weight=w)
        assert torch.equal(dense(found), dense(wanted)) and found.weight.dtype is wanted.weight.dtype
    assert not torch.equal(floating(model)(x), y)
    assert {*model.state_dict()} == {*Net(codes).state_dict()}


def test_what_is_refused(tmp_path):
    model = Net("nf4")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for init in ("pissa", "olora", "pissa_niter_4"):
        with pytest.raises(AdapterError, match="up: init_lora_weights='\\w+' takes a product out of the base weight, which is"):
            inject_adapter(model, config(init_lora_weights=init))
    model.up.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(AdapterError, match="up: bitsandbytes has packed the 4-bit weight for its own inference on this CPU"):
        inject_adapter(model, config())
    del model.up.weight.quant_state.packing_format_for_cpu
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(AdapterError, match="down: the 8-bit layer keeps its weight in 16 bits"):
        model.down = bnb.nn.Linear8bitLt(128, 64)
        inject_adapter(model, config())
    plain = adapted(floating(Net("nf4")))
    with pytest.raises(AdapterError, match="merge_and_unload: requantise is for a quantised base; no base is"):
        merge_and_unload(plain, requantise=True)
    merged = adapted(Net("nf4"))
    merged.up.merge()
    with pytest.raises(AdapterError, match="merge_and_unload: up is merged to torch.float32 already; unmerge"):
        merge_and_unload(merged, requantise=True)
    assert merge_and_unload(merged) is merged


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_transformers(bits, tmp_path):
    """Loaded in codes, trained, merged, saved, and loaded again as its configuration says."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    llama.save_pretrained(tmp_path / "base")
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

    def load(folder):
        quantisation = transformers.BitsAndBytesConfig(**options)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, device_map="cpu")

    ids = torch.randint(64, (2, 9))
    for some in (["q_proj", "down_proj"], "all-linear"):
        model = load(tmp_path / "base")
        names = inject_adapter(model, LoraConfig(r=4, target_modules=some, use_dora=True))
        assert len(names) == (7 if some == "all-linear" else 2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.05
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = model.train()(input_ids=ids).logits.detach()
            merge_and_unload(model)
            close(model(input_ids=ids).logits, logits, 2e-2)
            model.save_pretrained(tmp_path / "merged")
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train()
        close(again(input_ids=ids).logits, logits, 2e-2)
