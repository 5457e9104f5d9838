"""Where a group pays, fuse forms one: on a GPU, and not on the CPU."""

import pytest
import torch
from group_helpers import block, inputs, learn, ops, pair, qkv, results

from lora_kernels import explain, fuse, use_backend
from lora_kernels.integrations.peft import groups


def test_the_cpu_forms_no_group_and_soon_looks_for_none():
    _, one = pair()
    report = fuse(one)
    for grad in (True, False) * 32:
        with torch.set_grad_enabled(grad):
            assert ops(one, inputs()) == ["lora_linear_forward"] * 4
    assert report.groups() == report.alone() == {} and not block(one)._forward_hooks
    assert [name for name, m in one.named_modules() if groups.KEY in vars(m)] == []


@pytest.fixture
def models(monkeypatch):
    alone, one = pair(torch.bfloat16, adapter_dtype=False)
    with monkeypatch.context() as patch:
        patch.setattr(groups, "group_pays", lambda x: True)
        learn(one, torch.bfloat16)
    return alone, one


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.slow)])
def test_a_gpus_call_is_the_groups(backend, models):
    """Simulated: the op that is called is the one that a GPU gets."""
    alone, one = models
    x, found = inputs(torch.bfloat16, rows=2), []
    expected = [y.detach() for y in alone(x, qkv)]
    with torch.no_grad(), use_backend(backend, simulate=True):
        decisions = explain(lambda: found.extend(one(x, qkv))).decisions
        assert [(d.op, d.chosen) for d in decisions] == [("lora_linear_group_forward", f"{backend} (simulated)")]
    torch.testing.assert_close(found, expected)


def test_a_gpu_trains_in_groups(models):
    alone, one = models
    x, found = inputs(torch.bfloat16), {}
    expected = results(alone, x, qkv)
    with use_backend("triton", simulate=True):
        decisions = explain(lambda: found.update(results(one, x, qkv))).decisions
    ways = ["forward", "backward"]
    assert [(d.op, d.chosen) for d in decisions] == [(f"lora_linear_group_{w}", "triton (simulated)") for w in ways]
    for name, value in expected.items():
        if value is not None:
            assert (found[name].float() - value.float()).norm() <= 0.01 * value.float().norm(), name
