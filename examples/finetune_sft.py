"""Fine-tunes a causal language model with LoRA and TRL's SFTTrainer, on the kernels.

    python examples/finetune_sft.py MODEL DATA OUT   DATA: JSON of "text" or "prompt", "completion"
"""

import sys

import peft
import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import lora_kernels

name, data, out = sys.argv[1:]
trainer = SFTTrainer(
    model=name,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    args=SFTConfig(
        out, num_train_epochs=1, per_device_train_batch_size=4, logging_steps=1, report_to=[], save_strategy="no",
        bf16=torch.cuda.is_available(),
    ),  # fmt: skip
    peft_config=peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
)
report = lora_kernels.fuse(trainer.model)  # after SFTTrainer has put PEFT's layers in
trainer.train()
print(report)  # with the calls, if any, that went to PEFT's own forward
trainer.save_model(out)
