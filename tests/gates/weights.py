"""The configurations of the Triton kernels whose work is on the weight, and the budgets of a
person."""

from lora_kernels.testing.gates import Budget
from tests.gates.calls import BF16, F32, dora, merge, norm, on_chips

GATES = [
    on_chips("dora, bf16, r=8", "dora_kernel", dora(16, 8), {
        "sm_80 sm_86 sm_89 sm_120": Budget(7.1, "HMMA", units=28, wide=8, blocks=4),
        "sm_90 sm_100": Budget(8.9, "HMMA", units=24, wide=8, blocks=3),
        "gfx942": Budget(13.6, "v_mfma", units=14, wide=7, blocks=3),
    }),
    on_chips("dora, bf16, r=16", "dora_kernel", dora(16, 16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(7.2, "HMMA", units=28, wide=8, blocks=3),
        "sm_90 sm_100": Budget(8.9, "HMMA", units=24, wide=8, blocks=3),
        "gfx942": Budget(13.6, "v_mfma", units=14, wide=7, blocks=3),
    }),
    on_chips("dora, bf16, r=64", "dora_kernel", dora(16, 64), {
        "sm_80 sm_86 sm_89 sm_120": Budget(4.6, "HMMA", units=64, wide=19, blocks=2),
        "sm_90 sm_100": Budget(19.2, "HMMA", units=12, wide=19, blocks=3),
        "gfx942": Budget(11.5, "v_mfma", units=20, wide=14, blocks=2),
    }, spilled={"sm_90, triton 3.6.0": 34, "sm_100, triton 3.6.0": 42}),
    on_chips("dora, bf16, r=16, 64 tokens", "dora_kernel", dora(64, 16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(8, "HMMA", units=28, wide=17, blocks=2),
        "sm_90": Budget(23, "HGMMA", units=9, wide=21, blocks=4),
        "sm_100": Budget(32, "UTCHMMA", units=9, wide=32, blocks=4),
        "gfx942": Budget(15.9, "v_mfma", units=14, wide=13, blocks=2),
    }),
    on_chips("dora, fp32, r=16", "dora_kernel", dora(16, 16, F32), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(56, "HMMA", units=6, wide=2, blocks=3),
        "gfx942": Budget(11.7, "v_mfma", units=24, blocks=4),
    }),
    on_chips("norm, bf16, r=8", "norm_kernel", norm(8), {
        "sm_80 sm_86 sm_89 sm_120": Budget(28, "HMMA", units=8, wide=6, blocks=5),
        "sm_90": Budget(215, "HGMMA", units=1, wide=7, blocks=4),
        "sm_100": Budget(230, "UTCHMMA", units=1, wide=12, blocks=4),
        "gfx942": Budget(61, "v_mfma", units=2, wide=6, blocks=5),
    }),
    on_chips("norm, bf16, r=16", "norm_kernel", norm(16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(29, "HMMA", units=8, wide=8, blocks=4),
        "sm_90": Budget(217, "HGMMA", units=1, wide=8, blocks=4),
        "sm_100": Budget(230, "UTCHMMA", units=1, wide=13, blocks=4),
        "gfx942": Budget(61, "v_mfma", units=2, wide=6, blocks=5),
    }),
    on_chips("norm, bf16, r=32", "norm_kernel", norm(32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(14.7, "HMMA", units=16, wide=12, blocks=3),
        "sm_90": Budget(117, "HGMMA", units=2, wide=12, blocks=4),
        "sm_100": Budget(123, "UTCHMMA", units=2, wide=18, blocks=4),
        "gfx942": Budget(36, "v_mfma", units=4, wide=10, blocks=4),
    }),
    on_chips("norm, bf16, r=64", "norm_kernel", norm(64), {
        "sm_80 sm_86 sm_89 sm_120": Budget(9, "HMMA", units=32, wide=20, blocks=2),
        "sm_90": Budget(62, "HGMMA", units=4, wide=20, blocks=4),
        "sm_100": Budget(68, "UTCHMMA", units=4, wide=28, blocks=4),
        "gfx942": Budget(22, "v_mfma", units=8, wide=14, blocks=2),
    }),
    on_chips("norm, bf16, r=256", "norm_kernel", norm(256), {
        "sm_80 sm_86 sm_89 sm_120": Budget(6.3, "HMMA", units=32, wide=36, blocks=2),
        "sm_90": Budget(36, "HGMMA", units=4, wide=36, blocks=2),
        "sm_100": Budget(42, "UTCHMMA", units=4, wide=44, blocks=2),
        "gfx942": Budget(18.4, "v_mfma", units=8, wide=18, blocks=2),
    }),
    on_chips("norm, fp32, r=16", "norm_kernel", norm(16, F32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(15.3, "HMMA", units=24, wide=9, blocks=3),
        "sm_90": Budget(13.9, "HMMA", units=24, wide=6, blocks=4),
        "sm_100": Budget(12.2, "HMMA", units=24, wide=6, blocks=4),
        "gfx942": Budget(21, "v_mfma", units=12, wide=7, blocks=4),
    }),
    on_chips("norm, fp32, r=256", "norm_kernel", norm(256, F32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(18, "HMMA", units=24, wide=16, blocks=3),
        "sm_90": Budget(16.2, "HMMA", units=24, wide=10, blocks=4),
        "sm_100": Budget(14.2, "HMMA", units=24, wide=10, blocks=3),
        "gfx942": Budget(28, "v_mfma", units=12, wide=6, blocks=3),
    }),
    on_chips("merge, bf16, r=8", "merge_kernel", merge(8), {
        "sm_80 sm_86 sm_89 sm_120": Budget(12.1, "HMMA", units=8, wide=6, blocks=4),
        "sm_90": Budget(112, "HGMMA", units=1, wide=6, blocks=5),
        "sm_100": Budget(132, "UTCHMMA", units=1, wide=7, blocks=7),
        "gfx942": Budget(41, "v_mfma", units=2, wide=2, blocks=7),
    }),
    on_chips("merge, bf16, r=16", "merge_kernel", merge(16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(10.7, "HMMA", units=8, wide=8, blocks=4),
        "sm_90": Budget(75, "HGMMA", units=1, wide=8, blocks=7),
        "sm_100": Budget(85, "UTCHMMA", units=1, wide=10, blocks=7),
        "gfx942": Budget(28, "v_mfma", units=2, wide=2, blocks=8),
    }),
    on_chips("merge, bf16, r=32", "merge_kernel", merge(32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(7.2, "HMMA", units=16, wide=12, blocks=3),
        "sm_90": Budget(56, "HGMMA", units=2, wide=12, blocks=6),
        "sm_100": Budget(57, "UTCHMMA", units=2, wide=16, blocks=7),
        "gfx942": Budget(21, "v_mfma", units=4, wide=8, blocks=7),
    }),
    on_chips("merge, bf16, r=64", "merge_kernel", merge(64), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.3, "HMMA", units=32, wide=20, blocks=3),
        "sm_90": Budget(41, "HGMMA", units=4, wide=20, blocks=5),
        "sm_100": Budget(41, "UTCHMMA", units=4, wide=28, blocks=6),
        "gfx942": Budget(13.6, "v_mfma", units=8, wide=14, blocks=4),
    }),
    on_chips("merge, bf16, r=256", "merge_kernel", merge(256), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.3, "HMMA", units=32, wide=20, blocks=3),
        "sm_90": Budget(41, "HGMMA", units=4, wide=20, blocks=5),
        "sm_100": Budget(41, "UTCHMMA", units=4, wide=28, blocks=6),
        "gfx942": Budget(13.6, "v_mfma", units=8, wide=14, blocks=4),
    }),
    on_chips("merge, bf16, r=16, float32 adapter", "merge_kernel", merge(16, BF16, F32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(17.2, "HMMA", units=24, wide=8, blocks=4),
        "sm_90": Budget(52, "HGMMA", units=6, wide=5, blocks=5),
        "sm_100": Budget(75, "UTCHMMA", units=6, wide=5, blocks=6),
        "gfx942": Budget(28, "v_mfma", units=12, wide=3, blocks=4),
    }),
    on_chips("merge, fp32, r=16", "merge_kernel", merge(16, F32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(17.6, "HMMA", units=24, wide=10, blocks=4),
        "sm_90": Budget(52, "HGMMA", units=6, wide=7, blocks=5),
        "sm_100": Budget(75, "UTCHMMA", units=6, wide=7, blocks=5),
        "gfx942": Budget(28, "v_mfma", units=12, wide=4, blocks=4),
    }),
    on_chips("merge, bf16, r=256, float32 adapter", "merge_kernel", merge(256, BF16, F32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(17.2, "HMMA", units=24, wide=8, blocks=4),
        "sm_90": Budget(52, "HGMMA", units=6, wide=5, blocks=5),
        "sm_100": Budget(75, "UTCHMMA", units=6, wide=5, blocks=6),
        "gfx942": Budget(28, "v_mfma", units=12, wide=3, blocks=4),
    }),
    on_chips("merge, fp32, r=256", "merge_kernel", merge(256, F32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(17.6, "HMMA", units=24, wide=10, blocks=4),
        "sm_90": Budget(52, "HGMMA", units=6, wide=7, blocks=5),
        "sm_100": Budget(75, "UTCHMMA", units=6, wide=7, blocks=5),
        "gfx942": Budget(28, "v_mfma", units=12, wide=4, blocks=4),
    }),
]  # fmt: skip
