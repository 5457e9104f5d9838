"""Matching and injection: the same modules, ranks, scales and trainable parameters as PEFT's; all
or nothing."""

import copy
import re
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter
from lora_kernels.adapters.targets import _DEFAULTS
from lora_kernels.nn import DoRALinear, LoRAEmbedding, LoRALinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(8, 24)
        self.c_proj = nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(8, 8, bias=False)}) for _ in range(2)])
        self.norm = nn.LayerNorm(8)


class Stack(nn.Module):
    """Named as GPT-2 with experts: numbered blocks with numbered parts inside."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.transformer = nn.ModuleDict({"h": nn.ModuleList([Block() for _ in range(3)])})
        self.h = nn.ModuleList([Block()])
        self.head = nn.Linear(8, 11, bias=True)


def small(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "stack":
        return Stack()
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32, **sizes))
    config = transformers.LlamaConfig(
        vocab_size=32, num_key_value_heads=1, attention_bias=True, tie_word_embeddings=False, pad_token_id=0, **sizes
    )
    return (transformers.LlamaForSequenceClassification if kind == "classifier" else transformers.LlamaForCausalLM)(
        config
    )


def pefts(model, values):
    """PEFT's layers {name: (r, alpha, scaling, dora)} and the names of what it trains, in our
    names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**values))
    layers = {
        name.removeprefix("base_model.model."): (
            layer.r["default"],
            layer.lora_alpha["default"],
            layer.scaling["default"],
            layer.use_dora["default"],
        )
        for name, layer in wrapped.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    trained = set()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            name = name.replace(".modules_to_save.default.", ".").replace(".default", "")
            trained.add(re.sub(r"(lora_\w+)\.weight$", r"\1", name))
    return layers, trained


def ours(model):
    layers = {
        name: (layer.r, layer.lora_alpha, layer.scaling, isinstance(layer, DoRALinear))
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear | LoRAEmbedding)
    }
    return layers, {name for name, parameter in model.named_parameters() if parameter.requires_grad}


CASES = [
    ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "ALL-LINEAR", "exclude_modules": ["up_proj"]}),
    ("llama", {"target_modules": None}),
    ("llama", {"target_modules": r".*\.(q|k)_proj", "use_rslora": True}),
    ("llama", {"target_modules": r"(?!.*mlp).*_proj", "exclude_modules": r".*\.0\..*"}),
    ("llama", {"target_modules": ["layers.1.self_attn.q_proj", "gate_proj"], "bias": "all"}),
    ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only", "use_dora": True}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 2}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "bias": "all"}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["layers.1.mlp", "norm"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2, r".*\.0\.mlp.*": 3}}),
    ("llama", {"target_modules": "all-linear", "rank_pattern": {"layers.0.mlp.up_proj": 2, "up_proj": 3}}),
    ("llama", {"target_modules": "all-linear", "rank_pattern": {"up_proj": 3, "layers.0.mlp.up_proj": 2}}),
    ("llama", {"target_modules": "all-linear", "alpha_pattern": {"^model.layers.1.*": 5, ".*_proj": 9}}),
    ("llama", {"target_modules": "all-linear", "alpha_pattern": {"(q|k)_proj": 1.5}, "use_rslora": True}),
    ("classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "bias": "all"}),
    ("bert", {"target_modules": None}),
    ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    ("stack", {"target_modules": "all-linear"}),
    ("stack", {"target_modules": ["c_attn"], "layers_to_transform": [0, 2]}),
    ("stack", {"target_modules": ["c_attn", "w1"], "layers_to_transform": [1]}),
    ("stack", {"target_modules": ["c_attn", "w1"], "layers_to_transform": [1], "layers_pattern": "experts"}),
    ("stack", {"target_modules": ["c_attn", "w1"], "layers_to_transform": [0], "layers_pattern": ["blocks", "h"]}),
    ("stack", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": r"trans\w+\.h"}),
    ("stack", {"target_modules": ["wte", "c_proj"], "modules_to_save": ["ad"], "bias": "all"}),
    ("stack", {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": []}),
]


@pytest.mark.parametrize(("kind", "values"), CASES)
def test_selects_and_trains_what_peft_does(kind, values):
    model = small(kind)
    layers, trained = pefts(model, values)
    names = inject_adapter(model, LoraConfig(**{k: v for k, v in values.items() if v is not None}))
    found, found_trained = ours(model)
    assert names == list(found)
    assert found == layers
    assert found_trained == trained
    assert layers


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [7]}),
        ("llama", {"target_modules": r"q_proj"}),
        ("llama", {"target_modules": ["_proj"]}),
        ("llama", {"target_modules": []}),
        ("stack", {"target_modules": None}),
        ("stack", {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "g"}),
        ("llama", {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_selects_nothing_where_peft_does(kind, values):
    model = small(kind)
    with pytest.raises(ValueError):
        pefts(model, values)
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=r"target_modules|_proj"):
        inject_adapter(model, LoraConfig(**{k: v for k, v in values.items() if v is not None}))
    unchanged.check(model)


def test_default_targets_are_pefts():
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for names, kinds in _DEFAULTS.items():
        for kind in kinds.split():
            assert table[kind] == names.split(), kind


def test_head_of_transformers_model_is_left_out_also_when_tied():
    model = small("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert not any("lm_head" in name for name in inject_adapter(model, LoraConfig(target_modules="all-linear")))


def test_all_linear_is_kept_so_that_names_alone_select_the_same():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    assert inject_adapter(model, LoraConfig(target_modules="all-linear")) == ["0", "2.1"]
    assert model._lora_config.target_modules == r"0|2\.1"


class Snapshot:
    """Everything of a model that a failed call must leave as it was."""

    def __init__(self, model):
        self.before = self.snapshot(model)

    @staticmethod
    def snapshot(model):
        modules = {
            n: (id(m), type(m), m.training, set(vars(m))) for n, m in model.named_modules(remove_duplicate=False)
        }
        tensors = {
            name: (id(t), t.data_ptr(), t.dtype, t.requires_grad, bytes(t.detach().clone().untyped_storage()))
            for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        }
        return modules, tensors

    def check(self, model):
        after = self.snapshot(model)
        assert after[0] == self.before[0]
        assert after[1] == self.before[1]


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Reader(nn.Module):
    """As Mamba's mixers, whose kernels take the weight."""

    def __init__(self):
        super().__init__()
        self.with_call, self.passed_over = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.with_call(x), self.passed_over.weight)


def odd_model():
    model = nn.Module()
    model.reader = Reader()
    model.fine = nn.Linear(4, 4)
    model.other = nn.Linear(4, 4)
    model.odd = Odd(4, 4)
    model.conv = nn.Conv1d(4, 4, 1)
    model.table = nn.Embedding(5, 4)
    model.mha = nn.MultiheadAttention(4, 2)
    model.conv1d = transformers.pytorch_utils.Conv1D(4, 4)
    model.wrapped = nn.Linear(4, 4)
    model.wrapped.forward = lambda x: x
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model.whole = nn.Linear(4, 4)
    model.whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model.fine.bias.requires_grad_(False)
    model.other.eval()
    return model


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"target_modules": ["fine", "conv"]}, "conv: is a Conv1d; only nn.Linear and nn.Embedding"),
        ({"target_modules": ["fine", "odd"]}, "odd: Odd computes in its own way"),
        ({"target_modules": ["fine", "wrapped"]}, "wrapped: Linear computes in its own way"),
        ({"target_modules": ["fine", "out_proj"]}, "mha.out_proj: MultiheadAttention may compute with this weight"),
        ({"target_modules": ["fine", "passed_over"]}, "passed_over: Reader may compute with this weight .* exclude_"),
        ({"target_modules": ["fine", "conv1d"]}, "conv1d: transformers' Conv1D"),
        ({"target_modules": ["fine", "normed"]}, "normed: its weight is not a plain parameter"),
        ({"target_modules": ["fine", "whole"]}, "whole: its weight is torch.int8"),
        ({"target_modules": ["fine", "table"], "use_dora": True}, "table: use_dora is not supported"),
        ({"target_modules": ["fine", "mha"]}, "mha: is a MultiheadAttention"),
        ({"target_modules": "all-linear"}, "mha.out_proj"),
        ({"target_modules": ["fine", "fien"]}, "target_modules: 'fien' matches no module; near names: fine"),
        ({"target_modules": "fin"}, "target_modules='fin' selects no module of Module .* near names: fine"),
        ({"target_modules": ["nothing_like_it"]}, "the modules end in: conv, conv1d, fine"),
        ({"target_modules": ["fine"], "exclude_modules": ["othr"]}, "exclude_modules: 'othr' .* near names: other"),
        ({"target_modules": ["fine"], "exclude_modules": "o.*z"}, "exclude_modules: 'o.*z' matches no module"),
        ({"target_modules": ["fine"], "rank_pattern": {"other": 4}}, "rank_pattern='other': matches no adapted module"),
        ({"target_modules": ["fine"], "alpha_pattern": {"fin": 4}}, "alpha_pattern='fin': .* near names: fine"),
        ({"target_modules": ["fine"], "modules_to_save": ["tabel"]}, "modules_to_save: 'tabel' .* near names: table"),
        ({"target_modules": ["fine"], "modules_to_save": ["ine"]}, "fine: is also among modules_to_save"),
        ({"target_modules": ["fine"], "init_lora_weights": "eva"}, "init_lora_weights='eva' is not supported"),
        (
            {"target_modules": ["fine", "other"], "init_lora_weights": "orthogonal", "rank_pattern": {"other": 3}},
            "other: .*needs an even r, found 3",
        ),
    ],
)
def test_a_target_that_cannot_be_adapted_changes_nothing(values, says):
    model = odd_model()
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=says):
        inject_adapter(model, LoraConfig(**values))
    unchanged.check(model)


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_failure_while_building_is_undone(init, use_dora, monkeypatch):
    model = small("llama")
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    model.model.layers[1].eval()
    unchanged = Snapshot(model)
    built = []
    kind = DoRALinear if use_dora else LoRALinear
    original = kind.from_linear.__func__

    def third_fails(cls, linear, **options):
        if len(built) == 2:
            raise RuntimeError("out of memory")
        built.append(original(cls, linear, **options))
        return built[-1]

    monkeypatch.setattr(kind, "from_linear", classmethod(third_fails))
    with pytest.raises(RuntimeError, match="out of memory"):
        inject_adapter(model, LoraConfig(target_modules="all-linear", init_lora_weights=init, use_dora=use_dora))
    assert len(built) == 2
    unchanged.check(model)


def test_a_failure_while_installing_is_undone(monkeypatch):
    model = small("stack")
    unchanged = Snapshot(model)
    original = Block.__setattr__

    def refuse(self, name, value):
        if name == "c_proj" and isinstance(value, LoRALinear):
            raise RuntimeError("read only")
        original(self, name, value)

    monkeypatch.setattr(Block, "__setattr__", refuse)
    with pytest.raises(RuntimeError, match="read only"):
        inject_adapter(model, LoraConfig(target_modules=["c_attn", "c_proj"]))
    unchanged.check(model)


def test_injecting_twice_or_into_pefts_model_is_refused():
    model = small("llama")
    inject_adapter(model, LoraConfig(target_modules=["q_proj"]))
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=r"already has adapters in 2 modules: model\.layers\.0\.self_attn\.q_proj"):
        inject_adapter(model, LoraConfig(target_modules=["v_proj"]))
    unchanged.check(model)

    wrapped = peft.get_peft_model(small("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="fuse"):
        inject_adapter(wrapped, LoraConfig(target_modules=["q_proj"]))


def test_the_config_must_be_ours():
    theirs = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(TypeError, match=r"LoraConfig\.from_dict"):
        inject_adapter(small("llama"), theirs)
    assert inject_adapter(small("llama"), LoraConfig.from_dict(theirs.to_dict()))


def test_a_config_changed_into_a_bad_one_is_checked_again():
    config = LoraConfig(target_modules=["q_proj"])
    config.r = -1
    with pytest.raises(AdapterError, match="r must be in"):
        inject_adapter(small("llama"), config)


def test_layers_share_the_weights_and_keep_mode_hooks_and_output():
    model = small("llama").eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids).logits
    linear = model.model.layers[0].self_attn.q_proj
    calls = []
    handle = linear.register_forward_hook(lambda *_: calls.append("after"))
    linear.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    inject_adapter(model, LoraConfig(target_modules="all-linear", init_lora_weights="gaussian", r=4))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected)
    assert calls == ["before", "after"]
    handle.remove()
    with torch.no_grad():
        model(ids)
    assert calls == ["before", "after", "before"]


def test_a_module_to_save_is_a_copy_even_if_its_weight_is_tied():
    model = small("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    inject_adapter(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


def test_initialisation_is_passed_through():
    model = small("llama")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    inject_adapter(model, LoraConfig(target_modules=["up_proj", "embed_tokens"], init_lora_weights="pissa", r=4))
    layer = model.model.layers[0].mlp.up_proj
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer.weight + layer.scaling * layer.lora_B @ layer.lora_A, before)
    assert not model.model.embed_tokens.lora_embedding_A.any()

    model = small("llama")
    inject_adapter(model, LoraConfig(target_modules=["up_proj", "embed_tokens"], init_lora_weights=False))
    assert model.model.layers[0].mlp.up_proj.lora_B.any()
    assert model.model.embed_tokens.lora_embedding_A.any()


def test_a_compiled_model_is_unwrapped():
    model = small("llama")
    names = inject_adapter(torch.compile(model), LoraConfig(target_modules=["q_proj"]))
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert isinstance(model.model.layers[0].self_attn.q_proj, LoRALinear)
