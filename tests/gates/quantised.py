"""The configurations of the Triton kernels that read a quantised weight, and the budgets of a
person."""

from collections.abc import Callable

import torch

from lora_kernels import QuantisedWeight, lora_linear, weight_norm
from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.quantised.weight import HALVES, LOW_FIRST, POWERS
from lora_kernels.testing.gates import Budget, Change
from tests.gates.calls import BF16, F16, F32, WIDE, on_chips


def weight(kind: str, dtype: torch.dtype = BF16, shape: tuple[int, int] = (WIDE, WIDE)) -> QuantisedWeight:
    """As bitsandbytes lays it: nf4 with nested scales, int8 with one for each row; or float8 in
    blocks or in tiles as DeepSeek's, MXFP4 as gpt-oss's, HQQ."""
    size = shape[0] * shape[1]
    block = shape[1] if kind == "int8" else 64
    if kind == "nf4":
        codes, scales = (torch.empty(n, dtype=torch.uint8) for n in (size // 2, size // block))
        nested = torch.empty(size // block // 256), torch.empty(256), torch.empty(())
        return QuantisedWeight(codes, shape, scales, block, dtype, torch.empty(16), *nested)
    if kind in ("mxfp4", "hqq"):
        block, order = (32, LOW_FIRST) if kind == "mxfp4" else (64, HALVES)
        scales = torch.empty(size // block, dtype=POWERS if kind == "mxfp4" else F32)
        zeros = None if kind == "mxfp4" else torch.empty(size // block)
        return QuantisedWeight(
            torch.empty(size // 2, dtype=torch.uint8), shape, scales, block, dtype, torch.empty(16), order=order, zeros=zeros,
            zero_rounded=zeros is not None,
        )  # fmt: skip
    codes = torch.empty(shape, dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    if kind == "tiles":
        return QuantisedWeight(codes, shape, torch.empty(size // 128**2), 128, dtype, block_rows=128)
    return QuantisedWeight(codes, shape, torch.empty(size // block), block, dtype)


def few(kind: str, m: int, r: int = 16, dtype: torch.dtype = BF16, dropout: float = 0.0) -> Callable[[], None]:
    def call() -> None:
        x, a, b = (torch.empty(s, dtype=dtype) for s in ((m, WIDE), (r, WIDE), (WIDE, r)))
        seed = torch.tensor(2**40) if dropout else None
        with forced_candidate("codes"):
            lora_linear(x, weight(kind, dtype), a, b, 0.5, None, None, dropout, seed=seed)

    return call


def back(
    kind: str, m: int, r: int = 16, dtype: torch.dtype = BF16, gain: bool = False, dropout: float = 0.0, dx: bool = True
) -> Callable[[], None]:
    """A step; of its launches the last is that over the codes."""

    def call() -> None:
        x, a, b = leaves = [torch.empty(s, dtype=dtype).requires_grad_() for s in ((m, WIDE), (r, WIDE), (WIDE, r))]
        x.requires_grad_(dx)
        given = torch.ones(WIDE).requires_grad_() if gain else None
        seed = torch.tensor(2**40) if dropout else None
        with forced_candidate("codes"):
            y = lora_linear(x, weight(kind, dtype), a, b, 0.5, None, given, dropout, "lora_only", seed)
            torch.autograd.grad(y, [t for t in (*leaves, given) if t is not None and t.requires_grad], torch.empty_like(y))

    return call


def whole(kind: str) -> Callable[[], None]:
    def call() -> None:
        weight(kind).dequantise()

    return call


def norm(kind: str, r: int) -> Callable[[], None]:
    def call() -> None:
        weight_norm(weight(kind), torch.empty(r, WIDE, dtype=BF16), torch.empty(WIDE, r, dtype=BF16), 0.5)

    return call


GATES = [
    on_chips("dequantise, nf4", "dequantise_kernel", whole("nf4"), Budget(19.6, units=6, blocks=6), {
        "gfx942": Change(per=26, units=5, blocks=4),
    }),
    on_chips("dequantise, int8", "dequantise_kernel", whole("int8"), Budget(34.5, units=2, blocks=6), {
        "gfx942": Change(per=38, blocks=4),
    }),
    on_chips("dequantise, float8", "dequantise_kernel", whole("float8"), Budget(51, units=2, blocks=6), {
        "gfx942": Change(per=47, blocks=4),
    }),
    on_chips("dequantise, mxfp4", "dequantise_kernel", whole("mxfp4"), Budget(35, units=3, blocks=6), {
        "gfx942": Change(per=37, blocks=4),
    }),
    on_chips(
        "codes, nf4, r=16, 16 tokens", "quantised_forward_kernel", few("nf4", 16),
        Budget(21, "HMMA", units=16, wide=24, blocks=3), {
            "gfx942": Change(per=43, matrix="v_mfma", units=8, wide=4, blocks=2),
        }),
    on_chips(
        "codes, int8, r=16, 16 tokens", "quantised_forward_kernel", few("int8", 16),
        Budget(21.8, "HMMA", units=16, wide=25, blocks=2), {
            "gfx942": Change(per=44, matrix="v_mfma", units=8, wide=9),
        }),
    on_chips(
        "codes, float8, r=16, 16 tokens", "quantised_forward_kernel", few("float8", 16),
        Budget(29.5, "HMMA", units=16, wide=25, blocks=2), {
            "gfx942": Change(per=49.5, matrix="v_mfma", units=8, wide=9),
        }),
    on_chips(
        "codes, mxfp4, r=16, 16 tokens", "quantised_forward_kernel", few("mxfp4", 16),
        Budget(19.6, "HMMA", units=16, wide=24, blocks=3), {
            "gfx942": Change(per=43, matrix="v_mfma", units=8, wide=4, blocks=2),
        }),
    on_chips(
        "codes, hqq, r=16, 16 tokens", "quantised_forward_kernel", few("hqq", 16),
        Budget(36, "HMMA", units=16, wide=29, blocks=2), {
            "gfx942": Change(per=62, matrix="v_mfma", units=8, wide=9),
        }),
    on_chips(
        "codes, nf4, r=64, 64 tokens", "quantised_forward_kernel", few("nf4", 64, 64),
        Budget(8.9, "HMMA", units=48, wide=47, blocks=2), {
            "gfx942": Change(per=24.7, matrix="v_mfma", units=16, wide=46, blocks=1),
        }),
    on_chips(
        "codes, nf4, r=16, dropout, 64 tokens", "quantised_forward_kernel", few("nf4", 64, dropout=0.1),
        Budget(25, "HMMA", units=40, wide=29, blocks=2), {
            "sm_90 sm_100": Change(per=46.5, units=12, wide=9, blocks=4),
            "gfx942": Change(per=62, matrix="v_mfma", units=12, wide=26),
        }),
    on_chips(
        "codes, nf4, fp32, r=16, 16 tokens", "quantised_forward_kernel", few("nf4", 16, dtype=F32),
        Budget(40, units=6, blocks=2), {
            "gfx942": Change(per=8.8, matrix="v_mfma", units=16),
        }),
    on_chips(
        "norm of codes, nf4, r=16", "quantised_norm_kernel", norm("nf4", 16),
        Budget(59.5, "HMMA", units=4, wide=2, blocks=7), {
            "gfx942": Change(per=60, matrix="v_mfma", wide=0, blocks=3),
        }),
    *(on_chips(f"dx of codes, {name}", "quantised_input_gradient_kernel", call, budget, {"gfx942": change})
      for name, call, budget, change in (
          ("nf4, r=16, 16 tokens", back("nf4", 16), Budget(38.5, "HMMA", units=8, wide=51, blocks=4),
           Change(per=80, matrix="v_mfma", units=4, wide=23, blocks=3)),
          ("int8, r=16, 16 tokens", back("int8", 16), Budget(38.5, "HMMA", units=8, wide=56, blocks=3),
           Change(per=82.5, matrix="v_mfma", units=4, wide=28)),
          ("mxfp4, r=16, 16 tokens", back("mxfp4", 16), Budget(37, "HMMA", units=8, wide=51, blocks=4),
           Change(per=77, matrix="v_mfma", units=4, wide=23, blocks=3)),
          ("tiles, r=16, 16 tokens", back("tiles", 16), Budget(60, "HMMA", units=8, wide=56, blocks=3),
           Change(per=98, matrix="v_mfma", units=4, wide=28)),
          ("nf4, r=64, gain, dropout, 64 tokens", back("nf4", 64, 64, gain=True, dropout=0.1),
           Budget(14.1, "HMMA", units=32, wide=46, blocks=2), Change(per=62, matrix="v_mfma", units=8, wide=35)),
          ("nf4, fp16, r=16, gain, 64 tokens", back("nf4", 64, dtype=F16, gain=True),
           Budget(18, "HMMA", units=48, wide=56, blocks=2), Change(per=52.5, matrix="v_mfma", units=12, wide=26)),
          ("nf4, fp32, r=16, 16 tokens", back("nf4", 16, dtype=F32), Budget(59, units=5, wide=6, blocks=4),
           Change(per=8.6, matrix="v_mfma", units=16, wide=0, blocks=2)),
      )),
    on_chips(
        "rest of codes, nf4, r=16, gain", "quantised_rest_of_gradients_kernel", back("nf4", 16, gain=True, dx=False),
        Budget(34, units=5, wide=9, blocks=6), {
            "sm_80": Change(per=184, units=1),
            "gfx942": Change(per=19.7, wide=4, blocks=8),
        }),
]  # fmt: skip
