"""lora_linear and its rivals, on one base weight that all of them share:

    linear      nn.Linear alone, without an adapter: what a merged model costs
    ours        PEFT's layer after `fuse`
    peft        PEFT's layer
    torch       the best plain PyTorch: base, then the adapter added in place (addmm); for DoRA the
                factored norm, and with dropout a second product with W
    compile     that formula through torch.compile
    reference   our reference backend

rho is the adapter's share of the base's FLOPs: r(K + N) / KN, and for DoRA with its norm recomputed
r/M more.
"""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.paired import interleaved_medians, measurement_row
from lora_kernels import use_backend
from lora_kernels.integrations.peft import FusedLinear

SHAPES = [(1024, 1024), (4096, 4096), (4096, 11008)]
RANKS = [8, 16, 64]
FORWARD, BACKWARD = [1, 4, 16, 64, 512], [64, 512]
DTYPES = [torch.float32, torch.bfloat16]


def make_peft_layer(n_in, n_out, r, dtype, use_dora=False, base=None, dropout=0.0):
    """PEFT's LoRA layer in training, over nn.Linear (`base` if given), in `dtype`, B random."""
    holder = nn.Sequential(base or nn.Linear(n_in, n_out, bias=False)).to(dtype)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], use_dora=use_dora, lora_dropout=dropout)
    made = peft.get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model[0]
    nn.init.normal_(made.lora_B["default"].weight, std=0.02)
    return made


def lora_in_torch(x, w, a, b, scale, magnitude=None, dropout=0.0):
    """LoRA, or with a magnitude DoRA, in PyTorch without forming BA; W's own norm is summed each
    time. DoRA's dropout drops the input of the rescaled base, too, as PEFT's does."""
    dropped = F.dropout(x, dropout) if dropout else x
    h = F.linear(dropped, a) * scale
    y = F.linear(x if magnitude is None else dropped, w)
    if magnitude is None and not torch.is_grad_enabled():
        return y.addmm_(h, b.T)
    y = torch.addmm(y, h, b.T)
    if magnitude is None:
        return y
    with torch.no_grad():
        squared = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32) ** 2
        norm = factored_norm(w, a, b, scale, squared)
    y = y * (magnitude / norm.to(x.dtype))
    return y + F.linear(x - dropped, w) if dropout else y


def factored_norm(w, a, b, scale, squared):
    """‖W + scale·BA‖ of each row in PyTorch, without forming BA; `squared` is ‖W‖² of each row."""
    wide_b = b.float()
    cross = ((w @ a.T).float() * wide_b).sum(1)
    update = ((wide_b @ (a @ a.T).float()) * wide_b).sum(1)
    return (squared + 2 * scale * cross + scale**2 * update).sqrt()


def contenders(n_in, n_out, tokens, r, dtype, backward, use_dora, more=False, dropout=0.0):
    """The calls to time, by name; `more` adds compile and reference."""
    stock = make_peft_layer(n_in, n_out, r, dtype, use_dora, None, dropout)
    ours = make_peft_layer(n_in, n_out, r, dtype, use_dora, stock.base_layer, dropout)
    ours.__class__ = FusedLinear
    x = torch.randn(tokens, n_in, dtype=dtype, requires_grad=backward)
    dy = torch.randn(tokens, n_out, dtype=dtype)
    a, b = ours.lora_A["default"].weight, ours.lora_B["default"].weight
    magnitude = ours.lora_magnitude_vector["default"].weight if use_dora else None
    trained = [p for m in (stock, ours) for p in m.parameters()]

    def run_step(call):
        if not backward:
            with torch.no_grad():
                return call(x)
        call(x).backward(dy)
        x.grad = None
        for p in trained:
            p.grad = None

    def timed_call(call):
        return lambda: run_step(call)

    def torch_call(function):
        return timed_call(lambda x: function(x, stock.base_layer.weight, a, b, 2.0, magnitude, dropout))

    def on_reference():
        with use_backend("reference"):
            run_step(ours)

    calls = {
        "linear": timed_call(stock.base_layer),
        "ours": timed_call(ours),
        "peft": timed_call(stock),
        "torch": torch_call(lora_in_torch),
    }
    if more:
        torch._dynamo.reset()
        calls |= {"compile": torch_call(torch.compile(lora_in_torch, dynamic=False)), "reference": on_reference}
    return calls


def measure(n_in, n_out, tokens, r, dtype, backward, use_dora, more=False):
    """One row."""
    seconds = interleaved_medians(contenders(n_in, n_out, tokens, r, dtype, backward, use_dora, more))
    rho = r * (n_in + n_out) / (n_in * n_out)
    recomputed = use_dora and backward
    return measurement_row(
        "lora_linear", "dora" if use_dora else "lora", dtype, {"M": tokens, "K": n_in, "N": n_out, "r": r}, seconds,
        what="forward + backward" if backward else "forward", rho=rho * 1.5 + r / (2 * tokens) if recomputed else rho,
    )  # fmt: skip


def measurements(quick=False, dtypes=DTYPES, slow_backward=False):
    """Every measurement. `slow_backward` leaves out what takes minutes where torch has no fast bf16
    product."""
    for dtype in dtypes:
        for n_in, n_out in SHAPES[:2] if quick or slow_backward else SHAPES:
            for r in [16] if quick or slow_backward else RANKS:
                for use_dora in [False, True] if r == 16 else [False]:
                    for backward in (False, True):
                        for tokens in BACKWARD if backward else FORWARD:
                            if slow_backward and tokens * n_in * n_out > 2**30 and (backward or tokens > 64):
                                continue
                            more = r == 16 and n_out <= 4096 and not quick and not slow_backward
                            more = more and torch.get_num_threads() > 1
                            yield measure(n_in, n_out, tokens, r, dtype, backward, use_dora, more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("tokens", [1, 16, 512])
@pytest.mark.parametrize("name", ["linear", "ours", "peft", "torch"])
def test_lora_linear(benchmark, name, tokens, use_dora, backward, dtype):
    """`make bench-pytest`. pytest-benchmark does not interleave: for ratios use `python -m
    bench`."""
    benchmark.group = f"{tokens} tokens, {'dora' if use_dora else 'lora'}, backward {backward}, {dtype}"
    benchmark(contenders(1024, 1024, tokens, 16, dtype, backward, use_dora)[name])
