"""PEFT's `target_parameters` over the experts of transformers: outputs, gradients, steps and state
are PEFT's, and W + sBA is never formed."""

import copy
import importlib
import io
import pickle
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from experts_helpers import (
    CLASSES,
    EXPERTS,
    GATED,
    HIDDEN,
    INNER,
    NESTED,
    OUTER,
    Config,
    adapted,
    block,
    block_of,
    choices,
    exact,
    experts_class,
    fused_of,
    inputs,
    left_to_peft,
    right,
    routed,
)
from fuse_helpers import VOCABULARY, errs_as_stock, gradients, randomise, step, tokens
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lora_kernels import fuse, unfuse
from lora_kernels.integrations.peft import FusedParamWrapper
from lora_kernels.nn import experts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_the_experts_of_each_model(name, dtype):
    _, report = right(block(name, dtype=dtype), inputs(dtype))
    backend = "reference" if dtype is torch.float64 else "cpu"
    assert report.fused == {OUTER: backend, NESTED: backend}


@pytest.mark.slow
def test_the_experts_of_all_models():
    """Of every class that has transformers' interface its own loop gives what `forms` says."""
    found = 0
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)\(", file.read_text(), re.MULTILINE):
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            stock = block_of(getattr(module, name), Config(), dtype=torch.float64)
            if name == "OpenAIPrivacyFilterExperts":
                left_to_peft(stock, f"the eager forward of {name} is not known", inputs(torch.float64))
            else:
                right(stock, inputs(torch.float64))
            found += 1
    assert found > 60


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    for wide in (False, True):
        right(block(dtype=dtype, autocast_adapter_dtype=wide), inputs(dtype))


def test_biases_that_learn():
    stock = block("GptOssExperts", dtype=torch.float64)
    biases = [p.requires_grad_() for name, p in stock.named_parameters() if name.endswith("proj_bias")]
    fused, _ = right(stock, inputs(torch.float64))
    assert len(biases) == 2 == sum(p.grad is not None for n, p in fused.named_parameters() if n.endswith("proj_bias"))


def test_second_derivatives():
    stock, x = block(index=choices(5), dtype=torch.float64), inputs(torch.float64, 5).requires_grad_()
    fused, report = fused_of(stock)
    found = []
    for one in (fused, stock):
        (dx,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *(p for p in one.parameters() if p.requires_grad)]))
    torch.testing.assert_close(*found)
    assert not report.fallbacks()


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


def test_autocast_takes_the_experts_with_tokens_alone():
    """A copy of all of W would be more than the products of few tokens."""

    class Casts(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
            if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
                self.numbers += y.numel() * (source.dtype is torch.float32 and y.dtype is torch.bfloat16)
            return y

    for index in (torch.tensor([[0], [3], [3]]), torch.empty(0, 1, dtype=torch.int64)):
        stock = block(index=index)
        fused, x = fused_of(stock)[0], inputs(tokens=len(index))
        with torch.autocast("cpu", torch.bfloat16):
            layer, chosen = fused.base_model.model.experts, routed(fused, x)
            with torch.no_grad(), Casts() as casts:
                assert layer(x, *chosen).shape == x.shape
            if len(index):  # stock gives no gradients of no tokens
                found, theirs = gradients(fused, x), gradients(stock, x)
                errs_as_stock(found, theirs, exact(stock, x), 3)
        of_one = 3 * HIDDEN * INNER
        assert len(index.unique()) * of_one <= casts.numbers < (len(index.unique()) + 1) * of_one + 1


def test_grouped_products_are_in_the_dtype_of_the_weights():
    """As transformers has it, whatever autocast says."""
    fused, x = fused_of(block(implementation="grouped_mm"))[0], inputs()
    layer, chosen = fused.base_model.model.experts, routed(fused, x)
    wanted = layer(x, *chosen)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x, *chosen), wanted)
        layer.get_base_layer().config = Config("eager")
        assert not torch.equal(layer(x, *chosen), wanted)


def test_sums_in_slices(monkeypatch):
    monkeypatch.setattr(experts, "_ELEMENTS_AT_ONCE", 5 * HIDDEN)
    for name, dtype in (("MixtralExperts", torch.bfloat16), ("GptOssExperts", torch.float64)):
        right(block(name, dtype=dtype), inputs(dtype))


def test_one_expert():
    for name in ("MixtralExperts", "GptOssExperts"):
        stock = block_of(experts_class(name), Config(experts=1), torch.zeros(17, 1, dtype=torch.int64), torch.float64)
        if name == "MixtralExperts":
            right(stock, inputs(torch.float64))
        else:  # PEFT adds it as if W were [out, in], and raises
            reason = next(iter(fuse(stock).left.values()))
            assert "PEFT's layer is of 1 experts" in reason


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_steps_of_a_model(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCABULARY}
    made = getattr(transformers, f"{kind}Config")(**sizes, experts_implementation="eager", pad_token_id=0)
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForCausalLM")(made).double()
    # in float64, or another rounding might choose another expert
    stock = adapted(base, target_modules=["q_proj", "v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    stock.train()
    fused, report = fused_of(stock)
    torch.testing.assert_close(step(fused, tokens()), step(stock, tokens()))
    for one in (stock, fused):
        one.gradient_checkpointing_enable({"use_reentrant": False})
        one.enable_input_require_grads()
    torch.testing.assert_close(step(fused, tokens()), step(stock, tokens()))
    assert len(report.fused) == 8 and not report.left and not report.fallbacks()


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
        self.experts = Llama4TextExperts(Config())

    def forward(self, x):
        return self.experts(x.repeat(EXPERTS, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_llama_4(dtype):
    torch.manual_seed(0)
    one = Sorted()
    for p in one.parameters():
        nn.init.normal_(p, std=0.3)
    right(adapted(one.to(dtype)), inputs(dtype))
