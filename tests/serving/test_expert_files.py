"""Files whose adapters change experts and other parameters."""

import copy

import peft
import pytest
import torch

from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter, save_adapter
from lora_kernels.serving import AdapterPool, serve
from tests.adapters.test_expert_adapters import tiny
from tests.adapters.test_per_expert_files import OLD, of_before
from tests.serving.experts import BOTH, KINDS, assert_rows, base, modules_of, pool_of, trained, unserved
from tests.serving.served import tokens


def parameters_of(model, folder, *names):
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=[], target_parameters=list(names)))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    tuned.save_pretrained(folder)
    return tuned.double()


def test_other_parameters(tmp_path):
    """The weight of a linear layer is served as that layer, a router is refused."""
    model = base("mixtral")
    exact = {"a": parameters_of(model, tmp_path / "a", "q_proj.weight", "experts.down_proj")}
    pool, x = pool_of(model), tokens(2)
    pool.load("a", tmp_path / "a")
    assert_rows(serve(model, pool)(x, adapters=["a", "a"]).logits, ["a", "a"], exact, x)
    parameters_of(unserved(model), tmp_path / "b", "gate.weight")
    with pytest.raises(AdapterError, match="it adapts model.layers.0.mlp.gate.weight, a parameter of MixtralTopKRouter; of"):
        pool.load("b", tmp_path / "b")


def test_a_file_for_another_model(tmp_path):
    trained(base("qwen3"), "experts").save_pretrained(tmp_path)
    pool = pool_of(base("mixtral"))
    with pytest.raises(AdapterError, match=r"tensors are missing|must have shape"):
        pool.load("a", tmp_path)


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("dora", [False, True])
def test_files_with_a_layer_for_each_expert(kind, dora, tmp_path):
    """Of before transformers 5; PEFT has no DoRA there, and our own layers do."""
    of_before(kind, tmp_path, use_dora=dora)
    model, x = tiny(kind), tokens(2) % 16
    exact = tiny(kind)
    if dora:
        load_adapter(exact, tmp_path)
    else:
        exact = peft.PeftModel.from_pretrained(exact, str(tmp_path))
    pool = AdapterPool(model, capacity_bytes=8 << 20, slots=2, max_rank=16, modules=modules_of(model))
    pool.load("a", tmp_path)
    y = serve(model, pool)(x, adapters=["a", None]).logits
    assert_rows(y, ["a", None], {"a": exact.eval(), None: tiny(kind)}, x)


def test_a_file_of_ours(tmp_path):
    """DoRA on experts, which is in no file of PEFT's."""
    model, ours = base("qwen3"), base("qwen3")
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj"], target_parameters=BOTH)
    inject_adapter(ours, config)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "lora_" in name:
                p.mul_(1 + 0.3 * torch.randn(p.shape)) if "magnitude" in name else p.normal_(std=0.3)
    save_adapter(ours, tmp_path)
    pool, x = pool_of(model), tokens(2)
    pool.load("a", tmp_path)
    y = serve(model, pool)(x, adapters=["a", None]).logits
    assert_rows(y, ["a", None], {"a": ours.double(), None: unserved(model).double()}, x)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_a_trainer(kind, tmp_path):
    model = base("qwen3")
    tuned, pool = trained(model, kind), pool_of(model)
    pool.load("a", (tuned.peft_config["default"], peft.get_peft_model_state_dict(tuned)))
    tuned.save_pretrained(tmp_path)
    pool.load("b", tmp_path)
    x = tokens(2)
    y = serve(model, pool)(x, adapters=["a", "b"]).logits
    assert_rows(y, ["a", "b"], dict.fromkeys("ab", tuned.double()), x)
