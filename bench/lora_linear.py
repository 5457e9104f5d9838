"""lora_linear and its rivals: nn.Linear without an adapter, PEFT's layer, and the best plain torch.

rho is the adapter's share of the base's FLOPs, r(K + N) / KN.
"""

import peft
import torch
from torch import nn

from bench.paired import paired
from lora_kernels.integrations.peft import FusedLinear

SHAPES = [(1024, 1024), (4096, 4096)]
TOKENS = [1, 4, 16, 32, 64, 512]


def layer(n_in, n_out, r, dtype, use_dora=False):
    """PEFT's LoRA layer over nn.Linear, in `dtype`, with random B."""
    holder = nn.Sequential(nn.Linear(n_in, n_out, bias=False)).to(dtype)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], use_dora=use_dora)
    made = peft.get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model[0]
    nn.init.normal_(made.lora_B["default"].weight, std=0.02)
    return made


def measure(n_in, n_out, tokens, r, dtype, backward, use_dora=False):
    """Median seconds of each contender, and rho."""
    stock = layer(n_in, n_out, r, dtype, use_dora)
    ours = layer(n_in, n_out, r, dtype, use_dora)
    ours.__class__ = FusedLinear
    linear = stock.base_layer
    x = torch.randn(tokens, n_in, dtype=dtype, requires_grad=backward)
    dy = torch.randn(tokens, n_out, dtype=dtype)

    def run(module):
        if not backward:
            with torch.no_grad():
                return module(x)
        module(x).backward(dy)
        x.grad = None
        for p in module.parameters():
            p.grad = None

    contenders = {"linear": lambda: run(linear), "ours": lambda: run(ours), "peft": lambda: run(stock)}
    return paired(contenders), r * (n_in + n_out) / (n_in * n_out)


def rows(quick=False):
    """Every measurement, as plain values."""
    for dtype in (torch.float32, torch.bfloat16):
        for n_in, n_out in SHAPES:
            for use_dora in (False, True):
                for backward in (False, True):
                    for tokens in (1, 16, 512) if quick else TOKENS:
                        times, rho = measure(n_in, n_out, tokens, 16, dtype, backward, use_dora)
                        yield {
                            "op": "lora_linear",
                            "dtype": str(dtype).removeprefix("torch."),
                            "kind": "dora" if use_dora else "lora",
                            "pass": "forward + backward" if backward else "forward",
                            "K": n_in,
                            "N": n_out,
                            "M": tokens,
                            "r": 16,
                            "rho": rho,
                            "seconds": times,
                            "ours / linear": times["ours"] / times["linear"],
                            "peft / linear": times["peft"] / times["linear"],
                        }
