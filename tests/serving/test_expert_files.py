"""Files whose adapters change experts and other parameters."""

import copy

import peft
import pytest
import torch

from lora_kernels.adapters import AdapterError
from lora_kernels.serving import serve
from tests.serving.experts import KINDS, assert_rows, base, pool_of, trained, unserved
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
