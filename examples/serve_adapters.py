"""Serves several adapters over one model in one batch: the prompt once for each adapter and once
for the base.

    python examples/serve_adapters.py MODEL PROMPT ADAPTER...      ADAPTER: a folder of PEFT's files
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_kernels.serving import AdapterPool, serve

name, prompt, *folders = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name).eval()
size = sum(file.stat().st_size for folder in folders for file in Path(folder).glob("*.safetensors"))
# all its memory, taken now
pool = AdapterPool(model, capacity_bytes=4 * size + (64 << 20), slots=len(folders))
for folder in folders:
    pool.load(Path(folder).name, folder)
serve(model, pool)

# one for each sequence; None is the base
adapters = [*(Path(folder).name for folder in folders), None]
given = tokenizer([prompt] * len(adapters), return_tensors="pt")
made = model.generate(**given, adapters=adapters, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
for adapter, ids in zip(adapters, made, strict=True):
    print(f"{adapter or 'the base'}: {tokenizer.decode(ids, skip_special_tokens=True)}")
print(pool.stats())
