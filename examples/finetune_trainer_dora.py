"""Fine-tunes a causal language model with DoRA and transformers' Trainer, on the kernels.

    python examples/finetune_trainer_dora.py MODEL TEXT OUT   TEXT: a file, one example a line
"""

import sys
from pathlib import Path

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import lora_kernels

name, text, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
lines = [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
rows = [tokenizer(line, truncation=True, max_length=512) for line in lines]

config = peft.LoraConfig(
    r=16, lora_alpha=32, lora_dropout=0.05, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"
)
model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
print(lora_kernels.fuse(model))  # which layers, on which backend, and why a layer was left to PEFT

arguments = TrainingArguments(
    out, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-4,
    logging_steps=1, save_strategy="no", report_to=[],
)  # fmt: skip
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
model.save_pretrained(out)  # PEFT's files
