"""Fine-tunes a causal language model with DoRA without PEFT; the files are PEFT's all the same.

    python examples/finetune_without_peft.py MODEL TEXT OUT   TEXT: a file, one example a line
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_kernels import LoraConfig, inject_adapter, save_adapter

name, text, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
names = inject_adapter(model, LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules="all-linear"))
print(f"{len(names)} layers have an adapter")

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
model.train()
for line in Path(text).read_text(encoding="utf-8").splitlines():
    ids = tokenizer(line, return_tensors="pt", truncation=True, max_length=512).input_ids
    if ids.shape[1] < 2:
        continue
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")
save_adapter(model, out)  # peft.PeftModel.from_pretrained(base, out) reads it
