"""What the tests of vLLM's engine share."""

import itertools
import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1"
)  # fmt: skip
from llama import TOKENS
from vllm import SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

OPTIONS = dict(
    dtype="float32", enable_lora=True, max_lora_rank=64, skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=16,
    gpu_memory_utilization=0.05, max_model_len=64, enable_prefix_caching=False,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, logprobs=1)
NUMBERS = itertools.count(1)


def request(folder, kind, **options):
    """A request for an adapter by a number that was not used before."""
    number = next(NUMBERS)
    return None if kind is None else LoRARequest(f"{kind}-{number}", number, str(folder / kind), **options)


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def check(output, wanted):
    """Tokens equal, their logprobs within 1e-5."""
    tokens, logprobs = wanted
    found = list(output.outputs[0].token_ids)
    assert found == tokens
    for at, token, right in zip(output.outputs[0].logprobs, found, logprobs, strict=True):
        assert abs(at[token].logprob - right) <= 1e-5


def generate(llm, jobs):
    prompts = [TokensPrompt(prompt_token_ids=prompt) for _, prompt in jobs]
    return llm.generate(prompts, GREEDY, lora_request=[adapter for adapter, _ in jobs], use_tqdm=False)
