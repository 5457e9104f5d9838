"""FSDP's flat parameters, ZeRO-3 and fully_shard around fused and native layers: PEFT's losses on
the kernels, and a report that asks with the weights that the calls will find."""

import copy
import functools
import os
import sys

import peft
import pytest
import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_kernels import LoraConfig, fuse, inject_adapter
from tests.integrations import experts_helpers
from tests.integrations.fuse_helpers import LLAMA_LAYERS, gradients, llama, losses, randomise, tokens

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="torch has no gloo")
CPU = torch.device("cpu")


def model(use_dora):
    torch.manual_seed(0)
    made = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=LLAMA_LAYERS, use_dora=use_dora))
    randomise(made)
    return made


def native(use_dora):
    torch.manual_seed(0)
    made = llama()
    inject_adapter(made, LoraConfig(r=4, target_modules=LLAMA_LAYERS, use_dora=use_dora))
    randomise(made)
    return made


def lora_layers(one):
    return [module for module in one.modules() if isinstance(module, peft.tuners.lora.layer.Linear)]


def flat(one, policy=None, **values):
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(one, auto_wrap_policy=policy or blocks, device_id=CPU, **values)


def by_blocks(one):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in one.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(one, mesh=mesh)


def by_inner_modules(one):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in lora_layers(one):
        for group in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            for module in group.values():
                fully_shard(module, mesh=mesh)
    return by_blocks(one)


WRAPPERS = {
    "blocks": lambda one: flat(one, use_orig_params=True),
    "peft's policy": lambda one: flat(one, fsdp_auto_wrap_policy(one), use_orig_params=False),
    "peft's policy, original parameters": lambda one: flat(one, fsdp_auto_wrap_policy(one), use_orig_params=True),
    "fully_shard": by_blocks,
    "fully_shard of inner modules": by_inner_modules,
}


def train(wrapper, use_dora, first):
    """Fails unless a fused model in a wrapper has the losses of stock PEFT alone, each call on the
    kernels."""
    stock, one = losses(model(use_dora)), model(use_dora)
    if first == "fuse":
        report = fuse(one, strict=True)
        one = WRAPPERS[wrapper](one)
    else:
        one = WRAPPERS[wrapper](one)
        report = fuse(one, strict=True)
    assert len(report.fused) == 14 and set(report.fused.values()) == {"cpu"}
    found = losses(one)
    assert not report.fallbacks()
    assert found == pytest.approx(stock, rel=1e-5) and stock[-1] < stock[0]


@pytest.mark.parametrize("first, use_dora", [("fuse", False), ("wrap", True)], ids=["lora", "dora"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_process(alone, wrapper, first, use_dora):
    train(wrapper, use_dora, first)


def shard_experts(first):
    """Fails unless fused experts in a sharded block have the numbers of stock PEFT alone. All
    processes have the same tokens, so that the mean of their gradients is each one's."""
    stock = experts_helpers.block()
    for name, p in stock.named_parameters():
        p.requires_grad_("lora_" in name)
    one = copy.deepcopy(stock)
    report = fuse(one, strict=True) if first == "fuse" else None
    fully_shard(one.base_model.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    report = report or fuse(one, strict=True)
    found = gradients(one, experts_helpers.inputs())
    for name, t in gradients(stock, experts_helpers.inputs()).items():
        torch.testing.assert_close(getattr(found[name], "full_tensor", lambda name=name: found[name])(), t)
    assert len(report.fused) == 2 and not report.fallbacks()


@pytest.mark.parametrize("first", ["fuse", "wrap"])
def test_experts_by_blocks(alone, first):
    shard_experts(first)


def _run(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for wrapper in WRAPPERS:
        for use_dora in (False, True):
            for first in ("fuse", "wrap"):
                train(wrapper, use_dora, first)
    for use_dora in (False, True):
        train_native(use_dora)
    for first in ("fuse", "wrap"):
        shard_experts(first)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_run, args=(tmp_path / "two",), nprocs=2)


def train_native(use_dora):
    alone, one = losses(native(use_dora)), native(use_dora)
    assert losses(flat(one, use_orig_params=True)) == pytest.approx(alone, rel=1e-5)
    one = flat(native(use_dora), use_orig_params=True)
    assert set(fuse(one, strict=True).fused.values()) == {"cpu"}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_native_layers_take_a_frozen_view_as_a_constant(alone, use_dora):
    train_native(use_dora)


def test_an_output_changed_in_place_keeps_its_hooks(alone):
    """fully_shard hangs the gathering for backward on the output; a change of a view loses it."""
    mesh, x, found = init_device_mesh("cpu", (1,)), torch.randn(2, 5, 32), []
    for sharded in (False, True):
        layer = lora_layers(model(False))[0]
        if sharded:
            report = fuse(layer, strict=True)
            for group in (layer.lora_A, layer.lora_B):
                fully_shard(group["default"], mesh=mesh)
        y = layer(x)
        y += 1
        y.square().mean().backward()
        grads = [p.grad for p in layer.parameters() if p.requires_grad]
        found.append([g.full_tensor() if sharded else g for g in grads])
    torch.testing.assert_close(found[1], found[0])
    assert not report.fallbacks()


def test_gradients_in_a_flat_parameter_are_pefts(alone):
    found = []
    for fused in (False, True):
        one = flat(model(True), use_orig_params=True)
        if fused:
            fuse(one)
        one(**tokens(), use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and all("lora_" in name for name in found[0])
    torch.testing.assert_close(found[1], found[0])


def gradients_of_step(one):
    """Of the adapters, whole."""
    one(**tokens(), use_cache=False).loss.backward()
    grads = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    one.zero_grad()
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in grads.items()}


@pytest.mark.parametrize("wrapper", ["fully_shard", "fully_shard of inner modules"])
def test_gradients_of_fully_shard_are_pefts(alone, wrapper):
    """Of a model that was sharded and called before `fuse`."""
    wanted, one = gradients_of_step(model(True)), WRAPPERS[wrapper](model(True))
    if wrapper == "fully_shard":
        torch.testing.assert_close(gradients_of_step(one), wanted)
    report = fuse(one, strict=True)
    assert len(report.fused) == 14 and set(report.fused.values()) == {"cpu"}
    torch.testing.assert_close(gradients_of_step(one), wanted)
    assert not report.fallbacks()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_kept_gains_see_each_step(alone, wrapper):
    """Other weights may come to the addresses of those before."""
    stock, one = model(True), WRAPPERS[wrapper](model(True))
    report = fuse(one, strict=True)
    ones = [(m, torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.5)) for m in (stock, one)]
    logits = []
    for _ in range(3):
        with torch.no_grad():
            wanted = stock(**tokens(), use_cache=False).logits
            for _ in range(2):
                torch.testing.assert_close(one(**tokens(), use_cache=False).logits, wanted)
        logits.append(wanted)
        for each, optimizer in ones:
            each(**tokens(), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.allclose(logits[0], logits[2], atol=0.01) and not report.fallbacks()


@pytest.mark.parametrize("wrapper", ["blocks", "fully_shard"])
def test_compiled_blocks(alone, wrapper):
    """A compiler cannot ask which views of a flat parameter are frozen: there PEFT's forward is
    what it compiles."""
    stock, one = losses(model(False)), model(False)
    torch._dynamo.reset()
    for block in one.base_model.model.model.layers:
        block.compile(backend="eager")
    one = WRAPPERS[wrapper](one)
    fuse(one, strict=True)
    assert losses(one) == pytest.approx(stock, rel=1e-5)
    torch._dynamo.reset()


def test_a_trained_weight_in_a_flat_parameter_is_pefts_and_refused_by_native_layers(alone):
    one = model(False)
    one.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight.requires_grad_()
    one = flat(one, use_orig_params=True)
    report = fuse(one)
    assert list(report.left.values()) == ["the base weight requires grad"]
    assert losses(one)[0] == pytest.approx(losses(model(False))[0])
    assert list(report.fallbacks().values()) == [{"the base weight requires grad": 3}]

    one = native(False)
    one.model.layers[0].mlp.down_proj.weight.requires_grad_()
    with pytest.raises(ValueError, match="w is frozen"):
        losses(flat(one, use_orig_params=True))


def test_mixed_precision_is_asked_for_as_the_call_will_find_it(alone):
    one = flat(model(False), use_orig_params=True, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))
    report = fuse(one, strict=True)
    assert losses(one)[0] == pytest.approx(losses(model(False))[0], rel=1e-2)
    assert not report.fallbacks()

    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    found = []
    for fused in (False, True):
        one, mesh = model(False), init_device_mesh("cpu", (1,))
        for block in one.base_model.model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=low)
        if fused:
            report = fuse(one, strict=True)
        found.append(losses(one))
    assert set(report.fused.values()) == {"cpu"} and not report.fallbacks()
    assert found[1] == pytest.approx(found[0], rel=1e-2)

    one = model(False)
    layer = lora_layers(one)[0]
    fully_shard(layer.lora_A["default"], mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    report = fuse(one)
    with pytest.raises(RuntimeError):  # PEFT's: of two dtypes
        losses(one)
    (reasons,) = report.fallbacks().values()
    assert reasons == {"the mixed precision of FSDP casts inputs or outputs of base_layer, lora_A or lora_B": 1}


class Partitions:
    """What ZeRO-3 does to a module's call, under its names: weights come, and go when it ends; they
    come again before the output's gradient, and go after the input's."""

    def __init__(self, module):
        self.held = {p: p.data for p in module._parameters.values() if p is not None}
        for p, data in self.held.items():
            p.ds_shape = data.shape
        self.scatter()

    def gather(self):
        for p, data in self.held.items():
            p.data = data

    def scatter(self):
        for p in self.held:
            self.held[p], p.data = p.data, torch.empty(0)

    def register(self, module):
        class Before(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y):
                return y.view_as(y)

            @staticmethod
            def backward(ctx, dy):
                self.gather()
                return dy

        class After(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.view_as(x)

            @staticmethod
            def backward(ctx, dx):
                self.scatter()
                return dx

        def pre_forward(module, args):
            self.gather()
            return After.apply(*args)

        def post_forward(module, args, output):
            self.scatter()
            return Before.apply(output)

        for hook, add in ((pre_forward, module.register_forward_pre_hook), (post_forward, module.register_forward_hook)):
            hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
            hook.__qualname__ = f"DeepSpeedZeRoOffload._register_deepspeed_module.<locals>.{hook.__name__}"
            add(hook)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_partitioned_weights_come_and_go_as_in_zero_3(use_dora):
    torch.manual_seed(0)
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
        one = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0", "2"], use_dora=use_dora))
        randomise(one)
        nets.append(one)
    stock, fused = nets
    for layer in lora_layers(fused):
        inner = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        for module in (layer.base_layer, *(m for each in inner for m in each.values())):
            Partitions(module).register(module)
    report = fuse(fused, strict=True)
    assert set(report.fused.values()) == {"cpu"}
    x, found = torch.randn(5, 16), []
    for one in nets:
        rows = x.clone().requires_grad_()
        y = one(rows)
        wanted = [rows, *(p for p in one.parameters() if p.requires_grad)]
        if one is fused:
            assert all(p.numel() == 0 for p in one.parameters())
        y.square().sum().backward()
        found.append([y, *(p.grad for p in wanted)])
    torch.testing.assert_close(found[1], found[0])
    assert not report.fallbacks() and all(p.numel() == 0 for p in fused.parameters())


def _zero_3(rank, file):
    import deepspeed

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    deepspeed.init_distributed("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    for use_dora in (False, True):
        stock, one = losses(model(use_dora)), model(use_dora)
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], 1e-2)
        engine = deepspeed.initialize(model=one, optimizer=optimizer, config=config, dist_init_required=False)[0]
        report, found = fuse(one, strict=True), []
        for _ in range(3):
            loss = engine(**tokens(), use_cache=False).loss
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        assert not report.fallbacks() and found == pytest.approx(stock, rel=1e-5)
        engine.destroy()
    dist.destroy_process_group()


@pytest.mark.slow
def test_zero_3_of_deepspeed(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29571")):
        monkeypatch.setenv(name, value)
    torch.multiprocessing.spawn(_zero_3, args=(tmp_path / "two",), nprocs=2)
