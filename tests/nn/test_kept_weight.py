"""Quantised weights that are kept for a layer of bitsandbytes."""

import pytest
import torch

from lora_kernels import lora_linear
from lora_kernels.nn.kept_weight import KeptWeight

bitsandbytes = pytest.importorskip("bitsandbytes")


def layers():
    int8 = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    nf4 = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4")
    for layer in (int8, nf4):
        layer.load_state_dict({"weight": torch.randn(32, 64)})
        layer.to("cpu")(torch.randn(2, 64))  # which quantises it
        yield layer


def test_a_weight_of_inference_mode_is_trained_over():
    for layer in layers():
        kept, x, a = KeptWeight(), torch.randn(3, 64), torch.randn(4, 64, requires_grad=True)
        with torch.inference_mode():
            w = kept(layer, torch.float32)
        assert kept(layer, torch.float32) is w
        lora_linear(x, w, a, torch.randn(32, 4)).sum().backward()
        assert a.grad.any()
