"""warm_up on simulated kernels: what is called later is compiled by then, and the model is left as
it was."""

import copy
import itertools

import pytest
import torch
from experts_helpers import EXPERTS, HIDDEN, OUTER, Config, adapted, block, block_of, choices, fused_of
from fuse_helpers import model
from group_helpers import pair as group_pair
from test_fuse_experts_forms import Split
from torch import nn
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from lora_kernels import explain, fuse, use_backend, warm_up
from lora_kernels.nn import DoRALinear, GroupedLinear, LoRAEmbedding, LoRALinear
from lora_kernels.ops import tuning
from lora_kernels.ops.launch import recorded
from lora_kernels.ptxsim.triton_ptx import _compiled
from tests.nn.test_lora_experts import experts, layer_of

compiled = pytest.fixture(lambda: lambda: _compiled.cache_info().misses)


class Block(nn.Module):
    """A group, a layer of each kind, what has no adapter, and what no kernel of ours computes."""

    def __init__(self, dtype=torch.bfloat16, dropout=0.1):
        super().__init__()
        kind = {"dtype": dtype, "r": 4, "lora_dropout": dropout}
        self.qk = GroupedLinear({"q": LoRALinear(24, 16, **kind), "k": DoRALinear(24, 8, **kind)})
        self.up, self.down = LoRALinear(8, 24, **kind), DoRALinear(24, 8, bias=False, **kind)
        self.plain, self.embedding = nn.Linear(8, 8, dtype=dtype), LoRAEmbedding(5, 8, dtype=dtype)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        q, k = self.qk(x)
        return self.down(self.up(k)) + self.plain(q[..., :8])


def step(block, tokens):
    x = torch.randn(tokens, 24, dtype=torch.bfloat16)
    for wanted in (True, False):
        y = block(x.clone().requires_grad_(wanted))
        y.backward(torch.randn_like(y))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_to_compile(training, compiled):
    block = Block().train(training)
    with use_backend("triton", simulate=True):
        before = compiled()
        assert warm_up(block, 3) == ["qk", "up", "down"]
        assert compiled() > before
        before = compiled()
        if training:
            step(block, 2)
        else:
            block(torch.randn(2, 24, dtype=torch.bfloat16))
        assert compiled() == before
        block.up(torch.randn(40, 8, dtype=torch.bfloat16))  # other tiles: the count above can change
        assert compiled() > before


def test_layers_that_fuse_took_over(compiled):
    fused = model(torch.bfloat16, use_dora=True, lora_dropout=0.1)
    fuse(fused)
    with use_backend("triton", simulate=True):
        assert warm_up(fused, 7) == [f"base_model.model.{name}" for name in "ab"]
        before = compiled()
        y = fused(torch.randn(5, 24, dtype=torch.bfloat16))
        y.backward(torch.randn_like(y))
        assert compiled() == before


def test_groups_that_fuse_found(compiled):
    """Of the layers each is called alone, too, as it is where a call is unlike the others."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    fused = group_pair(torch.bfloat16)[1]
    prefix = "base_model.model"
    try:
        with use_backend("triton", simulate=True):
            alone = [f"{prefix}.{name}" for name in "qkvo"]
            assert warm_up(fused, 5) == alone
            for _ in range(3):
                with torch.no_grad():
                    fused(torch.randn(5, 24, dtype=torch.bfloat16))
            report = fuse(fused)
            assert report.groups() == {prefix: [("q", "k", "v")]}
            assert warm_up(fused, 5) == [prefix, *alone]
            before_step = compiled()
            y = fused(torch.randn(4, 24, dtype=torch.bfloat16))
            y.backward(torch.randn_like(y))
            assert compiled() == before_step and not report.alone() and not report.fallbacks()
            assert all(p.grad is not None for p in fused.parameters() if p.requires_grad)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
@pytest.mark.parametrize("training", [True, False])
def test_experts_that_fuse_took_over(name, training, compiled):
    fused, report = fused_of(block(name, index=choices(3), dtype=torch.bfloat16).train(training))
    module = fused.base_model.model.experts.get_base_layer()
    module.config.num_experts_per_tok = 3
    layer = fused.base_model.model.experts
    with use_backend("triton", simulate=True):
        assert warm_up(fused, 4) == [OUTER]
        before = compiled()
        x = torch.randn(3, 24, dtype=torch.bfloat16, requires_grad=training)
        y = layer(x, choices(3), torch.ones(3, 3, dtype=torch.bfloat16))
        if training:
            y.backward(torch.randn_like(y))
        assert compiled() == before and not report.fallbacks()


@pytest.mark.parametrize("training", [True, False])
def test_experts_of_other_forms(training, compiled):
    """LongCat's, JetMoE's, and a layer of ours over Mixtral's and over Llama 4's."""
    config, bf16 = Config(), torch.bfloat16
    config.n_routed_experts, config.zero_expert_num, config.hidden_act = EXPERTS - 2, 2, "silu"
    longcat, report = fused_of(block_of(LongcatFlashExperts, config, choices(3), bf16))
    jetmoe, of_jetmoe = fused_of(adapted(Split([1, 0, 1, 0, 0, 1]).to(bf16), target_parameters=["experts.weight"]))
    native = nn.ModuleDict({name: layer_of(experts(name, bf16)) for name in ("MixtralExperts", "Llama4TextExperts")})
    native["MixtralExperts"].config.num_experts_per_tok = 3
    routing = choices(3), torch.ones(3, 3, dtype=bf16)
    calls = {
        longcat: (longcat.base_model.model.experts, routing), jetmoe: (jetmoe.base_model.model.experts, ([1, 0, 1, 0, 0, 1],)),
        native: (native["MixtralExperts"], routing),
    }  # fmt: skip
    with use_backend("triton", simulate=True):
        for model, (layer, further) in calls.items():
            assert warm_up(model.train(training), 4) == ([*native] if model is native else [OUTER])
            before = compiled()
            y = layer(torch.randn(3, HIDDEN, dtype=bf16, requires_grad=training), *further)
            if training:
                y.backward(torch.randn_like(y))
            assert compiled() == before
        native["Llama4TextExperts"](torch.randn(3 * EXPERTS, HIDDEN, dtype=bf16))
        assert compiled() == before and not report.fallbacks() and not of_jetmoe.fallbacks()


def test_one_matrix_and_what_peft_runs(compiled):
    fused, _ = fused_of(adapted(nn.ModuleDict({"layer": nn.Linear(24, 10)}), target_parameters=["layer.weight"]))
    stock = block()
    stock.base_model.model.experts.get_base_layer().down_proj.requires_grad_()
    left, _ = fused_of(stock)
    with use_backend("triton", simulate=True):
        assert warm_up(fused, 4) == ["base_model.model.layer"]
        before = compiled()
        y = fused.base_model.model.layer(torch.randn(3, 24))
        y.backward(torch.randn_like(y))
        assert compiled() == before
        assert warm_up(left, 4) == []


def test_the_input_has_the_dtype_that_is_asked_for(compiled):
    layer = LoRALinear(8, 8, dtype=torch.float32, r=2)
    with use_backend("triton", simulate=True), torch.autocast("cpu", torch.bfloat16):
        warm_up(layer, 3, dtype=torch.float32)
        before = compiled()
        assert layer(torch.randn(3, 8)).dtype is torch.bfloat16
        assert compiled() == before


def test_the_model_and_the_random_numbers_are_left_as_they_were():
    block = Block()
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    twin, x = copy.deepcopy(block), torch.randn(5, 24, dtype=torch.bfloat16)
    with use_backend("triton", simulate=True):
        state = torch.get_rng_state()
        warm_up(block, [5])
        assert torch.get_rng_state().equal(state)
        assert all(p.equal(q) for p, q in zip(block.parameters(), twin.parameters(), strict=True))
        assert all(p.grad.equal(torch.ones_like(p)) if p.requires_grad else p.grad is None for p in block.parameters())
        y = block(x)
        torch.set_rng_state(state)
        assert twin(x).equal(y)  # DoRA's norm, which is kept, is the right one


def test_an_evaluation_runs_no_backward():
    layer = LoRALinear(8, 8, r=2)
    with use_backend("triton", simulate=True):
        for each in (layer.train(), layer.eval()):
            ran = [decision.op for decision in explain(warm_up, each, 3).decisions]
            assert ("lora_linear_backward" in ran) == each.training
        with torch.no_grad():
            assert "lora_linear_backward" not in [d.op for d in explain(warm_up, layer.train(), 3).decisions]


def test_a_frozen_adapter_hands_the_gradient_on():
    layer = LoRALinear(8, 8, r=2).requires_grad_(False)
    with use_backend("triton", simulate=True):
        assert "lora_linear_backward" in [d.op for d in explain(warm_up, layer, 3).decisions]


def test_on_the_cpu_there_is_nothing_to_do():
    assert warm_up(Block(), 3) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Identity(), torch.tensor([3, 4])), TypeError, "tokens must be integers, found tensor"),
        (("model", 3), TypeError, "model must be a torch.nn.Module, found str"),
        ((nn.Identity(), "3"), TypeError, "tokens must be integers, found '3'"),
        ((nn.Identity(), [True]), TypeError, "tokens must be integers, found True"),
        ((nn.Identity(), 2.5), TypeError, "tokens must be integers, found 2.5"),
        ((nn.Identity(), []), ValueError, r"one or more numbers from 1 on, found \[\]"),
        ((nn.Identity(), [4, 0]), ValueError, r"one or more numbers from 1 on, found \[4, 0\]"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"^warm_up: .*{message}"):
        warm_up(*arguments)


def test_bad_dtype():
    with pytest.raises(TypeError, match=r"^warm_up: dtype must be .*, found torch.int64"):
        warm_up(nn.Identity(), 3, dtype=torch.int64)


def test_what_a_model_calls_is_timed(monkeypatch):
    """Each way that its layers are called, forward and backward, those of the most rows first."""
    timed = []
    monkeypatch.setattr(tuning, "tune", lambda problems, device, seconds: timed.append((problems, device, seconds)))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with use_backend("triton", simulate=True), recorded():  # nothing need be compiled
            warm_up(Block(), [3, 70], tune=True, seconds=20)
    finally:
        torch.use_deterministic_algorithms(before)
    ((problems, device, seconds),) = timed
    assert device == torch.device("cpu") and seconds == 20
    assert [p.m for p in problems] == sorted((p.m for p in problems), reverse=True)
    kinds = {(p.direction, p.m, p.k, p.n, p.r, p.flags) for p in problems}
    dropped = ("gain", "drop_base", "dropout")
    for direction, m in itertools.product(("forward", "backward"), (3, 70)):
        assert (direction, m, 24, (16, 8), (4, 4), dropped) in kinds
        assert (direction, m, 8, (24,), (4,), ("dropout",)) in kinds and (direction, m, 24, (8,), (4,), dropped) in kinds
