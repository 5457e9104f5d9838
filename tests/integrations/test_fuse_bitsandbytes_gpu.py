"""fuse over bitsandbytes' layers on Triton's kernels, simulated, and what is left to PEFT there."""

import copy

import pytest
import torch

from lora_kernels import explain, fuse, use_backend, warm_up
from lora_kernels.integrations.peft import linear
from lora_kernels.integrations.peft import quantised as over_quantised
from lora_kernels.nn import LoRALinear
from lora_kernels.ops import missing_backends
from tests.integrations.fuse_helpers import errs_as_stock, fused_copy, gradients

pytest.importorskip("bitsandbytes")
from tests.integrations.bitsandbytes_helpers import exact, inputs, model, quantised_linear

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops import triton_quantised
from tests.ops.interpreted import interpreted

BF16 = torch.bfloat16
A, B = "base_model.model.a", "base_model.model.b"


@pytest.mark.parametrize(("kind", "lora"), [
    ("nf4", {"use_dora": True}),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in (("int8", {}), ("fp4", {}), ("int8", {"use_dora": True}))),
])  # fmt: skip
def test_a_step(kind, lora):
    """Outputs and all gradients err as the CPU's do; both directions read the codes."""
    stock, x = model(kind, BF16, **lora), inputs(BF16)
    fused, true = fused_copy(stock), gradients(exact(stock), x.double())
    theirs, found = gradients(fused, x), {}
    with use_backend("triton", simulate=True):
        decisions = explain(lambda: found.update(gradients(fused, x))).decisions
    errs_as_stock(found, theirs, true, 2)
    assert {d.chosen for d in decisions} == {"triton (simulated)"} and linear.fallbacks(fused.get_submodule(A)) == {}
    assert [d.plan.winner for d in decisions if d.op.startswith("lora_linear")] == ["codes"] * 4


def test_the_report(as_gpu):
    fused = model("nf4", BF16)
    report = fuse(fused)
    assert report.fused == dict.fromkeys([A, B], "triton (simulated)") and not report.left and not report.slow
    with torch.no_grad():
        fused(inputs(BF16))
    assert report.fallbacks() == {}


def test_what_no_kernel_reads(as_gpu, monkeypatch):
    monkeypatch.setattr(triton_quantised.Quantised, "refusal", lambda w: "w has zeros")
    left_with("triton: w has zeros")


def test_a_device_that_is_not_ready(as_gpu, monkeypatch):
    monkeypatch.setattr(over_quantised, "device_refusal", lambda t: "its kernels need compute capability 8.0")
    left_with("its kernels need compute capability 8.0")


def left_with(reason):
    """Each layer is PEFT's, in the report and in a call, which counts the reason."""
    stock = model("nf4", BF16)
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    assert report.left == dict.fromkeys([A, B], reason) and not report.fused
    with torch.no_grad():
        assert torch.equal(fused(inputs(BF16)), stock(inputs(BF16)))
    assert report.fallbacks() == dict.fromkeys([A, B], {reason: 1})


def test_warm_up():
    """In the dtype in which the codes are multiplied, all that a step then runs."""
    fused = fused_copy(model("nf4", BF16))
    native = LoRALinear.from_linear(quantised_linear("nf4", 64, 32, compute=BF16).to("cpu"), r=4)
    for layers, wanted in ((fused, [A, B]), (native, [""])):
        with interpreted() as names:
            assert warm_up(layers, 3) == wanted
        assert {"quantised_forward_kernel", "quantised_input_gradient_kernel"} <= set(names)
