"""On a GPU from sm_80 with a 16-bit base, no op of a layer is left to the reference, whatever
adapters, flags and sizes, with Triton and without it. Nothing is computed: the backends are
asked."""

from itertools import product

import pytest
import torch

from lora_kernels.ops import BatchPlan, Slots, cuda_alone, registry
from lora_kernels.ptxsim import device

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TRITON = ("there", "absent")
K, N, R = 72, 136, 5
# gain, dropout, whether the base is dropped, too
FLAGS = [
    (gain, dropout, drop_base)
    for gain, dropout in product((False, True), (0.0, 0.05))
    for drop_base in ((False, True) if gain and dropout else (False,))
]  # fmt: skip


@pytest.fixture(params=product(ARCHITECTURES, TRITON), ids=lambda param: f"sm_{param[0]}, Triton {param[1]}")
def accepts(request, monkeypatch):
    """Asks which backends but the reference take an op's arguments on this GPU."""
    arch, triton = request.param
    token = registry._simulated.set(True)
    monkeypatch.setattr(cuda_alone, "missing_backends", lambda: {"triton": "not installed"} if triton == "absent" else {})

    def ask(op, *args):
        reasons = {name: reason for name, reason in registry.refusals(op, args).items() if name in registry.ON_GPU}
        if triton != "there" or "triton" in registry.missing_backends():
            reasons.pop("triton", None)
        assert any(reason is None for reason in reasons.values()), f"{op}: {reasons}"

    with device(arch=arch):
        yield ask
    registry._simulated.reset(token)


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype)


def members(count, m, dtype, adapters, gain, dropout, bias):
    """w, a, b, scale, bias, gain, dropout, seed of each layer, and y or dy."""
    for i in range(count):
        n = N + 8 * i
        yield (
            empty(n, K, dtype=dtype), empty(R + i, K, dtype=adapters), empty(n, R + i, dtype=adapters), 0.5,
            empty(n, dtype=dtype) if bias else None, empty(n, dtype=F32) if gain else None, dropout,
            torch.tensor(1) if dropout else None, empty(m, n, dtype=dtype),
        )  # fmt: skip


def kinds():
    for dtype, own in product((BF16, F16), (True, False)):
        yield dtype, dtype if own else F32


def test_layers(accepts):
    for (dtype, adapters), (gain, dropout, drop_base), bias, m in product(kinds(), FLAGS, (False, True), (1, 16, 64, 300)):
        x, h = empty(m, K, dtype=dtype), empty(m, R, dtype=F32)
        ((*layer, y),) = members(1, m, dtype, adapters, gain, dropout, bias)
        accepts("lora_linear_forward", x, *layer, drop_base, True, gain)
        z = y if gain and (bias or drop_base) else None
        accepts("lora_linear_backward", y, x, *layer, drop_base, h, y, z, [1, 1, 1, int(bias), int(gain)])


def test_groups(accepts):
    for (dtype, adapters), (gain, dropout, drop_base), m, count in product(kinds(), FLAGS, (1, 300), (2, 5)):
        x = empty(m, K, dtype=dtype)
        *lists, ys = map(list, zip(*members(count, m, dtype, adapters, gain, dropout, True), strict=True))
        accepts("lora_linear_group_forward", x, *lists, drop_base, True, gain)
        hs = [empty(m, len(a), dtype=F32) for a in lists[1]]
        needs = [1, *[1, 1, 1, int(gain)] * count]
        accepts("lora_linear_group_backward", x, ys, *lists, drop_base, hs, ys, ys, needs)


@pytest.mark.parametrize("layout", ["odd", "transposed", "offset"])
def test_layouts(accepts, layout):
    k, n = (71, 135) if layout == "odd" else (K, N)

    def laid(*shape, dtype):
        if layout == "transposed":
            return torch.empty(*reversed(shape), dtype=dtype).T
        return empty(shape[0] * shape[1] + 1, dtype=dtype)[1:].view(shape) if layout == "offset" else empty(*shape, dtype=dtype)

    for dtype, adapters in kinds():
        x, dy = laid(70, k, dtype=dtype), laid(70, n, dtype=dtype)
        w, a, b = laid(n, k, dtype=dtype), laid(R, k, dtype=adapters), laid(n, R, dtype=adapters)
        layer = (w, a, b, 0.5, None, empty(n, dtype=F32), 0.05, torch.tensor(1), True)
        accepts("lora_linear_forward", x, *layer, True, True)
        accepts("lora_linear_backward", dy, x, *layer, empty(70, R, dtype=F32), None, empty(70, n, dtype=dtype), [1] * 5)
        accepts("weight_norm_forward", w, a, b, 0.5, None)
        accepts("weight_norm_backward", empty(n, dtype=F32), empty(n, dtype=F32), w, a, b, 0.5, [1, 1])
        accepts("merged_weight", w, a, b, 0.5, None)
        accepts("merge_into", w, a, b, 0.5, None, laid(n, k, dtype=dtype))


def test_norms_and_merges(accepts):
    for (dtype, adapters), r in product(kinds(), (1, 16, 128, 300)):
        w, a, b = empty(N, K, dtype=dtype), empty(r, K, dtype=adapters), empty(N, r, dtype=adapters)
        accepts("weight_norm_forward", w, a, b, 0.5, None)
        accepts("weight_norm_backward", empty(N, dtype=F32), empty(N, dtype=F32), w, a, b, 0.5, [1, 1])
        accepts("row_norm_squared", w)
        accepts("merged_weight", w, a, b, 0.5, empty(N, dtype=F32))
        accepts("merge_into", w, a, b, 0.5, None, w)
        for m in (1, 300):
            accepts("dora_linear", empty(m, K, dtype=dtype), w, a, b, 0.5, None, empty(N, dtype=F32))


def test_many_adapters(accepts):
    for (dtype, adapters), tokens, each, outs, k in product(kinds(), (1, 16, 64, 300), (1, 2), ([N], [N, 40, 40, 8]), (K, 71)):
        sites = [
            Slots(
                empty(16, k, dtype=adapters), empty(16, n, dtype=adapters), empty(3, 64, dtype=torch.int32),
                *(empty(3, dtype=kind) for kind in (torch.int32, F32, torch.int32)), empty(3, n, dtype=F32),
                empty(3, n, dtype=F32), empty(3, dtype=torch.int32),
            )
            for n in outs
        ]  # fmt: skip
        ids, weights = torch.zeros(tokens, each, dtype=torch.int64), None if each == 1 else torch.ones(tokens, each)
        rest = [t for s in sites for t in s.tensors], *BatchPlan.build(ids, 3, weights).tensors, None
        x, y, w = (empty(*shape, dtype=dtype) for shape in ((tokens, k), (tokens, sum(outs)), (sum(outs), k)))
        accepts("multi_lora_forward", x, w, *rest)
        accepts("multi_lora_add", y, x, *rest)
