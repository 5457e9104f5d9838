"""vLLM with adapters of any kind and rank: installed beside vLLM, lora_kernels is a plugin of it.

    python examples/vllm_serve.py MODEL PROMPT ADAPTER...   ADAPTER: a folder of PEFT's files

As a server: vllm serve MODEL --enable-lora --max-lora-rank 64 --lora-modules NAME=ADAPTER
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

name, prompt, *folders = sys.argv[1:]
llm = LLM(name, enable_lora=True, max_loras=len(folders), max_lora_rank=64)
requests = [LoRARequest(Path(folder).name, i + 1, folder) for i, folder in enumerate(folders)]
outputs = llm.generate(
    [prompt] * (len(requests) + 1), SamplingParams(temperature=0, max_tokens=32), lora_request=[*requests, None]
)
for request, output in zip([*requests, None], outputs, strict=True):
    print(f"{request.lora_name if request else 'the base'}: {output.outputs[0].text}")
