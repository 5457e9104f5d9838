"""A pool of adapters of every kind and a batch that mixes them with the base, against float64."""

from contextlib import nullcontext

import torch
from torch import nn

from bench.gpu.cases import problem_sizes
from bench.gpu.setting import Setting
from lora_kernels import multi_lora, multi_lora_add_, use_backend
from lora_kernels.ops.multi_lora.plan import adapter_in_slot
from lora_kernels.serving import Adapter, AdapterPool, Factors
from lora_kernels.testing import assert_within_rounding

RANKS = [1, 8, 16, 40, 64, 17]


def check_multi_lora(setting: Setting, rows: int, dtype: torch.dtype, several: bool, by_cuda: bool = False) -> None:
    """Each row has its adapter or none, or `several` with weights; every second adapter is DoRA's,
    every third has a bias."""
    _, n_in, n_out, _ = problem_sizes(setting)
    if by_cuda:  # its rows begin at multiples of 16 bytes
        n_in, n_out = n_in + -n_in % 8, n_out + -n_out % 8
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n_in, n_out)).to(setting.device, dtype).requires_grad_(False)
    pool = AdapterPool(model, capacity_bytes=1 << 26, slots=len(RANKS), max_rank=64)
    factors = {}
    for i, r in enumerate(RANKS):
        a, b = (t.to(dtype).float() for t in (torch.randn(r, n_in) * n_in**-0.5, torch.randn(n_out, r) * r**-0.5))
        magnitude = torch.rand(n_out) + 0.5 if i % 2 else None
        factors[str(i)] = Factors(a, b, 0.5 + i / 4, magnitude, torch.randn(n_out) if i % 3 == 0 else None)
        pool.load(str(i), Adapter({"0": factors[str(i)]}))
    names: list[list[str]] = [[str(j % len(RANKS)) for j in range(i, i + i % (3 if several else 2))] for i in range(rows)]
    weights = [[0.5 + j for j in range(len(row))] for row in names] if several else None
    w, bias = model[0].weight, model[0].bias
    x = torch.randn(rows, n_in, device=setting.device).to(dtype)
    slots = pool.sites["0"].slots
    with pool.batch(names, weights) as batch:
        plan = batch.plan(rows)
        with use_backend("cuda", simulate=setting.dry) if by_cuda else nullcontext():
            y, again = multi_lora(x, w, slots, plan, bias), multi_lora(x, w, slots, plan, bias)
        added = None if by_cuda else multi_lora_add_(torch.nn.functional.linear(x, w, bias), x, slots, plan, bias)
    assert torch.equal(y, again), "other bits the second time"
    gains = {name: adapter_in_slot(slots, pool.id_of(name) & 0xFFFFFFFF, torch.float32).gain for name in factors}
    wanted = _exact_outputs(x, w, bias, names, weights, factors, gains)
    assert_within_rounding(y.cpu(), wanted, dtype if dtype.itemsize == 2 else torch.bfloat16, 1.05, name="y")
    assert added is None or (added.cpu().double() - wanted).norm() <= 2e-2 * wanted.norm(), "on a product that was there"


def _exact_outputs(x, w, bias, names, weights, factors, gains):
    x, w, bias = (t.detach().cpu().double() for t in (x, w, bias))
    z = x @ w.T
    y = z + bias
    for t, row in enumerate(names):
        for j, name in enumerate(row):
            f = factors[name]
            delta = f.scale * f.b.double() @ (f.a.double() @ x[t])
            if f.magnitude is not None:
                # as the pool computed it: its own error is tested elsewhere
                gain = gains[name].cpu().double()
                delta = gain * delta + (gain - 1) * z[t]
            if f.bias is not None:
                delta = delta + f.scale * f.bias.double()
            y[t] += (weights[t][j] if weights else 1.0) * delta
    return y
