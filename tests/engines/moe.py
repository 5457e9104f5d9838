"""Small mixtures of experts, adapters for them in both forms of files, and what PEFT, or the model
with the adapter in its weights, generates with each."""

import json
from pathlib import Path

import llama
import peft
import torch
from llama import base, save_adapters
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

VOCAB, HIDDEN, EXPERTS = llama.VOCAB, 128, 6
WIDE = {"qwen": 48, "mixtral": 96}
"""vLLM's kernel wants multiples of 32, and fills up others."""
BLOCK = {"qwen": "mlp", "mixtral": "block_sparse_moe"}
NAMES = {"qwen": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = "mlp.gate.weight"

KINDS: dict[str, dict] = {
    "attention": dict(r=8, lora_alpha=16, target_modules=ATTENTION),
    "dora": dict(r=6, lora_alpha=12, use_dora=True, target_modules=ATTENTION),
    "experts": dict(r=4, lora_alpha=8, target_modules=[], target_parameters=PARAMETERS),
    "rslora": dict(
        r=8, lora_alpha=4, use_rslora=True, target_modules=ATTENTION, target_parameters=[*PARAMETERS, ROUTER],
    ),
    "patterned": dict(
        r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=[*PARAMETERS, ROUTER],
        rank_pattern={"gate_up_proj": 9, "layers.1.mlp.experts.down_proj": 2, "gate.weight": 3},
        alpha_pattern={"experts.down_proj": 5, "gate.weight": 7},
    ),
    "down": dict(
        r=5, lora_alpha=5, target_modules=[], target_parameters=PARAMETERS[1:], rank_pattern={"down_proj": 3},
        alpha_pattern={"down_proj": 6, "gate_up_proj": 99},
    ),
    "up": dict(
        r=5, lora_alpha=5, target_modules=[], target_parameters=PARAMETERS[:1], rank_pattern={"gate_up_proj": 2},
        alpha_pattern={"gate_up_proj": 6, "down_proj": 99},
    ),
}  # fmt: skip
"""As PEFT makes and saves them."""
MERGED = ("ragged", "expert_dora")
"""A module for each expert, beyond what PEFT makes of such a file."""
ALL = [*KINDS, "modules", *MERGED]


def build(folder: Path, family: str) -> Path:
    """Writes the model and the adapters; returns the folder."""
    torch.manual_seed(0)
    common = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, initializer_range=0.1,
        num_experts_per_tok=2,
    )  # fmt: skip
    config = (
        Qwen3MoeConfig(**common, num_experts=EXPERTS, moe_intermediate_size=WIDE[family], norm_topk_prob=True)
        if family == "qwen"
        else MixtralConfig(**common, num_local_experts=EXPERTS, intermediate_size=WIDE[family])
    )
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("gate.weight"):
                p.normal_(0, 0.3)
    made.save_pretrained(folder / "model")
    save_adapters(folder, KINDS)
    write_modules(folder, family, "modules", 4)
    write_modules(folder, family, "ragged", 5, lambda expert, part: (expert + part) % 4)
    write_modules(folder, family, "expert_dora", 3, lambda expert, part: 3 if (expert, part) != (1, 2) else 0, dora=True)
    return folder


def write_modules(folder, family, kind, r, rank_of=None, dora=False):
    """An adapter with a module for each expert's matrices; ranks of 0 leave some out."""
    torch.manual_seed(len(kind))
    names, tensors, ranks = NAMES[family], {}, {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for part, name in enumerate(names):
                rank = r if rank_of is None else rank_of(expert, part)
                if not rank:
                    continue
                module = f"model.layers.{layer}.{BLOCK[family]}.experts.{expert}.{name}"
                n_out, n_in = (HIDDEN, WIDE[family]) if part == 2 else (WIDE[family], HIDDEN)
                tensors[f"base_model.model.{module}.lora_A.weight"] = 0.15 * torch.randn(rank, n_in)
                tensors[f"base_model.model.{module}.lora_B.weight"] = 0.15 * torch.randn(n_out, rank)
                if dora:
                    tensors[f"base_model.model.{module}.lora_magnitude_vector"] = 1 + torch.rand(n_out)
                if rank != r:
                    ranks[f"experts.{expert}.{name}"] = rank
    config = peft.LoraConfig(
        r=r, lora_alpha=9, target_modules=list(names), rank_pattern=ranks, use_dora=dora, task_type="CAUSAL_LM"
    )
    config.base_model_name_or_path = str(folder / "model")
    config.save_pretrained(folder / kind)
    save_file(tensors, folder / kind / "adapter_model.safetensors")


def merged(folder: Path, kind: str):
    """The model with an adapter of modules in its weights."""
    model, config = base(folder), json.loads((folder / kind / "adapter_config.json").read_text())
    tensors = load_file(folder / kind / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removesuffix(".lora_A.weight")
        *_, layer, _, _, expert, last = module.split(".")
        experts = model.model.layers[int(layer)].mlp.experts
        part = [part for names in NAMES.values() for part, each in enumerate(names) if each == last][0]
        with torch.no_grad():
            w = experts.down_proj[int(expert)] if part == 2 else experts.gate_up_proj[int(expert)].chunk(2)[part]
            new = w.double() + config["lora_alpha"] / len(a) * tensors[f"{module}.lora_B.weight"].double() @ a.double()
            if config["use_dora"]:
                new *= tensors[f"{module}.lora_magnitude_vector"].double()[:, None] / new.norm(dim=1, keepdim=True)
            w.copy_(new)
    return model


def wanted(folder: Path, kind: str | None, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """The greedy tokens of each prompt and their logprobs."""
    model = merged(folder, kind) if kind in MERGED else base(folder)
    if kind is not None and kind not in MERGED:
        model = peft.PeftModel.from_pretrained(model, folder / kind)
    return [llama.greedy(model, prompt) for prompt in prompts]
