"""A copy of a fused model runs its own layers."""

import copy
import io
import pickle

import peft
import pytest
import torch
from torch import nn

from lora_kernels import fuse
from lora_kernels.integrations.peft import FusedLinear

X = torch.linspace(-1, 1, 36).reshape(3, 12)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_fused_model_runs_its_own_layers(way, dora):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], use_dora=dora, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)), config).eval()
    fuse(model)
    y = model(X)
    other = COPIES[way](model)
    assert sum(type(m) is FusedLinear for m in other.modules()) == 2
    assert torch.equal(other(X), y)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(X).any()
    assert torch.equal(model(X), y)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2.0)
    assert not torch.equal(model(X), y)
    assert not other(X).any()
