"""On a machine without a GPU that is the reason, of every op: not a dtype, which nobody could cure
there."""

import pytest
import torch

from lora_kernels import (
    Member,
    QuantisedWeight,
    dora_linear,
    expert_lora_linear,
    expert_weight_norm,
    explain,
    lora_linear,
    lora_linear_group,
    merged_weight,
    multi_lora,
    multi_lora_add_,
)
from lora_kernels.ops import BatchPlan, missing_backends, registry, row_norm_squared, weight_norm
from tests.ops.multi import ids_of, make_slots

OPS = {op for op, backends in registry._implementations.items() if backends.keys() & set(registry.ON_GPU)}


def every_op(dtype):
    """Runs each op of the package on tensors of the CPU, forward and backward."""
    x, w, a, b, m = (torch.randn(s, dtype=dtype) for s in ((3, 24), (16, 24), (4, 24), (16, 4), (16,)))
    a, b = a.requires_grad_(), b.requires_grad_()
    lora_linear(x, w, a, b, 0.5).sum().backward()
    sum(y.sum() for y in lora_linear_group(x, [Member(w, a, b, 0.5), Member(w, a, b, 0.5)])).backward()
    weight_norm(w, a, b, 0.5).sum().backward()
    expert_lora_linear(x, torch.tensor([2, 3]), torch.stack([w, w]), a.expand(2, -1, -1), b.expand(2, -1, -1)).sum().backward()
    expert_weight_norm(torch.stack([w, w]), a.expand(2, -1, -1), b.expand(2, -1, -1)).sum().backward()
    with torch.no_grad():
        row_norm_squared(w)
        dora_linear(x, w, a, b, m, 0.5)
        merged_weight(w, a, b, 0.5)
        QuantisedWeight(torch.ones(16, 24, dtype=torch.int8), (16, 24), torch.ones(16), 24, dtype).dequantise()
        merged_weight(w, a, b, 0.5, out=w.clone())
    slots = make_slots(24, [16], [4], dtype)
    plan = BatchPlan.build(ids_of(torch.zeros(3, dtype=torch.int64), slots), 1)
    multi_lora(x, w, slots, plan)
    multi_lora_add_(x @ w.T, x, slots, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_missing_gpu_comes_first(dtype):
    told = explain(every_op, dtype)
    assert {d.op for d in told.decisions} == OPS
    here = set(registry.ON_GPU) - missing_backends().keys()
    for decision in told.decisions:
        for backend in here & registry._implementations[decision.op].keys():
            reason = decision.others[backend]
            assert reason.startswith("its kernels run on a GPU; ") and " on cpu; " in reason, (decision.op, backend, reason)
            assert ("torch finds no GPU here" in reason) != torch.cuda.is_available()


def test_a_forced_backend_says_so_too():
    there = pytest.raises(NotImplementedError, match="cannot run on cuda: its kernels run on a GPU; ")
    with registry.use_backend("cuda"), there:
        lora_linear(*(torch.ones(s) for s in ((3, 20), (12, 20), (4, 20), (12, 4))), 0.5)


def test_where_tensors_are_well_the_rest_is_told(monkeypatch):
    monkeypatch.setattr(registry, "_refuse_device", lambda t: None)
    x, w, a, b = (torch.ones(s) for s in ((3, 20), (12, 20), (4, 20), (12, 4)))
    assert "x is torch.float32" in str(explain(lora_linear, x, w, a, b, 0.5).decisions[0].others["cuda"])
