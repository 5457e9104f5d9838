"""The plugin over mixtures of experts in vLLM's engine. Run by `make test-vllm`."""

import asyncio
import json

import llama
import moe
import pytest
import torch
from engine import GREEDY, NUMBERS, OPTIONS, check, generate, model_of, request
from safetensors.torch import load_file, save_file
from vllm import LLM, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from lora_kernels.integrations.vllm.experts import ExpertsOnMultiLora

KINDS = [None, *moe.ALL]
SLOTS = len(moe.ALL)
OPTIONS = OPTIONS | dict(max_loras=SLOTS, max_cpu_loras=2 * SLOTS)
PROMPTS = llama.PROMPTS[:3]


@pytest.fixture(scope="module", params=sorted(moe.BLOCK))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return moe.build(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def llm(folder):
    cleanup_dist_env_and_memory()  # groups of ranks of a model without experts, if one came before
    return LLM(str(folder / "model"), distributed_executor_backend="uni", **OPTIONS)


@pytest.fixture(scope="module")
def wanted(folder):
    return {(kind, i): answer for kind in KINDS for i, answer in enumerate(moe.wanted(folder, kind, PROMPTS))}


def layers_of(llm):
    return [m for m in model_of(llm).modules() if isinstance(m, ExpertsOnMultiLora)]


def test_attention_alone_leaves_experts_to_vllm(llm, folder, wanted):
    """First, so that no adapter has changed experts: their weights are held once, as vLLM packs
    them."""
    kinds = ["attention", None, "dora"]
    found = generate(llm, [(request(folder, kind), PROMPTS[0]) for kind in kinds])
    for kind, output in zip(kinds, found, strict=True):
        check(output, wanted[kind, 0])
    assert len(layers_of(llm)) == 2
    assert all(layer._plain is None and not layer._held and layer.refusal is None for layer in layers_of(llm))


def test_every_kind_in_one_batch(llm, folder, wanted):
    """LoRA, rsLoRA, DoRA, patterns, the router, both forms of files, ragged ranks and the base;
    twice, so that prefill and decode of both mix."""
    adapters = {kind: request(folder, kind) for kind in KINDS}
    for some in ((0,), (1, 2)):
        jobs = [(kind, i) for i in some for kind in KINDS]
        for job, output in zip(jobs, generate(llm, [(adapters[kind], PROMPTS[i]) for kind, i in jobs]), strict=True):
            check(output, wanted[job])


def test_adapters_answer_differently(wanted):
    assert len({tuple(wanted[kind, 0][1]) for kind in KINDS}) == len(KINDS)


def test_tokens_without_adapters_of_experts_are_vllms(llm, folder):
    """Bit by bit, beside others, too; and the weights of the others are those of the checkpoint."""
    generate(llm, [(request(folder, "experts"), PROMPTS[0])])
    layer = layers_of(llm)[0]
    base = moe.base(folder).model.layers[0].mlp.experts
    wide = layer._routed.w13_weight.shape[1] // 2
    for i, half in enumerate(base.gate_up_proj.chunk(2, 1)):
        assert torch.equal(layer._plain[0][:, i * wide : i * wide + half.shape[1]], half)
    assert torch.equal(layer._plain[1][:, :, : base.down_proj.shape[2]], base.down_proj)
    slot = next(iter(layer._held))
    x, weights = torch.randn(5, moe.HIDDEN), torch.rand(5, 2)
    ids = torch.randint(moe.EXPERTS, (5, 2), dtype=torch.int32)
    own = layer._own_forward(x, weights, ids, None, None)
    layer._step.set_slots(torch.full((5,), -1), True)
    assert torch.equal(layer.run(x, weights, ids, None, None), own)
    layer._step.set_slots(torch.tensor([-1, slot, -1, -1, slot]), False)
    found = layer.run(x, weights, ids, None, None)
    assert torch.equal(found[[0, 2, 3]], own[[0, 2, 3]])
    assert not torch.allclose(found[1], own[1], rtol=1e-3) and not torch.allclose(found[4], own[4], rtol=1e-3)


def spoil(folder, how):
    """A copy of an adapter with something wrong."""
    source = folder / ("experts" if how in ("rank", "shape") else "modules")
    target = folder / f"bad_{how}"
    target.mkdir(exist_ok=True)
    config, tensors = json.loads((source / "adapter_config.json").read_text()), load_file(source / "adapter_model.safetensors")
    first = next(iter(sorted(tensors)))
    if how == "rank":
        config["r"] = 8
    elif how == "shape":
        name = next(name for name in tensors if name.endswith("1.mlp.experts.lora_B.weight"))
        tensors[name] = torch.zeros(moe.HIDDEN + 1, tensors[name].shape[1])
    elif how == "foreign":
        for side in "AB":
            name = first.replace(".experts.0.", ".experts.7.").replace("lora_A", f"lora_{side}")
            tensors[name] = torch.zeros(4, 4)
    elif how == "nan":
        tensors[first][1, 1] = torch.nan
    elif how == "bias":
        config["lora_bias"] = True
        for name in [name for name in tensors if ".lora_B." in name]:
            tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(("how", "said"), {
    "rank": "A must have 48 rows, 6 times the rank of its configuration, found 24", "nan": "A has values that are not finite",
    "shape": r"A and B must be \[r \* 6, in\] and \[out, r \* 6\] of gate_up_proj",
    "foreign": r"expected target modules .*experts\.7\.", "bias": "lora_bias is not served on experts",
}.items())  # fmt: skip
def test_a_bad_adapter_fails_its_own_request(llm, folder, wanted, how, said):
    bad = LoRARequest(f"bad-{how}", next(NUMBERS), str(spoil(folder, how)))
    with pytest.raises(VLLMValidationError, match=f"the adapter 'bad-{how}' .*{said}"):
        generate(llm, [(bad, [1, 2])])
    kinds = ["down", "attention"]  # in slots of which others have changed experts
    found = generate(llm, [(request(folder, kind), PROMPTS[1]) for kind in kinds])
    for kind, output in zip(kinds, found, strict=True):
        check(output, wanted[kind, 1])


def test_two_ranks(folder, wanted, family):
    """Tensor parallelism: shards of W, A, B and magnitudes of experts, which vLLM fills up."""
    if family != "qwen":
        return

    async def one(engine, adapter, i):
        tokens = TokensPrompt(prompt_token_ids=PROMPTS[i])
        return [o async for o in engine.generate(tokens, GREEDY, request_id=str(next(NUMBERS)), lora_request=adapter)][-1]

    async def run():
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
            model=str(folder / "model"), tensor_parallel_size=2, distributed_executor_backend="mp", **OPTIONS,
        ))  # fmt: skip
        try:
            tasks = {kind: asyncio.create_task(one(engine, request(folder, kind), 0)) for kind in KINDS}
            for kind, task in tasks.items():
                check(await task, wanted[kind, 0])
        finally:
            engine.shutdown()

    asyncio.run(run())
