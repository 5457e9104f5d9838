"""LoraConfig: its values, its JSON in both directions with PEFT, what it refuses; and the matching
of its patterns."""

import json
import os
import re
from dataclasses import fields

import hypothesis
import hypothesis.strategies as st
import peft
import pytest
from torch import nn

from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, patterns
from lora_kernels.adapters.config import CONFIG_NAME, MAX_RANK
from lora_kernels.adapters.patterns import Budget, NamePattern
from lora_kernels.adapters.targets import select_targets

OWN = [f.name for f in fields(LoraConfig) if f.name != "extra"]

CONFIGS = [
    {},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 7, "use_rslora": True, "lora_dropout": 0.05},
    {"target_modules": r".*\.(q|v)_proj", "use_dora": True, "init_lora_weights": "gaussian", "bias": "lora_only"},
    {"target_modules": ["q"], "exclude_modules": ["lm_head"], "layers_to_transform": [0, 2], "layers_pattern": "h"},
    {"target_modules": ["q"], "exclude_modules": r".*\.0\..*", "layers_to_transform": 1, "layers_pattern": ["h", "g"]},
    {"target_modules": ["q"], "rank_pattern": {"z": 2, r"a\d+": 4}, "alpha_pattern": {"^b": 3, "a": 1}},
    {"target_modules": ["q"], "modules_to_save": ["head"], "task_type": "SEQ_CLS", "bias": "all"},
    {"target_modules": ["q"], "init_lora_weights": "pissa_niter_4", "base_model_name_or_path": "some/model"},
    {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False, "task_type": "CAUSAL_LM"},
]


def same(ours, theirs):
    for name in OWN:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (set(a) if isinstance(b, set) else a) == b, name


@pytest.mark.parametrize("values", CONFIGS)
def test_reads_what_peft_writes_and_peft_reads_what_we_write(values, tmp_path):
    peft.LoraConfig(**values).save_pretrained(tmp_path / "peft")
    ours = LoraConfig.from_pretrained(tmp_path / "peft")
    same(ours, peft.LoraConfig(**values))
    same(LoraConfig(**values), peft.LoraConfig(**values))

    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    assert theirs.to_dict() == peft.LoraConfig.from_pretrained(tmp_path / "peft").to_dict()
    assert LoraConfig.from_pretrained(tmp_path / "ours") == ours


@pytest.mark.parametrize("values", CONFIGS)
def test_dict_round_trip_keeps_every_key(values):
    theirs = peft.LoraConfig(**values).to_dict()
    ours = LoraConfig.from_dict(theirs)
    assert theirs.keys() <= ours.to_dict().keys()
    assert LoraConfig.from_dict(ours.to_dict()) == ours


def test_defaults_are_pefts():
    same(LoraConfig(), peft.LoraConfig())


def test_order_of_patterns_survives_the_file(tmp_path):
    LoraConfig(rank_pattern={"z": 1, "a": 2, "m": 3}).save_pretrained(tmp_path)
    assert list(LoraConfig.from_pretrained(tmp_path).rank_pattern) == ["z", "a", "m"]
    assert list(peft.LoraConfig.from_pretrained(tmp_path).rank_pattern) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("field", "value", "error", "says"),
    [
        ("r", 0, ValueError, "r must be in"),
        ("r", -1, ValueError, "r must be in"),
        ("r", MAX_RANK + 1, ValueError, "r must be in"),
        ("r", 10**400, ValueError, "found an integer of 1329 bits"),
        ("r", True, TypeError, "r must be an integer"),
        ("r", 8.0, TypeError, "r must be an integer"),
        ("r", "8", TypeError, "r must be an integer"),
        ("r", None, TypeError, "r must be an integer"),
        ("lora_alpha", 0, ValueError, "lora_alpha must be in"),
        ("lora_alpha", -4, ValueError, "lora_alpha must be in"),
        ("lora_alpha", float("nan"), ValueError, "lora_alpha must be finite"),
        ("lora_alpha", float("inf"), ValueError, "lora_alpha must be finite"),
        ("lora_alpha", 10**400, ValueError, "lora_alpha must be finite"),
        ("lora_alpha", 1e12, ValueError, "lora_alpha must be in"),
        ("lora_alpha", True, TypeError, "lora_alpha must be a number"),
        ("lora_alpha", "16", TypeError, "lora_alpha must be a number"),
        ("lora_dropout", -0.1, ValueError, "lora_dropout must be in"),
        ("lora_dropout", 1.0, ValueError, "lora_dropout must be in"),
        ("lora_dropout", float("nan"), ValueError, "lora_dropout must be finite"),
        ("lora_dropout", False, TypeError, "lora_dropout must be a number"),
        ("lora_dropout", "0.1", TypeError, "lora_dropout must be a number"),
        ("use_dora", 1, TypeError, "use_dora must be True or False"),
        ("use_rslora", "yes", TypeError, "use_rslora must be True or False"),
        ("fan_in_fan_out", None, TypeError, "fan_in_fan_out must be True or False"),
        ("bias", "some", ValueError, "bias must be one of none, all, lora_only"),
        ("bias", None, ValueError, "bias must be one of"),
        ("init_lora_weights", "kaiming", ValueError, "init_lora_weights must be one of"),
        ("init_lora_weights", "pissa_niter_x", ValueError, "init_lora_weights must be one of"),
        ("init_lora_weights", None, TypeError, "init_lora_weights must be"),
        ("init_lora_weights", 1, TypeError, "init_lora_weights must be"),
        ("target_modules", 3, TypeError, "target_modules must be"),
        ("target_modules", "", TypeError, "target_modules must be"),
        ("target_modules", ["q", ""], TypeError, "target_modules must be"),
        ("target_modules", [1], TypeError, "target_modules must be"),
        ("exclude_modules", {"q": 1}, TypeError, "exclude_modules must be"),
        ("modules_to_save", "head", TypeError, "modules_to_save must be"),
        ("target_parameters", "experts.down_proj", TypeError, "target_parameters must be a list of names"),
        ("layers_to_transform", "3", TypeError, "layers_to_transform must hold"),
        ("layers_to_transform", [True], TypeError, "layers_to_transform must hold"),
        ("layers_to_transform", -1, TypeError, "layers_to_transform must hold"),
        ("layers_pattern", "h", ValueError, "layers_pattern has no effect"),
        ("rank_pattern", {"q": 0}, ValueError, r"rank_pattern\['q'\] must be in"),
        ("rank_pattern", {"q": 4.0}, TypeError, r"rank_pattern\['q'\] must be an integer"),
        ("rank_pattern", ["q"], TypeError, "rank_pattern must map"),
        ("rank_pattern", {1: 4}, TypeError, "rank_pattern must map"),
        ("alpha_pattern", {"q": float("nan")}, ValueError, r"alpha_pattern\['q'\] must be finite"),
        ("alpha_pattern", {"q": True}, TypeError, r"alpha_pattern\['q'\] must be a number"),
        ("task_type", "TRANSLATE", ValueError, "task_type must be one of"),
        ("base_model_name_or_path", 3, TypeError, "base_model_name_or_path must be"),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, error, says):
    with pytest.raises(error, match=says):
        LoraConfig(**{field: value})


def test_layers_need_a_list_of_targets():
    with pytest.raises(AdapterError, match="layers_to_transform needs a list"):
        LoraConfig(target_modules=".*q", layers_to_transform=[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"tensor_model_parallel_size": 1}),
        ("lora_bias", True),
        ("use_qalora", True),
        ("use_bdlora", {"match_strict": True}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 0.1}),
        ("velora_config", {"rate": 1}),
        ("monteclora_config", {"n": 1}),
        ("alora_invocation_tokens", [1, 2]),
        ("trainable_token_indices", [0]),
        ("ensure_weight_tying", True),
        ("an_option_of_tomorrow", True),
    ],
)
def test_a_key_that_changes_the_maths_is_refused_by_name(key, value, tmp_path):
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q"], key: value}))
    with pytest.raises(AdapterError, match=key):
        LoraConfig.from_pretrained(tmp_path)


def test_an_inert_unknown_key_is_kept():
    config = LoraConfig.from_dict({"r": 4, "an_option_of_tomorrow": None, "another": [], "peft_version": "0.99"})
    assert config.r == 4
    assert config.to_dict()["peft_version"] == "0.99"
    assert {"an_option_of_tomorrow", "another"} <= config.to_dict().keys()


def test_another_kind_of_adapter_is_refused():
    with pytest.raises(AdapterError, match="peft_type must be 'LORA', found 'IA3'"):
        LoraConfig.from_dict({"peft_type": "IA3"})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b'{"r": NaN}', "NaN is not JSON"),
        (b'{"lora_alpha": Infinity}', "Infinity is not JSON"),
        (b'{"r": 8, "r": 16}', "'r' appears twice"),
        (b'{"r": "8"}', "r must be an integer"),
        (b'{"r": 1e1}', "r must be an integer"),
        (b'{"r": ' + b"9" * 5000 + b"}", CONFIG_NAME),
        (b'{"auto_mapping": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32"),
        (b'{"auto_mapping": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"auto_mapping": "' + b"x" * (1 << 20) + b'"}', "must be at most"),
    ],
    ids=lambda value: value[:16] if isinstance(value, bytes) else None,
)
def test_a_damaged_file_is_refused_with_its_name(content, says, tmp_path):
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(AdapterError, match=says) as caught:
        LoraConfig.from_pretrained(tmp_path)
    assert CONFIG_NAME in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_only_a_regular_file_is_read(tmp_path):
    with pytest.raises(AdapterError, match="cannot be read: No such file"):
        LoraConfig.from_pretrained(tmp_path)
    os.mkfifo(tmp_path / CONFIG_NAME)
    with pytest.raises(AdapterError, match="must be a regular file"):
        LoraConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / CONFIG_NAME).mkdir()
    with pytest.raises(AdapterError, match=CONFIG_NAME):
        LoraConfig.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    LoraConfig(r=4).save_pretrained(tmp_path)

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        LoraConfig(r=16).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert LoraConfig.from_pretrained(tmp_path).r == 4
    assert os.listdir(tmp_path) == [CONFIG_NAME]


ATOMS = ["a", "b", "a.c", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "(?:a|b)", "(a.|b)", "x*", "a+?", "(ab)?"]
ATOMS += [
    "a{1,3}",
    "(?=a)",
    "(?!b)",
    "(?<=a)",
    r"(?<!\.)",
    r"\b",
    "^",
    "$",
    "(a*)*",
    "(a|ab)(c|bcd)",
    r"\.[^.]*",
    "(?:a|)",
]


@hypothesis.settings(max_examples=500, deadline=None)
@hypothesis.given(st.lists(st.sampled_from(ATOMS), max_size=6).map("".join), st.text("ab.c1", max_size=9))
def test_patterns_match_as_re_does(pattern, name):
    try:
        re.compile(pattern)
    except re.error:
        hypothesis.reject()
    ours = NamePattern(pattern, "target_modules")
    assert ours.fullmatch(name) == bool(re.fullmatch(pattern, name))
    assert ours.matches_end(name) == bool(re.match(rf"(.*\.)?({pattern})$", name))


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "((a*)*)*b", ".*" * 40 + "x", "(a?){30}a{30}b", "((((a?){30}){30}){30}){30}b"]
)
def test_patterns_that_hang_re_are_simply_matched(pattern):
    assert not NamePattern(pattern, "target_modules").fullmatch("a" * 36)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(?=.*(?=.*(?=.*(?=.*(?=.*x)))))a", "takes too long"),
        ("(" * 5000 + "a" + ")" * 5000, "nested too deeply"),
        ("a" * 20_000, "may have 16384 characters"),
        ("(a", "is not a regular expression"),
        ("a{99999999999}", "is not a regular expression"),
        (r"(?P<x>a)(?P=x)", "groupref is not supported"),
        ("(?s)a", "only .* is supported"),
    ],
    ids=lambda value: value[:12],
)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_a_pattern_is_refused_by_name_in_every_field(field, pattern, says):
    model = nn.ModuleDict({"a" * 36: nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(2, 2)})])})
    values = {field: {pattern: 4} if field in ("rank_pattern", "alpha_pattern") else pattern}
    if field == "layers_pattern":
        values["layers_to_transform"] = [0]
    with pytest.raises(AdapterError, match=rf"{field}=(?s:.*){says}") as caught:
        inject_adapter(model, LoraConfig(**{"target_modules": ["fc"], **values}))
    assert len(str(caught.value)) < 300


def blocks(count):
    names = ("q_proj", "v_proj", "down_proj")
    layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(1, 1) for name in names}) for _ in range(count))
    return nn.ModuleDict({"layers": layers})


FLOODS = {
    "ranks": {"rank_pattern": {f"(.*)*{i}x": 4 for i in range(30_000)}},
    "alphas": {"alpha_pattern": {f"(?=.*(?=.*{i}))a": 4 for i in range(30_000)}},
    "both": {name: {f".*{i}x": 4 for i in range(20_000)} for name in ("rank_pattern", "alpha_pattern")},
    "layers": {"layers_to_transform": [1], "layers_pattern": [f"a{i}" for i in range(60_000)]},
    "classes": {"rank_pattern": {f".*[{''.join(map(chr, range(300, 3300)))}]{i}": 4 for i in range(30)}},
}


@pytest.mark.parametrize("flood", FLOODS)
def test_all_patterns_of_a_configuration_share_one_budget(flood):
    config = LoraConfig(target_modules=["q_proj"], **FLOODS[flood])
    assert len(json.dumps(config.to_dict())) < 2**20
    spent = []
    original = Budget.spend

    def spend(self, where, steps=1):
        spent.append(steps)
        original(self, where, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "spend", spend)
        with pytest.raises(AdapterError, match="takes too long to match, with the other patterns"):
            select_targets(blocks(8), config, strict=False)
    assert sum(spent) < 200_000


def test_a_class_of_thousands_of_characters_is_walked_once(monkeypatch):
    walked, original = [], patterns._in_class
    monkeypatch.setattr(patterns, "_in_class", lambda item, char: walked.append(1) or original(item, char))
    model = blocks(40)
    pattern = ".*[" + "".join(chr(300 + i) for i in range(1000)) + "q]_proj"
    found = select_targets(model, LoraConfig(target_modules=pattern))
    assert {target.name.rpartition(".")[2] for target in found.targets} == {"q_proj"}
    assert len(walked) <= 1001 * len(set("".join(name for name, _ in model.named_modules()))) * 2


@pytest.mark.parametrize("form", [str, lambda name: "^" + name.replace(".", r"\.")])
def test_a_rank_and_an_alpha_for_each_of_many_modules_are_no_flood(form):
    model = blocks(60)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ranks = {form(name): i % 7 + 1 for i, name in enumerate(names)}
    alphas = {form(name): i % 5 + 1 for i, name in enumerate(names)}
    found = select_targets(model, LoraConfig(target_modules="all-linear", rank_pattern=ranks, alpha_pattern=alphas))
    assert [(t.r, t.lora_alpha) for t in found.targets] == [(i % 7 + 1, i % 5 + 1) for i in range(len(names))]


def test_a_hundred_thousand_names_of_modules_to_save_are_looked_up():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj", *(f"a{i}" for i in range(80_000))])
    found = select_targets(blocks(4), config, strict=False)
    assert found.saved == [f"layers.{i}.down_proj" for i in range(4)]


@pytest.mark.parametrize("where", ["r", "lora_alpha", "loftq_config", "rank_pattern"])
@pytest.mark.parametrize("number", ["1e400", "-1e400", "1E+999"])
def test_a_number_beyond_the_range_is_refused(where, number, tmp_path):
    value = f'{{"a": {number}}}' if where in ("loftq_config", "rank_pattern") else number
    (tmp_path / CONFIG_NAME).write_text(f'{{"peft_type": "LORA", "target_modules": ["q"], "{where}": {value}}}')
    with pytest.raises(AdapterError, match=rf"{CONFIG_NAME}: {re.escape(number)} is beyond the range of numbers"):
        LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["x" * 5000, "\x1b[31mred", "two\nlines", "\u202etxt.exe"])
def test_a_key_in_a_message_is_short_and_plain(key, tmp_path):
    for content in ({key: 1}, {"rank_pattern": {key: "a"}}, {"alpha_pattern": {key: -1}}, {"target_modules": 3, key: 0}):
        (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q"], **content}))
        with pytest.raises(AdapterError) as caught:
            LoraConfig.from_pretrained(tmp_path)
        text = str(caught.value).removeprefix(str(tmp_path))
        assert text.isprintable()
        assert key not in text
        assert len(text) < 500
