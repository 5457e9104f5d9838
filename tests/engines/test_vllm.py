"""The plugin in vLLM's own engine, against PEFT. Run by `make test-vllm`."""

import asyncio
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import llama
import pytest
import torch
from engine import GREEDY, NUMBERS, OPTIONS, check, generate, model_of, request
from vllm import LLM, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from lora_kernels.adapters.config import AdapterError
from lora_kernels.integrations import vllm as plugin
from lora_kernels.integrations.vllm import fits, hooks
from lora_kernels.integrations.vllm.adapters import AdapterExtra
from lora_kernels.integrations.vllm.layers import OnMultiLora
from lora_kernels.integrations.vllm.step import Step
from lora_kernels.ops.multi_lora import BatchPlan, multi_lora_add_
from lora_kernels.serving.site import Pages, Prepared

KINDS = [None, *llama.KINDS]
SLOTS = len(llama.KINDS) + 1
OPTIONS = OPTIONS | dict(max_loras=SLOTS, max_cpu_loras=2 * SLOTS)
WRONG = {
    "shape": "A and B must be", "nan": "not finite", "magnitude": "the magnitude is missing", "short": "magnitude must have",
    "rank": "its rank 65 is greater than max_lora_rank 64; --max-lora-rank 128 raises it",
    "foreign": "modules that the model does not have", "half": "B is missing",
    "pissa": "init_lora_weights='pissa'", "truncated": "incomplete metadata, file not fully covered",
    "missing": "doesn't contain tensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama.build(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(str(folder / "model"), distributed_executor_backend="uni", **OPTIONS)


@pytest.fixture(scope="module")
def wanted(folder):
    """PEFT's answers, each computed once."""
    known = {}

    def of(kind, prompt):
        key = kind, tuple(prompt)
        if key not in known:
            known[key] = llama.wanted(folder, kind, prompt)
        return known[key]

    return of


def layers_of(llm):
    return {name: m for name, m in model_of(llm).named_modules() if isinstance(m, OnMultiLora)}


def test_every_kind_in_one_batch_equals_peft(llm, folder, wanted):
    """LoRA, odd ranks, rsLoRA, patterns, DoRA, lora_bias and the base; twice, so that prefill and
    decode of both mix."""
    adapters = {kind: request(folder, kind) for kind in KINDS}
    for prompts in (llama.PROMPTS[:2], llama.PROMPTS[2:]):
        jobs = [(kind, prompt) for prompt in prompts for kind in KINDS]
        found = generate(llm, [(adapters[kind], prompt) for kind, prompt in jobs])
        for (kind, prompt), output in zip(jobs, found, strict=True):
            check(output, wanted(kind, prompt))
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert sorted(layers_of(llm)) == sorted(f"model.layers.{i}.{name}" for i in range(2) for name in names)


def test_adapters_answer_differently(wanted):
    """Otherwise the others could pass with the adapters exchanged."""
    assert len({tuple(wanted(kind, llama.PROMPTS[0])[0]) for kind in KINDS}) == len(KINDS)


def test_more_adapters_than_slots(llm, folder, wanted):
    jobs = [(kind, request(folder, kind), llama.PROMPTS[0]) for _ in range(3) for kind in llama.KINDS]
    for _ in range(2):  # the second time most come back from vLLM's own store
        for (kind, _, prompt), output in zip(jobs, generate(llm, [job[1:] for job in jobs]), strict=True):
            check(output, wanted(kind, prompt))


def test_an_adapter_has_as_many_rows_as_ranks(llm, folder):
    adapter = request(folder, "odd")
    generate(llm, [(adapter, llama.PROMPTS[0])])
    manager = llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    slot = manager.lora_index_to_id.index(adapter.lora_int_id)
    layers = layers_of(llm)
    q, k, v = layers["model.layers.0.self_attn.qkv_proj"]._pages
    assert [int(pages.slots.rank[slot]) for pages in (q, k, v)] == [13, 0, 0]
    assert len(q.held[slot]) == 2 and slot not in k.held
    assert int(layers["model.layers.1.mlp.down_proj"]._slots[0].rank[slot]) == 13


@pytest.mark.parametrize("how", WRONG)
def test_a_bad_adapter_fails_its_own_request(llm, folder, wanted, how):
    engine = llm.llm_engine
    jobs = [("dora", llama.PROMPTS[0]), (None, llama.PROMPTS[1])]
    for i, (kind, prompt) in enumerate(jobs):
        engine.add_request(f"{how}-{i}", TokensPrompt(prompt_token_ids=prompt), GREEDY, lora_request=request(folder, kind))
    engine.step()
    bad = LoRARequest(f"bad-{how}", next(NUMBERS), str(llama.spoil(folder, how)))
    for _ in range(2):
        with pytest.raises(VLLMValidationError, match=rf"the adapter 'bad-{how}' .*{WRONG[how]}"):
            engine.add_request(f"{how}-bad", TokensPrompt(prompt_token_ids=[1, 2]), GREEDY, lora_request=bad)
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step() if output.finished}
    assert len(done) == 2
    for i, (kind, prompt) in enumerate(jobs):
        check(next(output for name, output in done.items() if name.startswith(f"{how}-{i}")), wanted(kind, prompt))


def test_an_adapter_is_exchanged_in_place(llm, folder, wanted, tmp_path):
    """As a trainer does: the same number and path, other weights."""
    place = tmp_path / "policy"
    place.symlink_to(folder / "dora")
    adapter = LoRARequest("policy", next(NUMBERS), str(place))
    check(generate(llm, [(adapter, llama.PROMPTS[2])])[0], wanted("dora", llama.PROMPTS[2]))
    place.unlink()
    place.symlink_to(folder / "dora_some")
    again = LoRARequest("policy", adapter.lora_int_id, str(place), load_inplace=True)
    check(generate(llm, [(again, llama.PROMPTS[2])])[0], wanted("dora_some", llama.PROMPTS[2]))
    place.unlink()
    place.symlink_to(llama.spoil(folder, "nan"))
    with pytest.raises(VLLMValidationError, match="cannot be served: .* values that are not finite"):
        generate(llm, [(again, llama.PROMPTS[2])])
    # what was there stays
    check(generate(llm, [(adapter, llama.PROMPTS[1])])[0], wanted("dora_some", llama.PROMPTS[1]))


def test_a_number_that_another_adapter_has(llm, folder):
    adapter = request(folder, "lora")
    generate(llm, [(adapter, [1])])
    other = LoRARequest("other", adapter.lora_int_id, str(folder / "dora"))
    with pytest.raises(VLLMValidationError, match=f"number {adapter.lora_int_id} is that of .*lora; load_inplace exchanges it"):
        generate(llm, [(other, [1])])


def test_a_gain_that_is_not_finite_leaves_no_slot(llm, folder, wanted, monkeypatch):
    """What only a rank itself can see, after the adapter is in the slot."""
    adapter = request(folder, "dora")
    real = OnMultiLora._norm_squared
    monkeypatch.setattr(OnMultiLora, "_norm_squared", lambda self, *rest: real(self, *rest) * torch.nan)
    with pytest.raises(VLLMValidationError, match="the gain of DoRA is not finite"):
        generate(llm, [(adapter, [1])])
    manager = llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    assert adapter.lora_int_id not in manager.lora_index_to_id and adapter.lora_int_id not in manager.list_adapters()
    monkeypatch.undo()
    check(generate(llm, [(adapter, llama.PROMPTS[1])])[0], wanted("dora", llama.PROMPTS[1]))


def test_norms_are_those_of_the_weights_now(llm):
    """vLLM removes all adapters when it has new weights."""
    manager = llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    for layer in layers_of(llm).values():
        layer._squared = [torch.zeros(())] * len(layer._squared)
    manager.remove_all_adapters()
    assert all(norm is None for layer in layers_of(llm).values() for norm in layer._squared)


def test_dora_over_a_base_that_hides_its_weight(llm, folder, wanted, monkeypatch):
    """Quantised and packed bases have no plain weight: the norm comes from products."""
    monkeypatch.setattr(OnMultiLora, "_plain_weight", lambda self: None)
    for kind in ("dora", "dora_some"):
        check(generate(llm, [(request(folder, kind), llama.PROMPTS[3])])[0], wanted(kind, llama.PROMPTS[3]))
    real = OnMultiLora._base_product
    monkeypatch.setattr(OnMultiLora, "_base_product", lambda self, x: real(self, (x / 0.8).round() * 0.8))
    with pytest.raises(VLLMValidationError, match="it rounds its inputs to a fixed scale"):
        generate(llm, [(request(folder, "dora"), [1])])
    generate(llm, [(request(folder, "lora"), [1])])


def test_a_layer_is_traced_whole(llm, folder):
    """torch.compile, which vLLM uses on GPUs, finds no break, and no other numbers."""
    kinds = ("dora", "lora", None)
    generate(llm, [(adapter, llama.PROMPTS[0]) for adapter in [request(folder, kind) for kind in kinds]])
    manager = llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    slots = [slot for slot, number in enumerate(manager.lora_index_to_id) if number is not None]
    layer = layers_of(llm)["model.layers.0.self_attn.qkv_proj"]
    layer._step.set_slots(torch.tensor([slots[-1], -1, slots[0], slots[-1], -1]), False)
    # one row more, which pads the step
    x, y = torch.randn(6, llama.HIDDEN), torch.randn(6, sum(layer.output_slices))
    with torch.inference_mode():
        eager = layer._apply_lora_to_output(x, y.clone())
        compiled = torch.compile(layer._apply_lora_to_output, fullgraph=True, backend="aot_eager")(x, y.clone())
    assert torch.equal(eager, compiled) and not torch.equal(eager[0], y[0]) and torch.equal(eager[5], y[5])


def test_two_ranks_and_a_server(folder, wanted):
    """Tensor parallelism: shards of W, A, B, magnitudes and biases; the server's engine, in
    processes of its own."""

    async def one(engine, kind, adapter, prompt):
        name, tokens = f"{kind}-{next(NUMBERS)}", TokensPrompt(prompt_token_ids=prompt)
        return [output async for output in engine.generate(tokens, GREEDY, request_id=name, lora_request=adapter)][-1]

    async def run():
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
            model=str(folder / "model"), tensor_parallel_size=2, distributed_executor_backend="mp", **OPTIONS,
        ))  # fmt: skip
        try:
            jobs = [(kind, prompt) for kind in KINDS for prompt in llama.PROMPTS[:2]]
            adapters = {kind: request(folder, kind) for kind in KINDS}
            tasks = [asyncio.create_task(one(engine, kind, adapters[kind], prompt)) for kind, prompt in jobs]
            for how in WRONG:
                bad = LoRARequest(f"bad-{how}", next(NUMBERS), str(llama.spoil(folder, how)))
                with pytest.raises(VLLMValidationError, match=rf"the adapter 'bad-{how}' .*{WRONG[how]}"):
                    await one(engine, "bad", bad, [1, 2])
            for (kind, prompt), task in zip(jobs, tasks, strict=True):
                check(await task, wanted(kind, prompt))
        finally:
            engine.shutdown()

    asyncio.run(run())


def fake_manager(names, packed=None, **more):
    """A manager of vLLM's with modules by name, each an nn.Linear that is not ours."""
    model = torch.nn.Module()
    for name in names:
        owner = model
        *path, last = name.split(".")
        for part in path:
            owner.add_module(part, getattr(owner, part, torch.nn.Module()))
            owner = getattr(owner, part)
        owner.add_module(last, torch.nn.Linear(2, 2))
    return SimpleNamespace(**{
        "packed_modules": {}, "packed_modules_mapping": packed or {}, "modules": dict.fromkeys(names, torch.nn.Linear(2, 2)),
        "model": model, "lora_config": SimpleNamespace(target_modules=None), "is_pooling_model": False,
        "_get_lora_layer_weights": lambda adapter, name: adapter.loras.get(name),
    } | more)  # fmt: skip


def test_dora_where_vllm_has_its_own_layer_is_refused():
    """On the head, on embeddings, and on what vLLM serves no LoRA for."""
    adapter = SimpleNamespace(loras={"lm_head": 1}, extras={"lm_head": AdapterExtra(magnitude=torch.ones(2))})
    with pytest.raises(AdapterError, match="lm_head: DoRA and lora_bias are served on linear layers, this is vLLM's Linear"):
        fits.check_adapter(fake_manager(["lm_head"]), adapter)
    with pytest.raises(AdapterError, match="on modules that vLLM serves no LoRA for: lm_head"):
        fits.check_adapter(fake_manager(["lm_head"], modules={}), adapter)
    fits.check_adapter(fake_manager(["lm_head"], modules={}), SimpleNamespace(loras={"lm_head": 1}, extras={}))


@pytest.mark.parametrize(("name", "more", "there"), [
    ("model.a.q_proj", {}, True), ("model.a.o_proj", {}, True), ("model.a.x_proj", {}, False), ("model.b.q_proj", {}, False),
    ("a.q_proj", {}, False), ("a.q_proj", {"is_pooling_model": True}, True), ("model.mlp.experts.base_layer", {}, True),
    ("model.a.o_proj.base_layer", {}, True),
])  # fmt: skip
def test_which_names_the_model_has(name, more, there):
    """Packed ones, those of pooling models without their first part, and experts, which vLLM checks
    itself."""
    manager = fake_manager(["model.a.qkv_proj", "model.a.o_proj"], {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}, **more)
    manager.modules = {}
    with nullcontext() if there else pytest.raises(AdapterError, match="modules that the model does not have"):
        fits.check_adapter(manager, SimpleNamespace(loras={name: 1}, extras={}))


def test_stale_ids_are_found():
    """A slot that changes hands after a step was planned: its tokens get the base, and the next
    step says so."""
    step = Step(2, 8, torch.device("cpu"))
    pages = Pages(4, 6, torch.float32, step.generation, 4, 8)
    pages.put(1, Prepared(torch.ones(3, 6), torch.ones(3, 4), 1.0))
    x, y = torch.randn(2, 6), torch.randn(2, 4)
    for stale in (False, True):
        step.set_slots(torch.tensor([1, -1]), False)
        if stale:
            step.occupy(1)
        found = multi_lora_add_(y.clone(), x, pages.slots, step.plan(2))
        assert torch.equal(found[0], y[0]) == stale and torch.equal(found[1], y[1])
    step.set_slots(torch.tensor([1, -1]), False)
    with pytest.raises(LookupError, match="out of range or stale"):
        step.set_slots(torch.tensor([1, -1]), False)
    step.set_slots(torch.tensor([1, -1]), False)


def test_a_plan_in_fixed_buffers_is_the_plan():
    """Of steps that grow and shrink, and of longer ones, which CUDA graphs pad them to."""
    torch.manual_seed(0)
    step = Step(4, 16, torch.device("cpu"))
    for count in (9, 3, 0, 12, 16, 1, 5):
        step.occupy(count % 4)
        slots = torch.randint(-1, 4, (count,))
        step.set_slots(slots, False)
        for tokens in {count, (count + 16) // 2, 16, count // 2}:
            padded = torch.cat([slots, torch.full((16,), -1)])[:tokens]
            ids = torch.where(padded < 0, -1, (step.generation[padded.clamp(min=0)].long() << 32) + padded)
            wanted, plan = BatchPlan.build(ids, 4), step.plan(tokens)
            for name in ("ids", "order", "starts"):
                assert torch.equal(getattr(plan, name), getattr(wanted, name)), (count, tokens, name)


def test_a_layer_of_two_owners():
    """As the gate of shared experts: whoever calls it gets the one with LoRA, which keeps its own
    base."""

    class Layer(OnMultiLora, torch.nn.Module):
        def __init__(self, base):
            torch.nn.Module.__init__(self)
            self.base_layer = base

    base = torch.nn.Linear(2, 2)
    layer, mlp = Layer(base), torch.nn.ModuleDict({"expert_gate": base})
    model = torch.nn.ModuleDict({"gate": layer, "shared_expert": mlp})
    hooks._replace_aliases(SimpleNamespace(model=model, modules={"gate": layer}))
    assert mlp["expert_gate"] is layer and layer.base_layer is base


def test_it_can_be_left_out():
    """Without the plugin vLLM is as it was."""
    script = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.lora import utils\n"
        "print(sorted({c.__module__.split('.')[0] for c in utils._all_lora_classes}))"
    )
    for value, modules in (("0", ["vllm"]), ("1", ["lora_kernels", "vllm"])):
        env = {**os.environ, "LORA_KERNELS_VLLM": value}
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
        assert ran.stdout.strip().splitlines()[-1] == str(modules)


def test_another_vllm_is_left_alone(monkeypatch, caplog):
    from vllm.lora.model_manager import LoRAModelManager

    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.delattr(LoRAModelManager, "activate_adapter")
    before = LoRAModelManager._create_lora_modules
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "vllm"):
        plugin.register()
    assert "is not supported" in caplog.text and "activate_adapter" in caplog.text
    assert LoRAModelManager._create_lora_modules is before
