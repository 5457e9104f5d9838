"""Models whose linears other libraries than bitsandbytes have quantised: adapters put in, saved,
loaded, merged, served and taken out."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import LoraConfig, adapter_disabled, inject_adapter, load_adapter, merge_and_unload, save_adapter, unload
from lora_kernels.adapters.config import AdapterError
from lora_kernels.testing.tolerances import rms
from tests.nn.format_modules import KINDS, module
from tests.nn.layer_helpers import trained


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.up, self.down = module(kind, 64, 128, seed=1)[0], module(kind, 128, 64, bias=False, seed=2)[0]

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


def floating(kind):
    """The same model with nn.Linear in the places of the quantised layers."""
    model = nn.Module()
    for name, sizes, seed in (("up", (64, 128), 1), ("down", (128, 64), 2)):
        made, w = module(kind, *sizes, bias=name == "up", seed=seed)
        plain = nn.Linear(*sizes, bias=name == "up")
        with torch.no_grad():
            plain.weight.copy_(w)
            if name == "up":
                plain.bias.copy_(made.bias)
        setattr(model, name, plain)
    model.forward = lambda x: x + model.down(model.up(x).tanh())
    return model


def close(one, other, bound=1e-5):
    assert rms((one - other).double()) <= bound * rms(other.double())


def adapted(model, **options):
    inject_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options))
    for name in ("up", "down"):
        trained(getattr(model, name))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out(kind, tmp_path):
    model, x = Net(kind), torch.randn(3, 64)
    before = {name: copy.deepcopy(t) for name, t in model.state_dict().items()}
    bases = model.up, model.down
    adapted(model, use_dora=True)
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B", "lora_magnitude_vector"}
    y, plain = model(x), floating(kind)
    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)  # the files know of no codes
    close(y, plain(x))
    again = Net(kind)
    assert load_adapter(again, tmp_path) == ["up", "down"] and torch.equal(again(x), y)
    with adapter_disabled(model):
        close(model(x), floating(kind)(x))
    merge_and_unload(again)
    assert type(again.up) is type(again.down) is nn.Linear
    assert {*again.state_dict()} == {"up.weight", "up.bias", "down.weight"}
    close(again(x), y)
    unload(model)
    assert type(model.up) is type(bases[0]) and model.up is not bases[0]
    after = model.state_dict()
    assert [*after] == [*before]
    for name, t in before.items():
        assert torch.equal(t.dequantize(), after[name].dequantize()) if hasattr(t, "qdata") else torch.equal(t, after[name])
    close(adapted(model, init_lora_weights=False)(x), model(x))


def test_what_is_refused():
    model = Net("int8 rows")
    with pytest.raises(AdapterError, match="up: init_lora_weights='olora' takes a product out of the base weight, which is"):
        inject_adapter(model, LoraConfig(target_modules=["up"], init_lora_weights="olora"))
    q = pytest.importorskip("torchao.quantization")
    model.up = nn.Sequential(nn.Linear(64, 128))
    q.quantize_(model.up, q.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(AdapterError, match="up.0: torchao changes the input of this layer, too"):
        inject_adapter(model, LoraConfig(target_modules=["up.0"]))


def test_a_model_that_its_hook_would_decompress(tmp_path):
    """As transformers loads it: the first call decompresses its layers, but for those with an
    adapter."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    weights = library.QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=weights)
    library.apply_quantization_config(model, library.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data = layer.weight.data.unflatten(1, (-1, 32)).abs().amax(2) / 7.5
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)

    ids = torch.randint(64, (2, 9))
    stock, ours = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    names = inject_adapter(ours, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True))
    assert len(names) == 2
    with torch.no_grad():
        close(ours(input_ids=ids).logits, stock(input_ids=ids).logits)
    attention = ours.model.layers[0].self_attn
    assert attention.q_proj.weight.dtype is torch.int32 and attention.k_proj.weight.dtype is torch.float32
    ours(input_ids=ids, labels=ids).loss.backward()
    assert attention.q_proj.lora_B.grad.any()


def test_a_model_of_torchao(tmp_path):
    """As transformers loads it: trained, merged, saved, and loaded again as its configuration
    says."""
    transformers = pytest.importorskip("transformers")
    q = pytest.importorskip("torchao.quantization")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    ids = torch.randint(64, (2, 9))
    for some, count in ((["q_proj", "down_proj"], 2), ("all-linear", 7)):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=transformers.TorchAoConfig(q.Int8WeightOnlyConfig()), device_map="cpu"
        )
        wanted = model(input_ids=ids).logits
        assert len(inject_adapter(model, LoraConfig(r=4, target_modules=some, use_dora=True))) == count
        close(model(input_ids=ids).logits, wanted)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        logits = model(input_ids=ids).logits.detach()
        assert rms(logits - wanted) > 1e-2 * rms(wanted)
        merge_and_unload(model)
        close(model(input_ids=ids).logits, logits, 1e-4)
        if count == 7:
            model.save_pretrained(tmp_path / "merged")
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
            close(again(input_ids=ids).logits, logits, 1e-4)
        else:
            assert "model.layers.0.self_attn.q_proj" in model.config.quantization_config.modules_to_not_convert
