"""`target_parameters`: the parameters that PEFT adapts, its first values, numbers and files, both
ways; and DoRA, which only ours have there."""

import copy
import importlib
import json
import re
import weakref
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lora_kernels import adapter_disabled, fuse, merge_and_unload, unload
from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter, save_adapter
from lora_kernels.nn import DoRALinear, LoRAExperts, LoRALinear
from lora_kernels.serving import AdapterPool
from tests.adapters.test_files import CONFIG, WEIGHTS, Snapshot
from tests.integrations.experts_helpers import EXPERTS, HIDDEN, INNER, Block, Config, choices, experts_class, inputs
from tests.nn.test_lora_experts import Llama4

GATED = ["experts.gate_up_proj", "experts.down_proj"]
KINDS = {
    "both": {"target_parameters": GATED},
    "rslora, patterns": {
        "target_parameters": GATED[::-1],
        "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {r".*gate_up_proj": 7},
    },
    "one": {"target_parameters": ["experts.down_proj"]},
    "and the router": {"target_parameters": [*GATED, "router.weight"], "rank_pattern": {"router.weight": 2}},
    "and modules": {"target_modules": ["head"], "target_parameters": ["gate_up_proj"], "modules_to_save": ["norm"]},
    "gaussian": {"target_parameters": GATED, "init_lora_weights": "gaussian"},
    "random": {"target_parameters": GATED, "init_lora_weights": False},
}
kinds = pytest.mark.parametrize("kind", KINDS)
classes = pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "Llama4TextExperts"])


class Net(nn.Module):
    """Experts between other layers; Llama 4's get all tokens."""

    def __init__(self, name):
        super().__init__()
        self.gets_all = name == "Llama4TextExperts"
        self.block = Block(Llama4TextExperts(Llama4()) if self.gets_all else experts_class(name)(Config()), choices())
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 5)

    def forward(self, x):
        if self.gets_all:
            h = self.block.experts(torch.cat([x] * EXPERTS)).view(EXPERTS, *x.shape).mean(0)
        else:
            h = self.block(x)
        return self.head(self.norm(x + h))


def net(name="MixtralExperts", dtype=torch.float64):
    torch.manual_seed(0)
    model = Net(name)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def values_of(kind, name="MixtralExperts"):
    values = copy.deepcopy({"r": 3, "lora_alpha": 5, "target_modules": []} | KINDS[kind])
    if name == "NemotronHExperts":
        values = json.loads(json.dumps(values).replace("gate_up_proj", "up_proj"))
    return values


def injected(kind, name="MixtralExperts", dtype=torch.float64, **more):
    model = net(name, dtype)
    torch.manual_seed(1)
    inject_adapter(model, LoraConfig(**values_of(kind, name) | more))
    return model


def wrapped(kind, name="MixtralExperts", dtype=torch.float64):
    model = net(name, dtype)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**values_of(kind, name))).eval()


def trained(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator).to(p)
    return model


def in_a_file(model, folder):
    """PEFT's names of all that a model trains, with values."""
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(folder)
    else:
        save_adapter(model, folder)
    return load_file(folder / WEIGHTS)


def output(model, x=None):
    with torch.no_grad():
        return model(inputs(torch.float64) if x is None else x)


@kinds
@classes
def test_the_first_values_and_names_are_pefts(name, kind, tmp_path):
    ours, theirs = injected(kind, name, torch.float32), wrapped(kind, name, torch.float32)
    mine, its = in_a_file(ours, tmp_path / "ours"), in_a_file(theirs, tmp_path / "theirs")
    assert mine.keys() == its.keys() and len(mine) >= 2
    for key, t in its.items():
        assert t.dtype is mine[key].dtype and torch.equal(t, mine[key]), key


@kinds
@classes
def test_we_load_what_peft_saves_and_it_loads_what_we_save(name, kind, tmp_path):
    theirs = trained(wrapped(kind, name))
    written = in_a_file(theirs, tmp_path / "theirs")
    plain, layered = net(name), injected(kind, name)
    before = output(plain)
    for model in (plain, layered):
        names = load_adapter(model, tmp_path / "theirs")
        assert sorted(names) == sorted(n for n, m in model.named_modules() if isinstance(m, LoRAExperts | LoRALinear))
        torch.testing.assert_close(output(model), output(theirs))
        assert not torch.allclose(output(model), before)
        again = in_a_file(model, tmp_path / "ours")
        assert again.keys() == written.keys() and all(torch.equal(written[key], t) for key, t in again.items())
    back = peft.PeftModel.from_pretrained(net(name), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(output(back), output(theirs))


@pytest.mark.slow
def test_all_models_of_transformers(tmp_path):
    """Of every class that has transformers' interface and a known loop."""
    found, refused = 0, set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)\(", file.read_text(), re.MULTILINE):
            cls = getattr(importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}"), name)
            torch.manual_seed(0)
            base = Block(cls(Config()), choices()).double()
            for p in base.parameters():
                nn.init.normal_(p, std=0.3)
            ups = "gate_up_proj" if base.experts.has_gate else "up_proj"
            values = {"r": 3, "target_modules": [], "target_parameters": [f"experts.{ups}", "experts.down_proj"]}
            theirs, folder = trained(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**values))), tmp_path / name
            theirs.save_pretrained(folder)
            try:
                load_adapter(base, folder, is_trainable=True)
            except AdapterError as error:
                refused.add(f"{name}: {error}")
                continue
            torch.testing.assert_close(output(base), output(theirs))
            with torch.no_grad():
                merge_and_unload(base)
            torch.testing.assert_close(output(base), output(theirs))
            found += 1
    assert found > 60 and all("OpenAIPrivacyFilterExperts" in each for each in refused), refused


@classes
def test_a_step_is_pefts(name, tmp_path):
    theirs = trained(wrapped("and modules", name))
    theirs.save_pretrained(tmp_path)
    ours = net(name)
    load_adapter(ours, tmp_path, is_trainable=True)
    gradients, x = [], inputs(torch.float64)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            given = x.clone().requires_grad_()
            model(given).square().sum().backward()
            gradients.append(given.grad)
            optimizer.step()
    torch.testing.assert_close(gradients[:2], gradients[2:])
    mine, its = in_a_file(ours, tmp_path / "ours"), in_a_file(theirs, tmp_path / "theirs")
    torch.testing.assert_close(mine, its)
    assert any(t.abs().sum() for t in gradients)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_models(kind, tmp_path):
    theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=GATED)).eval()
    trained(theirs).save_pretrained(tmp_path / "theirs")
    ours = tiny(kind)
    load_adapter(ours, tmp_path / "theirs", is_trainable=True)
    ids = torch.arange(18).reshape(2, 9)
    losses = []
    for model in (theirs, ours):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    of_peft = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    layer = ours.model.layers[0].mlp.experts
    prefix = "base_model.model.model.layers.0.mlp.experts."
    for inner, p in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
        a, b = (of_peft[f"{prefix}{inner}lora_{side}.default.weight"] for side in "AB")
        grads = {side: getattr(layer, f"lora_{side}_{p}").grad for side in "AB"}
        torch.testing.assert_close(grads["A"].flatten(0, 1), a)
        torch.testing.assert_close(grads["B"].permute(1, 2, 0).flatten(1), b)
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, ours.eval()(ids).logits)
    assert len(fuse(ours).fused) == 2


def tiny(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 32}
    if kind == "Qwen3Moe":
        sizes |= {"num_experts": sizes.pop("num_local_experts"), "moe_intermediate_size": 16}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, experts_implementation="eager", pad_token_id=0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()


@classes
def test_dora_goes_round_and_peft_refuses_it(name, tmp_path):
    ours = trained(injected("and modules", name, use_dora=True))
    assert isinstance(ours.head, DoRALinear) and ours.block.experts.use_dora
    written = in_a_file(ours, tmp_path)
    magnitudes = [key for key in written if "experts" in key and key.endswith("lora_magnitude_vector")]
    assert [key.split(".")[-2] for key in magnitudes] == ["experts"]
    other = net(name)
    load_adapter(other, tmp_path)
    assert torch.equal(output(other), output(ours))
    with pytest.raises(ValueError, match="use_dora=True"):
        peft.PeftModel.from_pretrained(net(name), str(tmp_path))
    merged = merge_and_unload(other)
    torch.testing.assert_close(output(merged), output(ours))


@classes
def test_merged_unloaded_and_disabled(name):
    ours, base = trained(injected("and modules", name)), net(name)
    wanted = output(ours)
    with adapter_disabled(ours):
        assert torch.equal(output(ours), output(base))
    merged = copy.deepcopy(ours)
    merged.block.experts.merge()
    torch.testing.assert_close(output(merged), wanted)
    for model, y in ((merge_and_unload(merged), wanted), (merge_and_unload(copy.deepcopy(ours)), wanted), (unload(ours), None)):
        assert type(model.block.experts) is type(base.block.experts) and not hasattr(model, "_lora_base")
        assert model.state_dict().keys() == base.state_dict().keys()
        assert all(p.requires_grad for p in model.parameters())
        torch.testing.assert_close(output(model), output(base) if y is None else y)


def test_merging_lets_each_base_weight_go(monkeypatch):
    """So that one more than the model's weights is in memory."""
    model = nn.Sequential(*(net() for _ in range(3)))
    inject_adapter(model, LoraConfig(target_modules=[], target_parameters=GATED))
    held, counts = [weakref.ref(each.block.experts.gate_up_proj) for each in model], []
    merged_weights = LoRAExperts._merged_weights

    def counted(self, safe):
        counts.append(sum(each() is not None for each in held))
        return merged_weights(self, safe)

    monkeypatch.setattr(LoRAExperts, "_merged_weights", counted)
    merge_and_unload(model)
    assert counts == [3, 2, 1]


def test_a_matrix_of_a_linear_layer_is_its_layer(tmp_path):
    values = {"target_modules": [], "target_parameters": ["head.weight"], "r": 3}
    theirs = trained(peft.get_peft_model(net(), peft.LoraConfig(**values)).eval())
    theirs.save_pretrained(tmp_path)
    ours = net()
    assert load_adapter(ours, tmp_path) == ["head"] and type(ours.head) is LoRALinear
    torch.testing.assert_close(output(ours), output(theirs))
    for bias in ("all", "lora_only"):
        mine, its = (tmp_path / who / bias for who in ("ours", "theirs"))
        model = net()
        inject_adapter(model, LoraConfig(**values, bias=bias))
        keys = in_a_file(model, mine).keys()
        assert keys == in_a_file(peft.get_peft_model(net(), peft.LoraConfig(**values, bias=bias)), its).keys()
    for both in ({"target_modules": ["head"]}, {"target_parameters": ["head.weight", "head.bias"]}):
        with pytest.raises(AdapterError, match=r"head.*(is named by target_modules and|only the weight)"):
            inject_adapter(net(), LoraConfig(**values | both))


def test_default_modules_come_with_parameters(tmp_path):
    """As in PEFT: None is what the kind of model has by default, and nothing where it has none."""
    for kind in ("Mixtral", "Qwen3Moe"):
        theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(r=2, target_parameters=GATED))
        ours = tiny(kind)
        names = inject_adapter(ours, LoraConfig(r=2, target_parameters=GATED))
        wanted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
        assert {*names} == {re.sub(r"\.base_layer$", "", name) for name in wanted}


CASES = [
    (
        {"target_parameters": ["experts.gate_up"]},
        "target_parameters: 'experts.gate_up' matches no parameter; near names: .*gate_up_proj",
    ),
    ({"target_modules": ["gate_up_proj"]}, "block.experts.gate_up_proj is a parameter, which target_parameters may name"),
    ({"target_modules": ["head", "down_proj"]}, "'down_proj' matches no module.*; block.experts.down_proj is a parameter"),
    ({"target_parameters": ["norm.weight"]}, "norm.weight: the forward of LayerNorm is not known; PEFT with fuse"),
    ({"target_parameters": GATED, "init_lora_weights": "olora"}, "init_lora_weights='olora' is for matrices"),
    ({"target_parameters": GATED, "modules_to_save": ["block"]}, "gate_up_proj: is also among modules_to_save"),
    ({"target_parameters": GATED, "rank_pattern": {"down": 2}}, "rank_pattern='down': matches no adapted module or parameter"),
]


@pytest.mark.parametrize(("values", "says"), CASES)
def test_what_cannot_be_adapted_is_named_and_nothing_changes(values, says):
    model = net()
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=says):
        inject_adapter(model, LoraConfig(**{"target_modules": []} | values))
    unchanged.check(model)


def test_a_scale_is_not_saved_in_silence(tmp_path):
    model = injected("both")
    model.block.experts.set_scale(2)
    with pytest.warns(UserWarning, match="set_scale is not saved; changed in block.experts"):
        save_adapter(model, tmp_path)


def test_biases_of_experts_are_not_trained_in_silence():
    with pytest.raises(AdapterError, match="bias='all' would train the biases of GptOssExperts"):
        inject_adapter(net("GptOssExperts"), LoraConfig(target_modules=[], target_parameters=GATED, bias="all"))


@pytest.mark.parametrize(
    ("values", "says"),
    [({"lora_dropout": 0.1}, "lora_dropout must be 0 with"), ({"fan_in_fan_out": True}, "fan_in_fan_out must be False with")],
)
def test_options_that_peft_refuses(values, says):
    with pytest.raises(AdapterError, match=says):
        LoraConfig(target_parameters=GATED, **values)
    with pytest.raises(ValueError, match=next(iter(values))):
        peft.get_peft_model(net(), peft.LoraConfig(target_modules=[], target_parameters=GATED, **values))


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    in_a_file(trained(wrapped("both")), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.block.experts.base_layer.lora_B.weight"
    assert tensors[key].shape == (2 * INNER, 3 * EXPERTS)
    for change, says in (
        ({key: None}, "1 tensors are missing: .*base_layer.lora_B"),
        ({key: tensors[key].T.contiguous()}, rf"{key} must have shape \[32, 18\], found \[18, 32\]"),
        ({key: tensors[key] * torch.inf}, "not finite"),
        ({key.replace("base_layer", "base_layer.base_layer"): tensors[key].clone()}, "1 tensors do not belong"),
    ):
        save_file({k: t for k, t in {**tensors, **change}.items() if t is not None}, tmp_path / WEIGHTS)
        for model in (net(), injected("both")):
            unchanged = Snapshot(model)
            with pytest.raises(AdapterError, match=says):
                load_adapter(model, tmp_path)
            unchanged.check(model)
    save_file(tensors, tmp_path / WEIGHTS)
    for kind, says in (
        ("one", "the adapted parameters of block.experts are"),
        ("rslora, patterns", "lora_alpha is 5 for block.experts.gate_up_proj, in"),
    ):
        with pytest.raises(AdapterError, match=says):
            load_adapter(injected(kind), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert sorted(config["target_parameters"]) == sorted(GATED)


def test_a_pool_says_that_it_has_no_experts(tmp_path):
    in_a_file(trained(wrapped("both", dtype=torch.float32)), tmp_path)
    pool = AdapterPool(net(dtype=torch.float32), capacity_bytes=1 << 20, slots=4)
    with pytest.raises(AdapterError, match=r"modules that the pool does not have: block\.experts\.down_proj, block\.experts"):
        pool.load("one", tmp_path)
