"""The configurations of the ops' Triton kernels: what their launchers choose for some sizes, and the budgets of a person."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels import lora_linear, merged_weight, use_backend, weight_norm
from lora_kernels.ops.launch import Launch, recorded
from lora_kernels.testing.gates import Budget, Configuration, Triton
from lora_kernels.testing.gates.configuration import NVIDIA
from lora_kernels.testing.ptxsim import device

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WIDE = 4096
MMA, CUDA, AMD = "sm_80 sm_86 sm_89 sm_120", " ".join(NVIDIA), "gfx942"


def linear(
    m: int, r: int, dtype: torch.dtype = BF16, gain: bool = False, dropout: float = 0.0, semantics: str = "peft"
) -> Callable[[], None]:
    """A forward and a backward of one layer; nothing is computed."""

    def call() -> None:
        x, w, a, b = (torch.empty(s, dtype=dtype) for s in ((m, WIDE), (WIDE, WIDE), (r, WIDE), (WIDE, r)))
        given = torch.ones(WIDE).requires_grad_() if gain else None
        seed = torch.tensor(2**40) if dropout else None
        leaves = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
        y = lora_linear(leaves[0], w, *leaves[1:], 0.5, None, given, dropout, semantics, seed)
        y.backward(torch.empty_like(y))

    return call


def norm(r: int, dtype: torch.dtype = BF16) -> Callable[[], None]:
    def call() -> None:
        weight_norm(*(torch.empty(s, dtype=dtype) for s in ((WIDE, WIDE), (r, WIDE), (WIDE, r))), 0.5)

    return call


def merge(r: int, dtype: torch.dtype = BF16, adapters: torch.dtype | None = None) -> Callable[[], None]:
    def call() -> None:
        a, b = (torch.empty(s, dtype=adapters or dtype) for s in ((r, WIDE), (WIDE, r)))
        merged_weight(torch.empty(WIDE, WIDE, dtype=dtype), a, b, 0.5, torch.ones(WIDE))

    return call


def launches(call: Callable[[], None], arch: int) -> dict[str, Launch]:
    """The first launch of each kernel on a chip."""
    with use_backend("triton", simulate=True), device(arch), recorded() as found:
        call()
    return {launch.kernel.__name__: launch for launch in reversed(found)}


def on_chips(name: str, kernel: str, call: Callable[[], None], budgets: dict[str, Budget], **more: Any) -> Configuration:
    """What the launcher chooses on each chip; AMD's get what sm_80 gets."""
    made = {arch: _triton(kernel, launches(call, int(arch[3:]))[kernel]) for arch in NVIDIA}
    special = {arch: one for arch, one in made.items() if one != made["sm_80"]}
    return Configuration(name, made["sm_80"], budgets, special=special, **more)


def _triton(name: str, launch: Launch) -> Triton:
    args = {k: tuple(map(_dtype, v)) if isinstance(v, tuple) else _dtype(v) for k, v in launch.args.items()}
    return Triton(f"{launch.kernel.fn.__module__}:{name}", args, launch.warps, launch.stages)


def _dtype(value: object) -> object:
    return value.dtype if isinstance(value, Tensor) else value


DROPPED_F16 = linear(8192, 16, F16, gain=True, dropout=0.1)
LORA_ONLY = linear(8192, 16, gain=True, dropout=0.1, semantics="lora_only")
GATES = [
    on_chips("forward, bf16, r=16", "forward_kernel", linear(8192, 16), {
        MMA: Budget(3.2, "HMMA", units=64, wide=33),
        "sm_90": Budget(30, "HGMMA", units=4, wide=33, blocks=2),
        "sm_100": Budget(35, "UTCHMMA", units=4, wide=44),
        AMD: Budget(7.8, "v_mfma", units=16, wide=15),
    }),
    on_chips("forward, bf16, r=16, 16 tokens", "forward_kernel", linear(16, 16), {
        MMA: Budget(12.5, "HMMA", units=8, wide=18, blocks=4),
        "sm_90 sm_100": Budget(11.2, "HMMA", units=8, wide=18, blocks=8),
        AMD: Budget(22, "v_mfma", units=4, wide=6, blocks=3),
    }),
    on_chips("forward, bf16, r=16, dropped base", "forward_kernel", linear(8192, 16, gain=True, dropout=0.1), {
        MMA: Budget(16.2, "HMMA", units=64, wide=33, blocks=2),
        "sm_90": Budget(105, "HGMMA", units=8, wide=33, blocks=2),
        "sm_100": Budget(103, "UTCHMMA", units=8, wide=52, blocks=3),
        AMD: Budget(34, "v_mfma", units=16, wide=19, blocks=2),
    }),
    on_chips("forward, fp16, r=16", "forward_kernel", linear(8192, 16, F16), {
        MMA: Budget(3.2, "HMMA", units=64, wide=33),
        "sm_90": Budget(30, "HGMMA", units=4, wide=33),
        "sm_100": Budget(35, "UTCHMMA", units=4, wide=41),
        AMD: Budget(7.8, "v_mfma", units=16, wide=15),
    }),
    on_chips("forward, fp32, r=16", "forward_kernel", linear(8192, 16, F32), {
        CUDA: Budget(177, units=2, wide=8, blocks=2),
        AMD: Budget(7.5, "v_mfma", units=8, blocks=2),
    }),
    on_chips("dx, bf16, r=16", "input_gradient_kernel", linear(8192, 16), {
        MMA: Budget(3.6, "HMMA", units=64, wide=33),
        "sm_90": Budget(36, "HGMMA", units=4, wide=33, blocks=2),
        "sm_100": Budget(42, "UTCHMMA", units=4, wide=44),
        AMD: Budget(9.5, "v_mfma", units=16, wide=15),
    }),
    on_chips("dx, bf16, r=16, gain, dropout", "input_gradient_kernel", LORA_ONLY, {
        MMA: Budget(10.1, "HMMA", units=64, wide=33),
        "sm_90": Budget(72, "HGMMA", units=4, wide=33),
        "sm_100": Budget(70, "UTCHMMA", units=4, wide=44),
    }, without={"gfx942": "this is the launch for other chips; there it takes 2 stages"}),
    on_chips("dx, bf16, r=16, dropped base", "input_gradient_kernel", linear(8192, 16, gain=True, dropout=0.1), {
        MMA: Budget(5.5, "HMMA", units=64, wide=33, blocks=2),
        "sm_90": Budget(40, "HGMMA", units=8, wide=33, blocks=3),
        "sm_100": Budget(41, "UTCHMMA", units=8, wide=44, blocks=4),
        AMD: Budget(29, "v_mfma", units=16, wide=21),
    }),
    on_chips("dx, fp16, r=16, gain", "input_gradient_kernel", linear(8192, 16, F16, gain=True), {
        MMA: Budget(14.5, "HMMA", units=48, wide=6),
        "sm_90": Budget(38, "HGMMA", units=10, wide=6, blocks=2),
        "sm_100": Budget(54, "UTCHMMA", units=6, wide=6, blocks=3),
        AMD: Budget(28, "v_mfma", units=12, wide=2, blocks=2),
    }),
    on_chips("dx, fp16, r=16, dropped base", "input_gradient_kernel", DROPPED_F16, {
        CUDA: Budget(15.9, "HMMA", units=32, wide=10, blocks=3),
        AMD: Budget(18, "v_mfma", units=32, wide=4, blocks=2),
    }),
    on_chips("dx, fp32, r=16", "input_gradient_kernel", linear(8192, 16, F32), {
        CUDA: Budget(179, units=2, wide=8, blocks=2),
        AMD: Budget(8.4, "v_mfma", units=8, blocks=3),
    }),
    on_chips("shrink, bf16, r=16", "shrink_kernel", linear(8192, 16), {
        MMA: Budget(12.5, "HMMA", units=8, wide=15, blocks=4),
        "sm_90": Budget(26, "HGMMA", units=4, wide=15, blocks=7),
        "sm_100": Budget(31, "UTCHMMA", units=4, wide=20, blocks=7),
        AMD: Budget(22, "v_mfma", units=4, wide=6, blocks=3),
    }),
    on_chips("shrink, bf16, r=32", "shrink_kernel", linear(8192, 32), {
        MMA: Budget(6.5, "HMMA", units=16, wide=12, blocks=6),
        "sm_90": Budget(28, "HGMMA", units=4, wide=12, blocks=9),
        "sm_100": Budget(32, "UTCHMMA", units=4, wide=18, blocks=9),
        AMD: Budget(9.7, "v_mfma", units=8, wide=9, blocks=5),
    }),
    on_chips("shrink, bf16, r=32, dropout", "shrink_kernel", linear(8192, 32, dropout=0.1), {
        MMA: Budget(46, "HMMA", units=16, wide=12, blocks=4),
        "sm_90": Budget(165, "HGMMA", units=4, wide=12, blocks=4),
        "sm_100": Budget(178, "UTCHMMA", units=4, wide=18, blocks=7),
        AMD: Budget(56, "v_mfma", units=8, wide=6, blocks=3),
    }),
    on_chips("shrink, bf16, r=64", "shrink_kernel", linear(8192, 64), {
        MMA: Budget(5.2, "HMMA", units=32, wide=24, blocks=3),
        "sm_90": Budget(31, "HGMMA", units=4, wide=24, blocks=4),
        "sm_100": Budget(35, "UTCHMMA", units=4, wide=32, blocks=4),
        AMD: Budget(14.5, "v_mfma", units=8, wide=12, blocks=2),
    }),
    on_chips("shrink, bf16, r=16, dropout", "shrink_kernel", linear(8192, 16, dropout=0.1), {
        MMA: Budget(87, "HMMA", units=8, wide=15, blocks=3),
        "sm_90": Budget(165, "HGMMA", units=4, wide=15, blocks=5),
        "sm_100": Budget(178, "UTCHMMA", units=4, wide=20, blocks=7),
        AMD: Budget(114, "v_mfma", units=4, wide=6, blocks=4),
    }),
    on_chips("shrink, fp32, r=16", "shrink_kernel", linear(8192, 16, F32), {
        CUDA: Budget(81, units=5, wide=15, blocks=4),
        AMD: Budget(12.6, "v_mfma", units=8, wide=6, blocks=3),
    }),
    on_chips("both_sides, bf16, r=16", "both_sides_kernel", linear(8192, 16), {
        MMA: Budget(24, "HMMA", units=16, wide=10, blocks=4),
        "sm_90": Budget(29, "HGMMA", units=8, wide=18, blocks=6),
        "sm_100": Budget(35, "UTCHMMA", units=8, wide=24, blocks=6),
        AMD: Budget(52, "v_mfma", units=8, wide=9, blocks=4),
    }),
    on_chips("both_sides, bf16, r=32", "both_sides_kernel", linear(8192, 32), {
        MMA: Budget(21, "HMMA", units=32, wide=16, blocks=2),
        "sm_90": Budget(38, "HGMMA", units=8, wide=24, blocks=4),
        "sm_100": Budget(42, "UTCHMMA", units=8, wide=32, blocks=4),
        AMD: Budget(45, "v_mfma", units=16, wide=12, blocks=2),
    }),
    on_chips("both_sides, bf16, r=64", "both_sides_kernel", linear(8192, 64), {
        MMA: Budget(18.8, "HMMA", units=32, wide=14, blocks=3),
        "sm_90": Budget(58, "HGMMA", units=4, wide=18, blocks=6),
        "sm_100": Budget(69, "UTCHMMA", units=4, wide=24, blocks=6),
        AMD: Budget(45, "v_mfma", units=8, wide=9, blocks=3),
    }),
    on_chips("norm, bf16, r=16", "norm_kernel", norm(16), {
        MMA: Budget(28, "HMMA", units=8, wide=8, blocks=4),
        "sm_90": Budget(216, "HGMMA", wide=8, blocks=4),
        "sm_100": Budget(228, "UTCHMMA", wide=13, blocks=4),
        AMD: Budget(61, "v_mfma", units=2, wide=6, blocks=5),
    }),
    on_chips("norm, bf16, r=32", "norm_kernel", norm(32), {
        MMA: Budget(14.5, "HMMA", units=16, wide=12, blocks=3),
        "sm_90": Budget(116, "HGMMA", units=2, wide=12, blocks=4),
        "sm_100": Budget(122, "UTCHMMA", units=2, wide=18, blocks=4),
        AMD: Budget(36, "v_mfma", units=4, wide=10, blocks=4),
    }),
    on_chips("norm, bf16, r=64", "norm_kernel", norm(64), {
        MMA: Budget(8.8, "HMMA", units=32, wide=20, blocks=2),
        "sm_90": Budget(61, "HGMMA", units=4, wide=20, blocks=4),
        "sm_100": Budget(67, "UTCHMMA", units=4, wide=28, blocks=4),
        AMD: Budget(22, "v_mfma", units=8, wide=14, blocks=2),
    }),
    on_chips("norm, bf16, r=256", "norm_kernel", norm(256), {
        MMA: Budget(5.5, "HMMA", units=32, wide=36, blocks=2),
        "sm_90": Budget(35, "HGMMA", units=4, wide=36, blocks=2),
        "sm_100": Budget(39, "UTCHMMA", units=4, wide=44, blocks=2),
        AMD: Budget(17.5, "v_mfma", units=8, wide=18, blocks=2),
    }),
    on_chips("norm, fp32, r=16", "norm_kernel", norm(16, F32), {
        MMA: Budget(15.1, "HMMA", units=24, wide=9, blocks=3),
        "sm_90": Budget(46, "HGMMA", units=6, wide=9, blocks=5),
        "sm_100": Budget(84, "UTCHMMA", units=6, wide=9, blocks=4),
        AMD: Budget(21, "v_mfma", units=12, wide=7, blocks=4),
    }),
    on_chips("norm, fp32, r=256", "norm_kernel", norm(256, F32), {
        MMA: Budget(17.5, "HMMA", units=24, wide=16, blocks=3),
        "sm_90": Budget(52, "HGMMA", units=6, wide=16, blocks=3),
        "sm_100": Budget(78, "UTCHMMA", units=6, wide=16, blocks=3),
        AMD: Budget(28, "v_mfma", units=12, wide=6, blocks=3),
    }),
    on_chips("merge, bf16, r=8", "merge_kernel", merge(8), {
        MMA: Budget(12, "HMMA", units=8, wide=6, blocks=4),
        "sm_90": Budget(111, "HGMMA", wide=6, blocks=5),
        "sm_100": Budget(130, "UTCHMMA", wide=7, blocks=7),
        AMD: Budget(40, "v_mfma", units=2, wide=2, blocks=7),
    }),
    on_chips("merge, bf16, r=16", "merge_kernel", merge(16), {
        MMA: Budget(10.6, "HMMA", units=8, wide=8, blocks=4),
        "sm_90": Budget(75, "HGMMA", wide=8, blocks=7),
        "sm_100": Budget(84, "UTCHMMA", wide=10, blocks=7),
        AMD: Budget(27, "v_mfma", units=2, wide=2, blocks=8),
    }),
    on_chips("merge, bf16, r=32", "merge_kernel", merge(32), {
        MMA: Budget(7.1, "HMMA", units=16, wide=12, blocks=3),
        "sm_90": Budget(56, "HGMMA", units=2, wide=12, blocks=6),
        "sm_100": Budget(56, "UTCHMMA", units=2, wide=16, blocks=7),
        AMD: Budget(21, "v_mfma", units=4, wide=8, blocks=7),
    }),
    on_chips("merge, bf16, r=64", "merge_kernel", merge(64), {
        MMA: Budget(5.3, "HMMA", units=32, wide=20, blocks=3),
        "sm_90": Budget(40, "HGMMA", units=4, wide=20, blocks=5),
        "sm_100": Budget(40, "UTCHMMA", units=4, wide=28, blocks=6),
        AMD: Budget(13.4, "v_mfma", units=8, wide=14, blocks=4),
    }),
    on_chips("merge, bf16, r=256", "merge_kernel", merge(256), {
        MMA: Budget(5.3, "HMMA", units=32, wide=20, blocks=3),
        "sm_90": Budget(40, "HGMMA", units=4, wide=20, blocks=5),
        "sm_100": Budget(40, "UTCHMMA", units=4, wide=28, blocks=6),
        AMD: Budget(13.4, "v_mfma", units=8, wide=14, blocks=4),
    }),
    on_chips("merge, bf16, r=16, float32 adapter", "merge_kernel", merge(16, BF16, F32), {
        MMA: Budget(17, "HMMA", units=24, wide=8, blocks=4),
        "sm_90": Budget(51, "HGMMA", units=6, wide=8, blocks=6),
        "sm_100": Budget(74, "UTCHMMA", units=6, wide=8, blocks=6),
        AMD: Budget(28, "v_mfma", units=12, wide=3, blocks=4),
    }),
    on_chips("merge, bf16, r=256, float32 adapter", "merge_kernel", merge(256, BF16, F32), {
        MMA: Budget(17, "HMMA", units=24, wide=8, blocks=4),
        "sm_90": Budget(51, "HGMMA", units=6, wide=8, blocks=6),
        "sm_100": Budget(74, "UTCHMMA", units=6, wide=8, blocks=6),
        AMD: Budget(28, "v_mfma", units=12, wide=3, blocks=4),
    }),
    on_chips("merge, fp32, r=16", "merge_kernel", merge(16, F32), {
        MMA: Budget(17.5, "HMMA", units=24, wide=10, blocks=4),
        "sm_90": Budget(51, "HGMMA", units=6, wide=10, blocks=5),
        "sm_100": Budget(74, "UTCHMMA", units=6, wide=10, blocks=5),
        AMD: Budget(28, "v_mfma", units=12, wide=4, blocks=4),
    }),
    on_chips("merge, fp32, r=256", "merge_kernel", merge(256, F32), {
        MMA: Budget(17.5, "HMMA", units=24, wide=10, blocks=4),
        "sm_90": Budget(51, "HGMMA", units=6, wide=10, blocks=5),
        "sm_100": Budget(74, "UTCHMMA", units=6, wide=10, blocks=5),
        AMD: Budget(28, "v_mfma", units=12, wide=4, blocks=4),
    }),
]  # fmt: skip
