"""examples/vllm_serve.py, whole, on a tiny model with a LoRA and a DoRA adapter."""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SCRIPT = Path(__file__).parents[2] / "examples" / "vllm_serve.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model, with a tokenizer of bytes; lora and dora."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), eos_token_id=None, max_position_embeddings=128, **sizes))
    made.save_pretrained(folder / "model")
    for name in ("lora", "dora"):
        config = peft.LoraConfig(r=8, use_dora=name == "dora", target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder / "model"), config).save_pretrained(folder / name)
    return folder


def test_it_runs(folder):
    command = [sys.executable, str(SCRIPT), str(folder / "model"), "def one", str(folder / "lora"), str(folder / "dora")]
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8",
    }  # fmt: skip
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout + done.stderr
    assert "LoRA layers run on multi_lora" in said
    assert all(f"\n{name}: " in "\n" + done.stdout for name in ("lora", "dora", "the base"))
