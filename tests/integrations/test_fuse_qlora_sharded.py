"""Codes that FSDP shards: the parameters that it makes have lost what bitsandbytes keeps beside
them, and the modules still have it."""

import copy
import io
import sys

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lora_kernels import fuse
from lora_kernels.integrations.peft import linear
from tests.integrations.fuse_helpers import fused_copy, gradients

pytest.importorskip("bitsandbytes")
from tests.integrations.bitsandbytes_helpers import KINDS, inputs, model

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="torch has no gloo")
F32, BF16 = torch.float32, torch.bfloat16


def layers(one):
    return [
        module
        for module in one.modules()
        if type(module).__name__ in ("FusedLinear4bit", "Linear4bit") and hasattr(module, "lora_A")
    ]


def whole(one):
    fully_shard(one, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return one


def by_bases(one):
    for layer in layers(one):
        fully_shard(layer.base_layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return whole(one)


def flat(original):
    def wrap(one):
        return FullyShardedDataParallel(
            one, auto_wrap_policy=fsdp_auto_wrap_policy(one), device_id=torch.device("cpu"), use_orig_params=original
        )

    return wrap


# FSDP's flat parameters are of one dtype
WRAPPERS = {
    "fully_shard": (whole, torch.uint8),
    "fully_shard of bases": (by_bases, torch.uint8),
    "fully_shard, stored in bf16": (by_bases, BF16),
    "flat": (flat(False), F32),
    "flat, original parameters": (flat(True), F32),
}


def check(wrapper, use_dora, first):
    """The bits of the fused model that is not sharded, each call on the kernels."""
    wrap, storage = WRAPPERS[wrapper]
    one = model("nf4", F32, storage=storage, use_dora=use_dora)
    wanted = gradients(fused_copy(one), inputs())
    if first == "fuse":
        report = fuse(one, strict=True)
        one = wrap(one)
    else:
        one = wrap(one)
        report = fuse(one, strict=True)
    assert len(report.fused) == 2
    for _ in range(2):
        found = gradients(one, inputs())
        found = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in found.items()}
        names = found.keys() if wrap in (whole, by_bases) else ("y", "x")
        assert {*names} <= {*wanted}
        for name in names:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    assert report.fallbacks() == {}


@pytest.mark.parametrize("first, use_dora", [("fuse", False), ("wrap", True)], ids=["lora", "dora"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_process(alone, wrapper, first, use_dora):
    check(wrapper, use_dora, first)


def _run(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for wrapper in WRAPPERS:
        for first, use_dora in (("fuse", False), ("wrap", True)):
            check(wrapper, use_dora, first)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_run, args=(tmp_path / "two",), nprocs=2)


def test_scales_that_are_lost(alone):
    """An 8-bit parameter keeps its scales itself, and nothing of the module has them."""
    one = model("int8")
    fully_shard(one, mesh=init_device_mesh("cpu", (1,)))
    report = fuse(one)
    assert all("made anew without them" in reason for reason in report.left.values()) and len(report.left) == 2
    with pytest.raises((AttributeError, RuntimeError, TypeError)):  # the library's own
        one(inputs())
    assert all("made anew without them" in reason for reasons in report.fallbacks().values() for reason in reasons)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind):
    """Each computes with its own codes and scales."""
    fused, x = fused_copy(model(kind, use_dora=True)), inputs()
    with torch.no_grad():
        y = fused(x)
        memory = io.BytesIO()
        torch.save(fused, memory)
        memory.seek(0)
        for other in (copy.deepcopy(fused), torch.load(memory, weights_only=False)):
            assert torch.equal(other(x), y) and fuse(other).fallbacks() == {}
            base = other.get_submodule("base_model.model.a").base_layer
            base.weight.data.zero_()
            if base.weight.__dict__.get("CB") is not None:
                base.weight.CB = base.weight.data
            assert not torch.equal(other(x), y) and torch.equal(fused(x), y)


def test_offloaded_by_accelerate():
    """The codes come for the call alone; those of 4 bits leave their scales on meta, for good."""
    fused, x = fused_copy(model("int8")), inputs()
    with torch.no_grad():
        y = fused(x)
        cpu_offload(fused, execution_device=torch.device("cpu"))
        for _ in range(2):
            assert torch.equal(fused(x), y)
    assert fuse(fused).fallbacks() == {}


def test_a_state_on_another_device():
    """On meta, where nothing is computed; brought back it is the same again."""
    fused, x = fused_copy(model("nf4")), inputs()
    y, base = fused(x), fused.get_submodule("base_model.model.a").base_layer
    state = base.weight.quant_state
    base.weight.quant_state = copy.deepcopy(state)
    base.weight.quant_state.absmax = state.absmax.to("meta")
    reason = fuse(fused).left["base_model.model.a"]
    assert "must be on cpu (codes), found meta" in reason
    base.weight.quant_state.absmax = state.absmax.clone()
    assert torch.equal(fused(x), y) and linear.fallbacks(fused.get_submodule("base_model.model.a")) == {}
