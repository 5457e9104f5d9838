"""Models whose experts are codes: adapters put in, saved, loaded, merged and taken out."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_kernels import LoraConfig, adapter_disabled, inject_adapter, load_adapter, merge_and_unload, save_adapter, unload
from lora_kernels.adapters.config import AdapterError
from lora_kernels.nn import LoRAExperts
from tests.adapters.test_files import Snapshot
from tests.integrations.experts_helpers import HIDDEN, Block, choices, inputs
from tests.nn.coded_experts import class_of, dense, dense_of, module_of, trained

pytest.importorskip("bitsandbytes.nn.parametrize")
GATED = ["experts.gate_up_proj", "experts.down_proj"]
codes = pytest.mark.parametrize("codes", ["nf4", "nested", "fp8"])


class Net(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.block, self.head = Block(experts, choices()), nn.Linear(HIDDEN, 5)

    def forward(self, x):
        return self.head(x + self.block(x))


def net(codes, numbers=False, **options):
    experts = module_of(codes, **options)
    experts = dense_of(codes, experts) if numbers else experts
    torch.manual_seed(1)
    return Net(experts)


def config(**values):
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["head"], "target_parameters": GATED} | values)


def adapted(model, **values):
    torch.manual_seed(2)
    inject_adapter(model, config(**values))
    for layer in (model.block.experts, model.head):
        trained(layer)
    return model


def output(model):
    with torch.no_grad():
        return model(inputs())


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@codes
def test_in_and_out(codes, use_dora, tmp_path):
    """The files know of no codes: they are read over numbers, and over codes again."""
    model, numbers = net(codes), net(codes, numbers=True)
    before, module = {name: t.clone() for name, t in model.state_dict().items()}, model.block.experts
    base = output(numbers)
    adapted(model, use_dora=use_dora, alpha_pattern={"down_proj": 9})
    assert type(model.block.experts) is LoRAExperts and model.block.experts.adapted == ("gate_up_proj", "down_proj")
    trainable = {name.rpartition(".")[2].split("_p")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("lora_") for name in trainable)
    y = output(model)
    save_adapter(model, tmp_path)
    load_adapter(numbers, tmp_path)
    torch.testing.assert_close(output(numbers), y, rtol=1e-4, atol=1e-4)
    again = net(codes)
    assert load_adapter(again, tmp_path) == ["head", "block.experts"]
    assert torch.equal(output(again), y)
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), y)
    if not use_dora:
        theirs = peft.PeftModel.from_pretrained(net(codes, numbers=True), str(tmp_path)).eval()
        torch.testing.assert_close(output(theirs), y, rtol=1e-4, atol=1e-4)
    with adapter_disabled(model):
        torch.testing.assert_close(output(model), base, rtol=1e-4, atol=1e-4)
    unload(model)
    found, after = model.block.experts, model.state_dict()
    assert type(found).__name__ == type(module).__name__
    assert after.keys() == before.keys() and all(torch.equal(after[name], t) for name, t in before.items())
    assert [*found._forward_pre_hooks.values()] == [*module._forward_pre_hooks.values()]
    assert [p.dtype for p in found.parameters()] == [p.dtype for p in net(codes).block.experts.parameters()]
    assert all(torch.equal(dense(found, name), dense(net(codes).block.experts, name)) for name in ("gate_up_proj", "down_proj"))
    adapted(model, use_dora=use_dora, alpha_pattern={"down_proj": 9})
    assert torch.equal(output(model), y)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("codes", ["nf4", "nested"])
def test_files_of_peft(codes, order, tmp_path):
    """Over numbers; and as PEFT lays its layers around one another over codes, the other way."""
    targets = [f"block.{name}" for name in GATED][::order]
    theirs = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["head"], target_parameters=targets)
    over = net(codes, numbers=order == 1)
    theirs = peft.get_peft_model(over, theirs).eval()
    trained(theirs)
    theirs.save_pretrained(tmp_path)
    outer = theirs.base_model.model.block.experts
    assert outer.parameter_name == ("down_proj" if order == 1 else "gate_up_proj")
    model = net(codes)
    load_adapter(model, tmp_path)
    layer, wrappers = model.block.experts, {m.parameter_name: m for m in (outer, outer.base_layer)}
    for name, wrapper in wrappers.items():
        for kind in ("lora_A", "lora_B"):
            mine = layer.peft_tensor(kind, name)
            assert torch.equal(mine, getattr(wrapper, kind)["default"].weight.view(mine.shape)), (name, kind)
    if order == 1:
        torch.testing.assert_close(output(model), output(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("codes", ["nf4", "nested"])
def test_merged_to_a_plain_model(codes, use_dora):
    for dtype in (None, torch.float64):
        model = adapted(net(codes), use_dora=use_dora, target_modules=[])
        y = output(model)
        assert merge_and_unload(model, dtype=dtype) is model
        experts = model.block.experts
        assert type(experts).__name__ == class_of(codes) and experts.down_proj.dtype is (dtype or torch.float32)
        assert {*experts.state_dict()} == {*dense_of(codes, module_of(codes)).state_dict()}
        assert not experts._forward_hooks and not experts._forward_pre_hooks and not experts._state_dict_hooks
        if dtype is None:
            torch.testing.assert_close(output(model), y, rtol=1e-4, atol=1e-4)
        copy.deepcopy(model)
    held = adapted(net(codes), use_dora=use_dora, target_modules=[])
    held.block.experts.merge(dtype=torch.bfloat16)
    with pytest.raises(AdapterError, match="block.experts is merged to torch.bfloat16 already"):
        merge_and_unload(held, dtype=torch.float32)


@codes
def test_merged_to_codes(codes):
    model = adapted(net(codes), target_modules=[])
    unchanged, y = Snapshot(model), output(model)
    if codes == "fp8":
        with pytest.raises(NotImplementedError, match="FP8Experts have no floating form"):
            merge_and_unload(model)
        unchanged.check(model)
        assert torch.equal(output(model), y)
    again = copy.deepcopy(model)
    again.block.experts.merge(requantise=True)
    with pytest.warns(UserWarning, match="1 merged weights were quantised again, with relative errors of 0"):
        merge_and_unload(model, requantise=True)
    experts = model.block.experts
    assert type(experts).__name__ == type(module_of(codes)).__name__
    assert {*model.state_dict()} == {*net(codes).state_dict()}
    numbers = Net(dense_of(codes, experts))
    numbers.load_state_dict({n: t for n, t in model.state_dict().items() if "experts" not in n}, strict=False)
    torch.testing.assert_close(output(numbers), output(again), rtol=1e-4, atol=1e-4)
    inject_adapter(model, config())


@codes
def test_what_is_refused_changes_nothing(codes):
    model = net(codes)
    unchanged = Snapshot(model)
    for values, says in (
        ({"init_lora_weights": "pissa"}, "is for matrices; of experts it must be True"),
        ({"target_parameters": ["experts.up"]}, "'experts.up' matches no parameter"),
    ):
        with pytest.raises(AdapterError, match=says):
            inject_adapter(model, config(**values))
        unchanged.check(model)


@codes
def test_a_training_run(codes):
    """Some steps over codes are those over their numbers."""
    losses = []
    for numbers in (False, True):
        model = net(codes, numbers)
        torch.manual_seed(2)
        inject_adapter(model, config(use_dora=True))
        for layer in (model.block.experts, model.head):
            trained(layer)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(inputs()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-4, atol=1e-5)


def test_order_of_quantisation_does_not_matter():
    """A parametrization takes a parameter from its place."""
    library = pytest.importorskip("bitsandbytes.nn.parametrize")
    for order in (["down_proj", "gate_up_proj"], ["gate_up_proj"], ["down_proj"]):
        model = net("nf4", numbers=True)
        for name in order:
            library.replace_parameter_4bit(model.block.experts, name)
        adapted(model)
        assert model.block.experts.adapted == ("gate_up_proj", "down_proj")
