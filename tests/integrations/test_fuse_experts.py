"""PEFT's `target_parameters` over the experts of transformers: outputs, gradients, steps and state
are PEFT's, W + sBA is never formed, and what stays PEFT's is named."""

import copy
import io
import pickle

import peft
import pytest
import torch
from experts_helpers import (
    CLASSES,
    EXPERTS,
    GATED,
    HIDDEN,
    INNER,
    PREFIX,
    adapted,
    block,
    choices,
    config,
    exact,
    experts_class,
    fused_of,
    inputs,
    right,
)
from fuse_helpers import errs_as_stock, gradients, randomise
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.integrations import moe
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lora_kernels import fuse, unfuse
from lora_kernels.integrations.peft import FusedParamWrapper

OUTER, NESTED = f"{PREFIX}experts", f"{PREFIX}experts.base_layer"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_the_experts_of_each_model(name, dtype):
    _, report = right(block(name, dtype=dtype), inputs(dtype))
    backend = "reference" if dtype is torch.float64 else "cpu"
    assert report.fused == {OUTER: backend, NESTED: backend}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_implementation(dtype, name, implementation):
    right(block(name, implementation, dtype=dtype), inputs(dtype))


@pytest.mark.parametrize("target", GATED)
def test_one_parameter_of_two(target):
    for name in ("Qwen3MoeExperts", "GptOssExperts"):
        _, report = right(block(name, target_parameters=[target], dtype=torch.float64), inputs(torch.float64))
        assert report.fused == {OUTER: "reference"}


def test_the_order_of_nesting_does_not_matter():
    right(block(target_parameters=GATED[::-1], dtype=torch.float64), inputs(torch.float64))


def test_16_bit_adapters():
    right(block(dtype=torch.bfloat16, autocast_adapter_dtype=False), inputs(torch.bfloat16))


def several(dtype):
    stock = block(dtype=dtype, use_rslora=True)
    stock.add_adapter("other", peft.LoraConfig(r=5, lora_alpha=2, target_modules=[], target_parameters=GATED))
    randomise(stock)
    for name, p in stock.named_parameters():
        p.requires_grad_("lora_" in name)
    return stock


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("active", [["default", "other"], ["other"], ["default"]], ids=str)
def test_several_adapters(active, dtype):
    stock = several(dtype)
    stock.base_model.set_adapter(active)
    right(stock, inputs(dtype))


def test_a_later_choice_of_the_adapter_is_seen():
    stock = several(torch.float64)
    fused, report = fused_of(stock)
    x = inputs(torch.float64)
    for active in (["other"], ["default"], ["other", "default"]):
        for one in (stock, fused):
            one.base_model.set_adapter(active)
        torch.testing.assert_close(fused(x), stock(x))
    assert not report.fallbacks()


def test_tokens_of_one_expert_and_no_tokens():
    for index in (torch.full((17, 1), 4), choices(1)):
        right(block(index=index, dtype=torch.float64), inputs(torch.float64, len(index)))
    stock = block(index=choices(1)[:0])
    fused, report = fused_of(stock)
    torch.testing.assert_close(fused(inputs(tokens=0)), stock(inputs(tokens=0)))
    assert not gradients(fused, inputs(tokens=0))["x"].numel() and not report.fallbacks()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
def test_sentinels_of_expert_parallelism(name, implementation):
    index = choices()
    index[::2, 1], index[3], index[4, 0] = EXPERTS, EXPERTS, EXPERTS
    stock = block(name, implementation, index)
    stock.base_model.model.experts.get_base_layer()._is_expert_parallel = True
    fused, _ = fused_of(stock)
    found, theirs = gradients(fused, inputs()), gradients(stock, inputs())
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    assert not found["y"][3].any()


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, implementation):
    """The dtypes are PEFT's, and so are the errors."""
    stock, x = block(implementation=implementation, dtype=dtype), inputs()
    fused, report = fused_of(stock)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = gradients(fused, x), gradients(stock, x)
    errs_as_stock(found, theirs, exact(stock, x), 3)
    assert not report.fallbacks()


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that an op gave."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        for t in given if isinstance(given, tuple | list) else (given,):
            if isinstance(t, torch.Tensor) and t._base is None:
                self.elements = max(self.elements, t.numel())
        return given


def test_no_weight_of_all_experts_is_formed():
    stock, x = block(index=choices(2)), inputs(tokens=2)
    fused, _ = fused_of(stock)
    largest = {}
    for one in (stock, fused):
        with LargestTensor() as watched:
            gradients(one, x)
        largest[one] = watched.elements
    assert largest[stock] == EXPERTS * 2 * INNER * HIDDEN
    assert largest[fused] <= 3 * EXPERTS * max(HIDDEN, 2 * INNER)  # A and B, whose gradients it gives


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    fused, _ = fused_of(block(dtype=torch.float64))
    x = inputs(torch.float64)
    wanted = gradients(fused, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = fused

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    found = gradients(Checkpointed(), x)
    assert {n.removeprefix("inner."): t for n, t in found.items()}.keys() == wanted.keys()
    for name, t in found.items():
        assert torch.equal(t, wanted[name.removeprefix("inner.")])


def test_a_compiled_block_is_one_graph_with_the_bits_of_eager():
    torch._dynamo.reset()
    fused, _ = fused_of(block())
    wanted = gradients(fused, inputs())
    found = gradients(torch.compile(fused, fullgraph=True, backend="aot_eager"), inputs())
    assert all(torch.equal(found[n if n in ("x", "y") else f"_orig_mod.{n}"], t) for n, t in wanted.items())
    torch._dynamo.reset()


def test_steps_saving_merging_and_copies():
    stock = block()
    fused, report = fused_of(stock)
    x = inputs()
    for one in (stock, fused):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 1e-4)
        for _ in range(3):
            one(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(fused.state_dict(), stock.state_dict())
    torch.testing.assert_close(peft.get_peft_model_state_dict(fused), peft.get_peft_model_state_dict(stock))
    wanted = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(fused.base_model.model.experts))(x, *routed(fused, x)), wanted)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other = block()
    other.load_state_dict(torch.load(file))
    fuse(other)
    assert torch.equal(other(x), wanted) and not report.fallbacks()
    with fused.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(fused(x), stock(x))
    for one in (stock, fused):
        one.merge_adapter()
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-4)
    assert set(report.fallbacks()[OUTER]) == {"the adapters are disabled", "an adapter is merged into the base weight"}
    for one in (stock, fused):
        one.unmerge_adapter()
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-4)
    merged = fused.merge_and_unload()
    assert type(merged.experts) is experts_class("MixtralExperts")
    torch.testing.assert_close(merged(x), wanted, rtol=1e-4, atol=1e-4)


def routed(one, x):
    inner = one.base_model.model
    return inner.index, torch.softmax(inner.router(x), -1).gather(1, inner.index)


def test_the_class_keeps_its_name_and_goes_back():
    fused, _ = fused_of(block())
    layer = fused.base_model.model.experts
    assert type(layer) is type(layer.base_layer) is FusedParamWrapper and type(layer).__name__ == "ParamWrapper"
    # PEFT looks for it when another adapter comes
    fused.add_adapter("other", peft.LoraConfig(r=2, target_modules=[], target_parameters=GATED))
    assert sum(isinstance(module, ParamWrapper) for module in fused.modules()) == 2
    unfuse(fused)
    assert type(layer) is type(layer.base_layer) is ParamWrapper


# Llama 4 gives each expert every token


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Llama4TextExperts(config())

    def forward(self, x):
        return self.experts(x.repeat(EXPERTS, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_llama_4(dtype):
    torch.manual_seed(0)
    one = Sorted()
    for p in one.parameters():
        nn.init.normal_(p, std=0.3)
    right(adapted(one.to(dtype)), inputs(dtype))


# one matrix


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(HIDDEN, 10)), nn.Parameter(torch.randn(10))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("made", [lambda: nn.Linear(HIDDEN, 10), lambda: nn.Linear(HIDDEN, 10, bias=False), Product])
def test_one_matrix(made, dtype):
    torch.manual_seed(0)
    stock = adapted(nn.ModuleDict({"layer": made()}).to(dtype), target_parameters=["layer.weight"])
    layer = stock.base_model.model.layer
    fused, report = right(layer, inputs(dtype))
    assert report.fused == {"": "reference" if dtype is torch.float64 else "cpu"}
    right(layer, inputs(dtype).view(1, 17, HIDDEN))


# what is PEFT's


def left_to_peft(stock, reason, x=None, times=1):
    """The fused copy gives PEFT's numbers, and counts the reason."""
    x = inputs() if x is None else x
    fused, report = fused_of(stock)
    torch.testing.assert_close(gradients(fused, x), gradients(stock, x))
    assert report.fallbacks()[OUTER] == {reason: times}, report.fallbacks()
    return report


def test_hooks_are_pefts():
    stock = block()
    seen = []
    stock.base_model.model.experts.get_base_layer().register_forward_hook(lambda *_: seen.append(1))
    assert left_to_peft(stock, "a hook waits for the call of base_layer").left.keys() == {OUTER, NESTED}
    assert len(seen) == 2
    stock = block()
    stock.base_model.model.experts.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert left_to_peft(stock, "a hook waits for the call of base_layer").left.keys() == {OUTER}


def test_weights_that_learn_are_pefts():
    stock = block()
    stock.base_model.model.experts.get_base_layer().down_proj.requires_grad_()
    left_to_peft(stock, "the base weight requires grad (down_proj)")


def test_other_implementations_are_pefts(monkeypatch):
    def mine(self, x, index, weights):
        return 2 * moe.grouped_mm_experts_forward(self, x, index, weights)

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "mine", mine)
    left_to_peft(block(implementation="mine"), "the experts' implementation is mine")
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "grouped_mm", mine)
    left_to_peft(block(implementation="grouped_mm"), "the experts' implementation is grouped_mm")


def test_unknown_classes_are_pefts(monkeypatch):
    mixtral = experts_class("MixtralExperts")

    class Doubled(mixtral):
        def forward(self, *args):
            return 2 * super().forward(*args)

    class Eager(mixtral):
        """Whose forward transformers chooses; its own may not be what the attributes say."""

    for cls, implementation, reason in (
        (Doubled, "eager", "the forward of Doubled is not known"),
        (Eager, "eager", "the eager forward of Eager is not known"),
    ):
        stock = block(implementation=implementation)
        stock.base_model.model.experts.get_base_layer().__class__ = cls
        left_to_peft(stock, reason)


def test_parametrised_weights_are_pefts():
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    stock = block()
    nn.utils.parametrize.register_parametrization(stock.base_model.model.experts.get_base_layer(), "down_proj", Half())
    left_to_peft(stock, "another parametrization is on the module")


def test_other_parameters_are_pefts():
    stock = block("GptOssExperts", target_parameters=["experts.down_proj_bias", *GATED])
    left_to_peft(stock, "the adapted parameter is down_proj_bias")


def test_other_arguments_are_pefts():
    stock = block()
    fused, report = fused_of(stock)
    x = inputs()
    index, weights = routed(fused, x)
    for one in (fused, stock):
        one.found = one.base_model.model.experts(x, top_k_index=index, top_k_weights=weights)
    torch.testing.assert_close(fused.found, stock.found)
    assert report.fallbacks()[OUTER] == {"the call has arguments besides the input": 1}
