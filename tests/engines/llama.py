"""A small Llama, adapters of every kind for it as PEFT saves them, and what PEFT itself generates
with each."""

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, HEADS, KV_HEADS, WIDE = 96, 128, 4, 2, 192
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [[5, 17, 3, 88, 41], [9, 9, 61], [70, 2, 33, 33, 12, 8, 90], [1], [24, 7, 55]]
TOKENS = 8

KINDS: dict[str, dict] = {
    "lora": dict(r=8, lora_alpha=16, target_modules=LINEAR),
    "odd": dict(r=13, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    "rslora": dict(r=16, lora_alpha=8, use_rslora=True, target_modules=LINEAR),
    "patterned": dict(
        r=4, lora_alpha=8, target_modules=LINEAR, rank_pattern={"q_proj": 16, "layers.1.mlp.down_proj": 2},
        alpha_pattern={"v_proj": 3},
    ),
    "dora": dict(r=8, lora_alpha=16, use_dora=True, target_modules=LINEAR),
    "dora_some": dict(r=6, lora_alpha=12, use_dora=True, use_rslora=True, target_modules=["v_proj", "up_proj", "o_proj"]),
    "lora_bias": dict(r=8, lora_alpha=4, lora_bias=True, target_modules=["k_proj", "o_proj", "gate_proj"]),
}  # fmt: skip


def build(folder: Path) -> Path:
    """Writes the model and the adapters; returns the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=None,
        bos_token_id=None, initializer_range=0.1, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
    made.save_pretrained(folder / "model")
    save_adapters(folder, KINDS)
    return folder


def save_adapters(folder: Path, kinds: dict[str, dict]) -> None:
    """Writes an adapter of each kind for the model of a folder, with random numbers."""
    for i, (kind, options) in enumerate(kinds.items()):
        model = peft.get_peft_model(base(folder), peft.LoraConfig(**options))
        torch.manual_seed(i + 1)
        for name, p in model.named_parameters():
            if "lora_" in name:
                with torch.no_grad():
                    # a magnitude near what it was, and B that changes what is generated
                    p.mul_(1 + 0.3 * torch.randn_like(p)) if "magnitude" in name else p.copy_(0.15 * torch.randn_like(p))
        model.save_pretrained(folder / kind)


def base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def wanted(folder: Path, kind: str | None, prompt: list[int]) -> tuple[list[int], list[float]]:
    """PEFT's greedy tokens and their logprobs."""
    model = base(folder)
    return greedy(model if kind is None else peft.PeftModel.from_pretrained(model, folder / kind), prompt)


def greedy(model, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The tokens that a model generates, and their logprobs."""
    ids, found = torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(TOKENS):
            logprobs = model.eval()(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            token = int(logprobs.argmax())
            found.append(float(logprobs[token]))
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return ids[0, len(prompt) :].tolist(), found


def spoil(folder: Path, how: str) -> Path:
    """A copy of an adapter with something wrong."""
    source, target = folder / "dora", folder / f"bad_{how}"
    target.mkdir(exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    some = next(name for name in tensors if name.endswith("1.mlp.down_proj.lora_B.weight"))
    magnitude = some.replace("lora_B.weight", "lora_magnitude_vector")
    if how == "shape":
        tensors[some] = torch.zeros(HIDDEN + 1, 8)
    elif how == "nan":
        tensors[some][3, 3] = torch.nan
    elif how == "magnitude":
        del tensors[magnitude]
    elif how == "short":
        tensors[magnitude] = torch.ones(HIDDEN - 1)
    elif how == "rank":
        config["r"] = 65
    elif how == "foreign":
        tensors["base_model.model.model.layers.7.mlp.down_proj.lora_A.weight"] = torch.zeros(8, WIDE)
        tensors["base_model.model.model.layers.7.mlp.down_proj.lora_B.weight"] = torch.zeros(HIDDEN, 8)
        tensors["base_model.model.model.layers.7.mlp.down_proj.lora_magnitude_vector"] = torch.ones(HIDDEN)
    elif how == "half":
        del tensors[some]
    elif how == "pissa":
        config["init_lora_weights"] = "pissa"
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, target / "adapter_model.safetensors")
    if how == "truncated":
        whole = (target / "adapter_model.safetensors").read_bytes()
        (target / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif how == "missing":
        (target / "adapter_model.safetensors").unlink()
    return target
