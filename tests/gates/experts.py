"""The configurations of the Triton kernels for the experts of a layer, and the budgets of a
person."""

from collections.abc import Callable

import torch

from lora_kernels import expert_lora_linear
from lora_kernels.testing.gates import Budget, Change
from tests.gates.calls import BF16, F32, on_chips

EXPERTS, OUT, IN, RANK, TOKENS = 32, 1536, 2048, 16, 4096


def experts(dtype: torch.dtype = BF16, gain: bool = False, tokens: int = TOKENS) -> Callable[[], None]:
    """A forward and a backward of 32 experts with as many tokens each, which are only noted."""

    def call() -> None:
        x, w = torch.empty(tokens, IN, dtype=dtype), torch.empty(EXPERTS, OUT, IN, dtype=dtype)
        a, b = torch.empty(EXPERTS, RANK, IN, dtype=dtype), torch.empty(EXPERTS, OUT, RANK, dtype=dtype)
        leaves = [t.requires_grad_() for t in (x, a, b)]
        vector = torch.ones(EXPERTS, OUT).requires_grad_() if gain else None
        ends = torch.arange(1, EXPERTS + 1) * (tokens // EXPERTS)
        y = expert_lora_linear(leaves[0], ends, w, *leaves[1:], 0.5, vector, vector)
        torch.autograd.grad(y, leaves, torch.empty_like(y))

    return call


GATES = [
    on_chips(
        "experts, bf16, 4 tokens of each, h and y", "expert_product_kernel", experts(tokens=4 * EXPERTS),
        Budget(4.2, "HMMA", units=40, wide=19, blocks=3), {
            "sm_100": Change(wide=13),
            "gfx942": Change(per=10.6, matrix="v_mfma", units=8, wide=6, blocks=5),
        }),
    on_chips("experts, bf16, h", "expert_product_kernel", experts(), Budget(12.6, "HMMA", units=8, wide=12, blocks=2), {
        "sm_90": Change(per=26, matrix="HGMMA", units=4, blocks=4),
        "sm_100": Change(per=32.5, matrix="UTCHMMA", units=4, blocks=5),
        "gfx942": Change(per=15.5, matrix="v_mfma", units=4, wide=6, blocks=3),
    }),
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
]
