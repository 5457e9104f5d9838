"""examples/: scripts to copy, each run whole on a tiny model with random weights, without a
network."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
TEXT = ["def one(): return 1", "def two(): return 2", "def three(): return 3"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a Llama of two layers and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), eos_token_id=0, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(script, *arguments): what it printed, in an empty folder, on the CPU, with no way to a
    hub."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub" / "datasets"))

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_compile(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40 and text.startswith('"""') and f"python examples/{script.name} " in text
    compile(text, script.name, "exec")


def test_each_script_has_a_test():
    run_here = {"finetune_trainer_dora.py", "finetune_sft.py", "finetune_without_peft.py", "serve_adapters.py"}
    # tests/engines has the last
    assert {path.name for path in SCRIPTS} == run_here | {"vllm_serve.py"}


def adapter_keys(folder):
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key.split(".")[-1] if "magnitude" in key else key.split(".")[-2] for key in file.keys()}


def test_trainer(run, tiny, tmp_path):
    (tmp_path / "text").write_text("\n".join(TEXT), encoding="utf-8")
    said = run("finetune_trainer_dora.py", tiny, "text", "out")
    assert "14 of 14 LoRA layers fused" in said and "'loss'" in said
    assert adapter_keys(tmp_path / "out") == {"lora_A", "lora_B", "lora_magnitude_vector"}


def test_sft(run, tiny, tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXT), encoding="utf-8")
    said = run("finetune_sft.py", tiny, "data.jsonl", "out")
    assert "14 of 14 LoRA layers fused" in said and "calls that went to PEFT" not in said and "'loss'" in said
    assert adapter_keys(tmp_path / "out") == {"lora_A", "lora_B"}


def test_without_peft_and_serving(run, tiny, tmp_path):
    (tmp_path / "text").write_text("\n".join(TEXT), encoding="utf-8")
    for out in ("one", "two"):
        said = run("finetune_without_peft.py", tiny, "text", out)
        assert "14 layers have an adapter" in said and said.count("loss ") == 3
    assert adapter_keys(tmp_path / "one") == {"lora_A", "lora_B", "lora_magnitude_vector"}
    said = run("serve_adapters.py", tiny, "def ", "one", "two")
    assert [line.partition(":")[0] for line in said.splitlines() if ": def " in line] == ["one", "two", "the base"]
    assert "residents=2" in said


def test_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL", raising=False)
    book = json.loads((EXAMPLES / "finetune.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4 and not any(cell.get("outputs") for cell in book["cells"])
    session = {"__name__": "__main__"}
    for i, cell in enumerate(cells):
        exec(compile(cell, f"cell {i + 1}", "exec"), session)
    said = capsys.readouterr().out
    assert "14 of 14 LoRA layers fused; backend" in said and said.rstrip().endswith("{}")
    assert session["losses"][-1] < session["losses"][0] and (tmp_path / "my-adapter" / "adapter_config.json").is_file()
