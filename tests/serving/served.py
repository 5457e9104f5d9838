"""What the tests of serving share: a small Llama, and adapters of every kind that PEFT has for
it."""

import peft
import torch

from tests.integrations.fuse_helpers import VOCABULARY, llama

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": {"r": 8, "lora_alpha": 12, "target_modules": ALL},
    "rslora": {"r": 16, "lora_alpha": 4, "use_rslora": True, "target_modules": ALL},
    "some": {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ALL, "rank_pattern": {"q_proj": 12, "layers.1.mlp.up_proj": 24},
        "alpha_pattern": {"k_proj": 20},
    },
    "dora": {"r": 5, "lora_alpha": 5, "use_dora": True, "target_modules": ALL},
    "dora_rslora": {"r": 9, "lora_alpha": 3, "use_dora": True, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]},
    "lora_bias": {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["q_proj", "up_proj"]},
    "head": {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"]},
}  # fmt: skip


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return llama().to(dtype).eval().requires_grad_(False)


def trained(kind, seed=1):
    """A PEFT model with an adapter of a kind whose numbers are random."""
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), peft.LoraConfig(**KINDS[kind])).eval()
    return randomised(model, kind, seed)


def randomised(model, kind, seed):
    """A PEFT model whose adapter gets numbers that the kind and the seed draw."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, kind)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            elif "magnitude" in name:
                p.mul_(1 + 0.3 * torch.randn(p.shape, generator=generator))
    return model


def save_all(folder, kinds=KINDS, seed=1):
    """{kind: directory} in PEFT's format, and {kind: PEFT's model}."""
    models = {kind: trained(kind, seed) for kind in kinds}
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in kinds}, models


def tokens(rows, length=7, seed=0):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
