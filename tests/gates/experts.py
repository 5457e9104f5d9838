"""The configurations of the Triton kernels for the experts of a layer, and the budgets of a
person."""

from collections.abc import Callable
from dataclasses import replace

import torch

from lora_kernels import QuantisedWeight, expert_lora_linear, expert_weight_norm
from lora_kernels.testing.gates import Budget, Change
from tests.gates.calls import BF16, F32, on_chips
from tests.gates.quantised import weight

EXPERTS, OUT, IN, RANK, TOKENS = 32, 1536, 2048, 16, 4096


def experts(
    dtype: torch.dtype = BF16, gain: bool = False, tokens: int = TOKENS, index: bool = False
) -> Callable[[], None]:  # fmt: skip
    """A forward and a backward of 32 experts with as many tokens each, which are only noted."""

    def call() -> None:
        x, w = torch.empty(tokens, IN, dtype=dtype), torch.empty(EXPERTS, OUT, IN, dtype=dtype)
        a, b = torch.empty(EXPERTS, RANK, IN, dtype=dtype), torch.empty(EXPERTS, OUT, RANK, dtype=dtype)
        leaves = [t.requires_grad_() for t in (x, a, b)]
        vector = torch.ones(EXPERTS, OUT).requires_grad_() if gain else None
        ends = torch.arange(1, EXPERTS + 1) * (tokens // EXPERTS)
        at = torch.arange(tokens) if index else None
        y = expert_lora_linear(leaves[0], ends, w, *leaves[1:], 0.5, vector, vector, index=at)
        torch.autograd.grad(y, leaves, torch.empty_like(y))

    return call


def norms(kind: str | None) -> Callable[[], None]:
    """Of the same experts, over numbers or codes."""

    def call() -> None:
        w = codes(kind) if kind else torch.empty(EXPERTS, OUT, IN, dtype=BF16)
        expert_weight_norm(w, torch.empty(EXPERTS, RANK, IN, dtype=BF16), torch.empty(EXPERTS, OUT, RANK, dtype=BF16), 0.5)

    return call


def of_codes(kind: str) -> Callable[[], None]:
    """y of the same experts over codes; the first launch makes their numbers."""

    def call() -> None:
        ends = torch.arange(1, EXPERTS + 1) * (TOKENS // EXPERTS)
        expert_lora_linear(torch.empty(TOKENS, IN, dtype=BF16), ends, codes(kind), None, None)

    return call


def codes(kind: str) -> QuantisedWeight:
    return replace(weight(kind, shape=(EXPERTS * OUT, IN)), shape=torch.Size((EXPERTS, OUT, IN)))


GATES = [
    *(on_chips(
        f"experts, bf16, 4 tokens of each, {name}", "expert_product_kernel", experts(tokens=4 * EXPERTS, index=index),
        Budget(4.2, "HMMA", units=40, wide=19, blocks=3), {
            "sm_100": Change(wide=13),
            "gfx942": Change(per=10.6, matrix="v_mfma", units=8, wide=6, blocks=5),
        }) for name, index in (("h and y", False), ("h and y by an index", True))),
    *(on_chips(
        f"experts, bf16, {name}", "expert_product_kernel", experts(index=index),
        Budget(12.6, "HMMA", units=8, wide=12, blocks=2), {
            "sm_90": Change(per=26, matrix="HGMMA", units=4, blocks=4),
            "sm_100": Change(per=32.5, matrix="UTCHMMA", units=4, blocks=5),
            "gfx942": Change(per=15.5, matrix="v_mfma", units=4, wide=6, blocks=3),
        }) for name, index in (("h", False), ("h by an index", True))),
    on_chips("experts, bf16, dx", "expert_product_kernel", experts(), Budget(3.7, "HMMA", units=64, wide=27), {
        "sm_90": Change(per=37.5, matrix="HGMMA", units=4, blocks=2),
        "sm_100": Change(per=42.5, matrix="UTCHMMA", units=4),
        "gfx942": Change(per=7.6, matrix="v_mfma", units=16, wide=13),
    }, last=True),
    on_chips(
        "experts, bf16, dx with a gain", "expert_product_kernel", experts(gain=True),
        Budget(8.2, "HMMA", units=32, wide=11, blocks=3), {
            "sm_90": Change(per=62.5, matrix="HGMMA", units=4, wide=9, blocks=4),
            "sm_100": Change(per=80, matrix="UTCHMMA", units=4, wide=15, blocks=4),
            "gfx942": Change(per=53, matrix="v_mfma", units=8, wide=19),
        }, last=True),
    on_chips("experts, fp32, dx", "expert_product_kernel", experts(F32), Budget(185, units=2, wide=6, blocks=2), {
        "gfx942": Change(per=9.1, matrix="v_mfma", units=8, wide=0, blocks=3),
        "sm_100, triton 3.6.0": Change(spilled=5),
    }, last=True),
    on_chips("experts, bf16, dA", "expert_outer_kernel", experts(), Budget(17, "HMMA", units=16, wide=4, blocks=2), {
        "sm_90": Change(per=20.5, matrix="HGMMA", units=8, wide=8, blocks=5),
        "sm_100": Change(per=21, matrix="UTCHMMA", units=8, blocks=5),
        "gfx942": Change(per=31.5, matrix="v_mfma", units=8, wide=6, blocks=3),
    }),
    on_chips(
        "experts, bf16, dB and sums", "expert_outer_kernel", experts(gain=True),
        Budget(43.5, "HMMA", units=16, wide=10, blocks=2), {
            "sm_90": Change(per=72, matrix="HGMMA", units=8, wide=14, blocks=4),
            "sm_100": Change(per=133, matrix="UTCHMMA", units=4, wide=9, blocks=4),
            "gfx942": Change(per=66, matrix="v_mfma", units=8, wide=8, blocks=4),
        }, last=True),
    on_chips(
        "experts, bf16, dA by an index", "expert_outer_kernel", experts(index=True),
        Budget(19, "HMMA", units=16, wide=4, blocks=2), {
            "sm_90": Change(per=27, matrix="HGMMA", units=8, wide=8, blocks=5),
            "sm_100": Change(per=26, matrix="UTCHMMA", units=8, blocks=6),
            "gfx942": Change(per=34.5, matrix="v_mfma", units=8, wide=6, blocks=3),
        }),
    # as those of a layer, tests/gates/weights.py and quantised.py
    on_chips("norm of experts, bf16, r=16", "norm_kernel", norms(None), Budget(29, "HMMA", units=8, wide=8, blocks=4), {
        "sm_90": Change(per=217, matrix="HGMMA", units=1),
        "sm_100": Change(per=230, matrix="UTCHMMA", units=1, wide=13),
        "gfx942": Change(per=61, matrix="v_mfma", units=2, wide=6, blocks=5),
    }),
    on_chips(
        "norm of experts' codes, nf4, r=16", "quantised_norm_kernel", norms("nf4"),
        Budget(59.5, "HMMA", units=4, wide=2, blocks=7), {
            "gfx942": Change(per=60, matrix="v_mfma", wide=0, blocks=3),
        }),
    on_chips("dequantise, nf4, experts with tokens", "dequantise_kernel", of_codes("nf4"), Budget(17.5, units=10, blocks=6), {
        "gfx942": Change(per=38, units=9, blocks=4),
    }),
]  # fmt: skip
