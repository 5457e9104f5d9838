"""Copies of a served model run their own layers, or it is said that they cannot be made."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lora_kernels.adapters import LoraConfig, inject_adapter, save_adapter
from lora_kernels.serving import AdapterPool, serve, unserve


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.q = nn.Embedding(13, 8), nn.Linear(8, 16)

    def forward(self, input_ids):
        return self.q(self.table(input_ids))


def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def served(tmp_path):
    trained = net()
    inject_adapter(trained, LoraConfig(r=4, target_modules=["q"], init_lora_weights=False))
    save_adapter(trained, tmp_path)
    model = net()
    pool = AdapterPool(model, capacity_bytes=1 << 20, slots=4)
    pool.load("a", tmp_path)
    return serve(model, pool), pool


IDS = torch.arange(13)[None]
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_served_model_runs_its_own_layers_or_is_refused(way, served):
    model, _ = served
    y, base = model(IDS, adapters=["a"]), model(IDS)
    try:
        other = COPIES[way](model)
    except TypeError as error:
        assert "unserve" in str(error)
    else:
        with pytest.raises(RuntimeError, match="this is a copy of a served model"):
            other(IDS, adapters=["a"])
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not other(IDS).any()
        assert not unserve(other)(IDS).any()
    assert torch.equal(model(IDS, adapters=["a"]), y)
    assert torch.equal(model(IDS), base)
    plain = COPIES[way](unserve(model))
    assert torch.equal(plain(IDS), base)


@pytest.mark.parametrize("way", COPIES)
def test_a_pool_is_not_copied(way, served):
    model, pool = served
    y = model(IDS, adapters=["a"])
    with pytest.raises(TypeError, match="AdapterPool: a pool cannot be copied or pickled"):
        COPIES[way](pool)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(pool._base)
    assert torch.equal(model(IDS, adapters=["a"]), y)
