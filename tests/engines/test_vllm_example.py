"""examples/vllm_serve.py, whole, on a tiny model with a LoRA and a DoRA adapter."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
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


SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8",
}  # fmt: skip


def test_it_runs(folder):
    command = [sys.executable, str(SCRIPT), str(folder / "model"), "def one", str(folder / "lora"), str(folder / "dora")]
    done = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout + done.stderr
    assert "LoRA layers run on multi_lora" in said
    assert all(f"\n{name}: " in "\n" + done.stdout for name in ("lora", "dora", "the base"))


def asked(port, path, **body):
    """(status, answer) of the server."""
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), kind)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_server_says_why(folder, tmp_path):
    """A bad adapter is the client's mistake, with its reason, and the server lives on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    weights = (folder / "lora" / "adapter_model.safetensors").read_bytes()
    wide = "its rank 65 is greater than max_lora_rank 64; --max-lora-rank 128 raises it"
    cases = {
        "wide": (config | {"r": 65}, weights, wide),
        "other": (config | {"r": 4}, weights, "A must have 4 rows, the rank of its configuration, found 8"),
        "torn": (config, weights[:-64], "not fully covered"),
        "pissa": (config | {"init_lora_weights": "pissa"}, weights, "init_lora_weights"),
    }  # fmt: skip
    for name, (values, data, *_) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(values))
        (tmp_path / name / "adapter_model.safetensors").write_bytes(data)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")),
        *("--port", str(port), "--host", "127.0.0.1", "--enable-lora", "--max-lora-rank", "64", "--dtype", "float32"),
        *("--enforce-eager", "--gpu-memory-utilization", "0.05", "--max-model-len", "64", "--served-model-name", "base"),
    ]
    log = tmp_path / "log"
    settings = os.environ | SETTINGS | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, env=settings, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 240
        while time.monotonic() < until and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        for name, (_, _, text) in cases.items():
            found, answer = asked(port, "/v1/load_lora_adapter", lora_name=name, lora_path=str(tmp_path / name))
            assert (found, text in answer) == (400, True), (name, found, answer)
            assert f"the adapter '{name}' " in answer and "cannot be served" in answer
        found, answer = asked(port, "/v1/load_lora_adapter", lora_name="gone", lora_path=str(tmp_path / "gone"))
        assert found == 404, answer
        found, answer = asked(port, "/v1/load_lora_adapter", lora_name="dora", lora_path=str(folder / "dora"))
        assert found == 200, answer
        for model in ("dora", "base"):
            found, answer = asked(port, "/v1/completions", model=model, prompt="def", max_tokens=3)
            assert found == 200 and json.loads(answer)["usage"]["completion_tokens"] == 3, answer
    finally:
        server.terminate()
        server.wait(60)
