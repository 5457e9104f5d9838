"""bitsandbytes' layers for tests; importing this skips where the library is not there."""

import pytest
import torch

from lora_kernels.nn.quantised import quantised_weight

bnb = pytest.importorskip("bitsandbytes")

CODES = ["nf4", "nested", "fp4", "int8"]


def module(codes, n_in=64, n_out=48, bias=True, compute=None, dtype=torch.float32, seed=0, weight=None):
    """A layer whose weight, drawn in `dtype` if not given, the library has quantised."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.nn.Linear(n_in, n_out, bias)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * n_in**-0.5)
    if codes == "int8":
        layer = bnb.nn.Linear8bitLt(n_in, n_out, bias, has_fp16_weights=False)
    else:
        kind = "nf4" if codes == "nested" else codes
        layer = bnb.nn.Linear4bit(
            n_in, n_out, bias, compute_dtype=compute, quant_type=kind, compress_statistics=codes == "nested"
        )
    layer.load_state_dict(plain.state_dict())
    layer.weight.data = layer.weight.data.to(dtype) if weight is None else weight.clone()
    return layer.to("cpu")


def dense(layer, dtype=torch.float32):
    """W of such a module, for inputs of a dtype."""
    found = quantised_weight(layer, dtype)
    assert not isinstance(found, str), found
    return found.dequantise()
