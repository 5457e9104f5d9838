"""Tensor parallelism, by torch's parallelize_module and transformers' tp_plan: outputs and all
gradients of the model on one device, by one call of the kernels on each rank's shards."""

import os
import sys

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

from lora_kernels import fuse
from tests.integrations.fuse_helpers import LLAMA_LAYERS, llama, model, randomise, step, tokens

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="torch has no gloo")
HOOKED = "a hook waits for the call of base_layer, lora_A, lora_B or lora_dropout"
PLAN = {
    "a.base_layer": ColwiseParallel,
    "a.lora_B.default": ColwiseParallel,
    "b.base_layer": RowwiseParallel,
    "b.lora_A.default": RowwiseParallel,
}


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 42), nn.Linear(42, 16)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def net(train_bias=False):
    made = model(net=Biased)
    made.base_model.model.b.base_layer.bias.requires_grad_(train_bias)
    return made


def parallel(one, plan=PLAN):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(one.base_model.model, mesh, {name: style() for name, style in plan.items()})
    return one


def results(one):
    """The output and every gradient, whole, of inputs that all ranks share."""
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y = one(x)
    y.square().mean().backward()
    grads = {n: p.grad for n, p in one.named_parameters() if p.grad is not None} | {"x": x.grad}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()} | {"y": y.detach()}


def check_styles():
    for train_bias in (False, True):
        whole, stock = results(net(train_bias)), results(parallel(net(train_bias)))
        fused = parallel(net(train_bias))
        report = fuse(fused, strict=True)
        assert set(report.fused.values()) == {"cpu"} and len(report.fused) == 2
        found = results(fused)
        torch.testing.assert_close(stock, whole)
        torch.testing.assert_close(found, whole)
        with torch.no_grad():
            torch.testing.assert_close(fused(torch.ones(24)), net(train_bias)(torch.ones(24)))
        assert not report.fallbacks()


def test_one_process(alone):
    check_styles()


def test_second_derivatives(alone):
    found = []
    for one in (net(), parallel(net())):
        if found:
            report = fuse(one)
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3)).requires_grad_()
        (g,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
        g.square().mean().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])
    assert not report.fallbacks()


def test_dora_is_pefts_which_raises(alone):
    """Its norm adds a DTensor to a plain one."""
    for fused in (False, True):
        one = parallel(model(net=Biased, use_dora=True))
        if fused:
            report = fuse(one)
            assert list(report.left.values()) == ["DoraLinearVariant in tensor parallelism"] * 2
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            one(torch.ones(3, 24))
    assert report.fallbacks()["base_model.model.a"] == {"DoraLinearVariant in tensor parallelism": 1}


def only_base(one):
    return parallel(one, {"a.base_layer": ColwiseParallel})


def other_layouts(one):
    mesh = init_device_mesh("cpu", (1,))
    for name in ("base_layer", "lora_B.default"):
        style = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(one.base_model.model.a.get_submodule(name), mesh, style)
    return one


def with_a_users_hook(one):
    parallel(one)
    one.base_model.model.a.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    return one


def replaced_weight(one):
    parallel(one)
    layer = one.base_model.model.a.lora_B["default"]
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach().full_tensor(), layer.weight.device_mesh, [Replicate()]))
    return one


LEFT = {
    only_base: "base_layer is ColwiseParallel, and lora_B is not in the same way",
    other_layouts: HOOKED,
    with_a_users_hook: HOOKED,
    replaced_weight: "the weights of base_layer, lora_A and lora_B are placed in another way than by ColwiseParallel",
}


@pytest.mark.parametrize("change", LEFT)
def test_what_is_left_to_peft(alone, change):
    stock, fused = change(net()), change(net())
    report = fuse(fused)
    assert report.left["base_model.model.a"] == LEFT[change]
    torch.testing.assert_close(results(fused)["y"], results(stock)["y"])
    assert report.fallbacks()["base_model.model.a"] == {LEFT[change]: 1}


def check_transformers(path):
    """PEFT's own row-parallel layer cannot train with these versions, so all is held against one
    device."""
    distributed = pytest.importorskip("transformers.distributed")
    config = peft.LoraConfig(r=4, target_modules=LLAMA_LAYERS)
    torch.manual_seed(0)
    base = llama(attention_bias=True)
    if dist.get_rank() == 0:
        base.save_pretrained(path)
    dist.barrier()
    whole = peft.get_peft_model(base, config)
    randomise(whole)
    world = distributed.DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    one = peft.get_peft_model(LlamaForCausalLM.from_pretrained(path, distributed_config=world), config)
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, p in one.named_parameters():
            if p.requires_grad:
                source = weights[name].detach()
                p.copy_(distribute_tensor(source, p.device_mesh, p.placements) if hasattr(p, "placements") else source)
        expected = one(**tokens(), use_cache=False).logits
    report = fuse(one, strict=True)
    assert set(report.fused.values()) == {"cpu"} and len(report.fused) == 14
    with torch.no_grad():
        torch.testing.assert_close(one(**tokens(), use_cache=False).logits, expected)
    found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in step(one, tokens()).items()}
    torch.testing.assert_close(found, step(whole, tokens()), rtol=1e-4, atol=1e-6)
    assert not report.fallbacks()


def _run(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2)
    check_styles()
    check_transformers(folder / "model")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_run, args=(tmp_path,), nprocs=2)
