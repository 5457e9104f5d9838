"""Fused models in FSDP (fully_shard) and DDP: PEFT's losses, every layer on the kernels. A DTensor
is left to PEFT."""

import sys

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import fuse, unfuse
from tests.integrations.fuse_helpers import LLAMA_LAYERS, llama, losses, randomise

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="torch has no gloo")


def model(use_dora):
    torch.manual_seed(0)
    made = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=LLAMA_LAYERS, use_dora=use_dora))
    randomise(made)
    return made


def sharded(one):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in one.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(one, mesh=mesh)


WRAPPERS = {"fsdp": sharded, "ddp": DistributedDataParallel}


def train(wrapper, use_dora):
    """Fails unless the fused model in a wrapper has the losses of stock PEFT alone, without a call
    that fell back."""
    stock, fused = losses(model(use_dora)), model(use_dora)
    report = fuse(fused, strict=True)
    found = losses(WRAPPERS[wrapper](fused))
    assert not report.fallbacks()
    assert found == pytest.approx(stock, rel=1e-5) and stock[-1] < stock[0]
    unfuse(fused)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_process(alone, wrapper, use_dora):
    train(wrapper, use_dora)


def _run(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for wrapper in WRAPPERS:
        for use_dora in (False, True):
            train(wrapper, use_dora)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_run, args=(tmp_path / "two",), nprocs=2)


def test_a_dtensor_is_left_to_peft(alone):
    one = model(False)
    report = fuse(one)
    layer = one.base_model.model.model.layers[0].mlp.down_proj
    mesh = init_device_mesh("cpu", (1,))
    for each in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        each.weight = torch.nn.Parameter(distribute_tensor(each.weight.detach(), mesh, [Replicate()]), requires_grad=False)
    x = distribute_tensor(torch.randn(3, layer.in_features), mesh, [Replicate()])
    assert type(layer(x)).__name__ == "DTensor"
    (reasons,) = report.fallbacks().values()
    assert list(reasons) == ["the weights of base_layer, lora_A and lora_B are DTensor, DTensor and DTensor"]
