"""The configurations of the Triton kernels whose work is on the weight, and the budgets of a
person."""

from lora_kernels.testing.gates import Budget, Change
from tests.gates.calls import BF16, F32, dora, merge, norm, on_chips

GATES = [
    on_chips("dora, bf16, r=8", "dora_kernel", dora(16, 8), Budget(7.1, "HMMA", units=28, wide=8, blocks=4), {
        "sm_90 sm_100": Change(per=8.9, units=24, blocks=3),
        "gfx942": Change(per=13.6, matrix="v_mfma", units=14, wide=7, blocks=3),
    }),
    on_chips("dora, bf16, r=16", "dora_kernel", dora(16, 16), Budget(7.2, "HMMA", units=28, wide=8, blocks=3), {
        "sm_90 sm_100": Change(per=8.9, units=24),
        "gfx942": Change(per=13.6, matrix="v_mfma", units=14, wide=7),
    }),
    on_chips("dora, bf16, r=64", "dora_kernel", dora(16, 64), Budget(4.6, "HMMA", units=64, wide=19, blocks=2), {
        "sm_90 sm_100": Change(per=19.2, units=12, blocks=3),
        "gfx942": Change(per=11.5, matrix="v_mfma", units=20, wide=14),
        "sm_90, triton 3.6.0": Change(spilled=34),
        "sm_100, triton 3.6.0": Change(spilled=42),
    }),
    on_chips("dora, bf16, r=16, 64 tokens", "dora_kernel", dora(64, 16), Budget(8, "HMMA", units=28, wide=17, blocks=2), {
        "sm_90": Change(per=23, matrix="HGMMA", units=9, wide=21, blocks=4),
        "sm_100": Change(per=32, matrix="UTCHMMA", units=9, wide=32, blocks=4),
        "gfx942": Change(per=15.9, matrix="v_mfma", units=14, wide=13),
    }),
    on_chips("dora, fp32, r=16", "dora_kernel", dora(16, 16, F32), Budget(56, "HMMA", units=6, wide=2, blocks=3), {
        "gfx942": Change(per=11.7, matrix="v_mfma", units=24, wide=0, blocks=4),
    }),
    on_chips("norm, bf16, r=8", "norm_kernel", norm(8), Budget(28, "HMMA", units=8, wide=6, blocks=5), {
        "sm_90": Change(per=215, matrix="HGMMA", units=1, wide=7, blocks=4),
        "sm_100": Change(per=230, matrix="UTCHMMA", units=1, wide=12, blocks=4),
        "gfx942": Change(per=61, matrix="v_mfma", units=2),
    }),
    on_chips("norm, bf16, r=16", "norm_kernel", norm(16), Budget(29, "HMMA", units=8, wide=8, blocks=4), {
        "sm_90": Change(per=217, matrix="HGMMA", units=1),
        "sm_100": Change(per=230, matrix="UTCHMMA", units=1, wide=13),
        "gfx942": Change(per=61, matrix="v_mfma", units=2, wide=6, blocks=5),
    }),
    on_chips("norm, bf16, r=32", "norm_kernel", norm(32), Budget(14.7, "HMMA", units=16, wide=12, blocks=3), {
        "sm_90": Change(per=117, matrix="HGMMA", units=2, blocks=4),
        "sm_100": Change(per=123, matrix="UTCHMMA", units=2, wide=18, blocks=4),
        "gfx942": Change(per=36, matrix="v_mfma", units=4, wide=10, blocks=4),
    }),
    on_chips("norm, bf16, r=64", "norm_kernel", norm(64), Budget(9, "HMMA", units=32, wide=20, blocks=2), {
        "sm_90": Change(per=62, matrix="HGMMA", units=4, blocks=4),
        "sm_100": Change(per=68, matrix="UTCHMMA", units=4, wide=28, blocks=4),
        "gfx942": Change(per=22, matrix="v_mfma", units=8, wide=14),
    }),
    on_chips("norm, bf16, r=256", "norm_kernel", norm(256), Budget(6.3, "HMMA", units=32, wide=36, blocks=2), {
        "sm_90": Change(per=36, matrix="HGMMA", units=4),
        "sm_100": Change(per=42, matrix="UTCHMMA", units=4, wide=44),
        "gfx942": Change(per=18.4, matrix="v_mfma", units=8, wide=18),
    }),
    on_chips("norm, fp32, r=16", "norm_kernel", norm(16, F32), Budget(15.3, "HMMA", units=24, wide=9, blocks=3), {
        "sm_90": Change(per=13.9, wide=6, blocks=4),
        "sm_100": Change(per=12.2, wide=6, blocks=4),
        "gfx942": Change(per=21, matrix="v_mfma", units=12, wide=7, blocks=4),
    }),
    on_chips("norm, fp32, r=256", "norm_kernel", norm(256, F32), Budget(18, "HMMA", units=24, wide=16, blocks=3), {
        "sm_90": Change(per=16.2, wide=10, blocks=4),
        "sm_100": Change(per=14.2, wide=10),
        "gfx942": Change(per=28, matrix="v_mfma", units=12, wide=6),
    }),
    on_chips("merge, bf16, r=8", "merge_kernel", merge(8), Budget(12.1, "HMMA", units=8, wide=6, blocks=4), {
        "sm_90": Change(per=112, matrix="HGMMA", units=1, blocks=5),
        "sm_100": Change(per=132, matrix="UTCHMMA", units=1, wide=7, blocks=7),
        "gfx942": Change(per=41, matrix="v_mfma", units=2, wide=2, blocks=7),
    }),
    on_chips("merge, bf16, r=16", "merge_kernel", merge(16), Budget(10.7, "HMMA", units=8, wide=8, blocks=4), {
        "sm_90": Change(per=75, matrix="HGMMA", units=1, blocks=7),
        "sm_100": Change(per=85, matrix="UTCHMMA", units=1, wide=10, blocks=7),
        "gfx942": Change(per=28, matrix="v_mfma", units=2, wide=2, blocks=8),
    }),
    on_chips("merge, bf16, r=32", "merge_kernel", merge(32), Budget(7.2, "HMMA", units=16, wide=12, blocks=3), {
        "sm_90": Change(per=56, matrix="HGMMA", units=2, blocks=6),
        "sm_100": Change(per=57, matrix="UTCHMMA", units=2, wide=16, blocks=7),
        "gfx942": Change(per=21, matrix="v_mfma", units=4, wide=8, blocks=7),
    }),
    *(on_chips(f"merge, bf16, r={r}", "merge_kernel", merge(r), Budget(5.3, "HMMA", units=32, wide=20, blocks=3), {
        "sm_90": Change(per=41, matrix="HGMMA", units=4, blocks=5),
        "sm_100": Change(per=41, matrix="UTCHMMA", units=4, wide=28, blocks=6),
        "gfx942": Change(per=13.6, matrix="v_mfma", units=8, wide=14, blocks=4),
    }) for r in (64, 256)),
    *(on_chips(
        f"merge, bf16, r={r}, float32 adapter", "merge_kernel", merge(r, BF16, F32),
        Budget(17.2, "HMMA", units=24, wide=8, blocks=4), {
            "sm_90": Change(per=52, matrix="HGMMA", units=6, wide=5, blocks=5),
            "sm_100": Change(per=75, matrix="UTCHMMA", units=6, wide=5, blocks=6),
            "gfx942": Change(per=28, matrix="v_mfma", units=12, wide=3),
        }) for r in (16, 256)),
    *(on_chips(f"merge, fp32, r={r}", "merge_kernel", merge(r, F32), Budget(17.6, "HMMA", units=24, wide=10, blocks=4), {
        "sm_90": Change(per=52, matrix="HGMMA", units=6, wide=7, blocks=5),
        "sm_100": Change(per=75, matrix="UTCHMMA", units=6, wide=7, blocks=5),
        "gfx942": Change(per=28, matrix="v_mfma", units=12, wide=4),
    }) for r in (16, 256)),
]  # fmt: skip
