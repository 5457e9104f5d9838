"""fuse over the quantised layers of torchao and HQQ on Triton's kernels, interpreted."""

import copy

import pytest
import torch

from lora_kernels import explain, fuse
from lora_kernels.integrations.peft import linear
from lora_kernels.ops import missing_backends
from tests.integrations.formats_helpers import BF16, KINDS, exact, inputs, layer, model
from tests.integrations.fuse_helpers import errs_as_stock, fused_copy, gradients

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from tests.ops.interpreted import interpreted


@pytest.mark.parametrize(("kind", "dora"), [
    ("hqq", True), ("hqq", False),
    *(pytest.param(kind, dora, marks=pytest.mark.slow) for kind in KINDS if kind != "hqq" for dora in (True, False)),
])  # fmt: skip
def test_a_step(kind, dora):
    """Outputs and all gradients err as stock PEFT's do, both directions read the codes."""
    stock, x = model(kind, BF16, use_dora=dora), inputs(BF16)
    fused, true = fused_copy(stock), gradients(exact(stock, use_dora=dora), x.double())
    theirs, found = gradients(copy.deepcopy(stock), x), {}
    with interpreted():
        decisions = explain(lambda: found.update(gradients(fused, x))).decisions
    errs_as_stock(found, theirs, true, 2)
    assert linear.fallbacks(layer(fused)) == {} and {d.chosen for d in decisions} == {"triton (simulated)"}
    assert [d.plan.winner for d in decisions if d.op.startswith("lora_linear")] == ["codes"] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_report(as_gpu, kind):
    fused = model(kind, BF16)
    report = fuse(fused)
    assert report.fused == dict.fromkeys(["base_model.model.a", "base_model.model.b"], "triton (simulated)") and not report.left
    with torch.no_grad():
        fused(inputs(BF16))
    assert report.fallbacks() == {}
