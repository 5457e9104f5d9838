"""The configurations of multi_lora's Triton kernels, and the budgets of a person."""

from lora_kernels.testing.gates import Budget, Change
from tests.gates.calls import BF16, F16, F32, WIDE, multi, on_chips

QKV = (4096, 1024, 1024)
TWO = {"gfx942": "scalar registers are spilled; h has its own launch there"}

GATES = [
    *(on_chips(
        f"multi, shrink{of}, 16 tokens", "multi_shrink_kernel", multi(16, outs),
        Budget(17.8, "HMMA", units=4, wide=6, blocks=10), {
            "sm_90 sm_100": Change(per=15.2, blocks=12),
            "sm_120": Change(per=12.9, blocks=11),
            "gfx942": Change(per=16.5, matrix="v_mfma", wide=0, blocks=8),
        }) for of, outs in (("", (WIDE,)), (" of q, k, v", QKV))),
    on_chips("multi, shrink, 512 tokens", "multi_shrink_kernel", multi(512), Budget(13.2, "HMMA", units=8, wide=15, blocks=4), {
        "sm_90": Change(per=27.3, matrix="HGMMA", units=4, blocks=7),
        "sm_100": Change(per=35.1, matrix="UTCHMMA", units=4, wide=20, blocks=7),
        "sm_120": Change(per=10.1),
        "gfx942": Change(per=21.4, matrix="v_mfma", units=4, wide=6, blocks=3),
    }),
    on_chips("multi, 16 tokens", "multi_lora_kernel", multi(16), Budget(12.9, "HMMA", units=8, wide=20, blocks=4), {
        "sm_90 sm_100 sm_120": Change(per=10.9),
        "gfx942": Change(per=5.8, matrix="v_mfma", units=16, wide=11, blocks=3),
    }),
    on_chips("multi, 64 tokens", "multi_lora_kernel", multi(64), Budget(5.2, "HMMA", units=32, wide=41, blocks=2), {
        "sm_90": Change(per=29.7, matrix="HGMMA", units=4),
        "sm_100": Change(per=34.8, matrix="UTCHMMA", units=4, wide=69),
        "sm_120": Change(per=4.1),
        "gfx942": Change(per=14.7, matrix="v_mfma", units=8, wide=28),
    }),
    on_chips("multi, 512 tokens", "multi_lora_kernel", multi(512), Budget(3.4, "HMMA", units=64, wide=25), {
        "sm_90": Change(per=30.4, matrix="HGMMA", units=4),
        "sm_100": Change(per=34.8, matrix="UTCHMMA", units=4, wide=65),
        "sm_120": Change(per=2.7),
        "gfx942": Change(per=6.1, matrix="v_mfma", units=16, wide=20),
    }),
    on_chips("multi, q, k, v, 512 tokens", "multi_lora_kernel", multi(512, QKV), Budget(3.4, "HMMA", units=64, wide=25), {
        "sm_90": Change(per=31.5, matrix="HGMMA", units=4),
        "sm_100": Change(per=44.3, matrix="UTCHMMA", units=4, wide=77, blocks=2),
        "sm_120": Change(per=2.7),
        "gfx942": Change(per=6.1, matrix="v_mfma", units=16, wide=20),
        "sm_100, triton 3.6.0": Change(spilled=7),
    }),
    on_chips(
        "multi, two adapters a token, 64 tokens", "multi_lora_kernel", multi(64, each=2),
        Budget(12.4, "HMMA", units=8, wide=17, blocks=3), {
            "sm_90 sm_100": Change(per=10.7, wide=12, blocks=4),
            "sm_120": Change(per=9.4, blocks=4),
            "gfx942": Change(per=21.4, matrix="v_mfma", units=4, wide=10),
        }),
    on_chips(
        "multi, on a product that is there, 16 tokens", "multi_lora_kernel", multi(16, adds=True),
        Budget(35.6, "HMMA", units=8, wide=3, blocks=4, copies=2), {
            "gfx942": Change(per=57.2, matrix="v_mfma", units=4, blocks=8),
        }),
    on_chips(
        "multi, on a product that is there, 512 tokens", "multi_lora_kernel", multi(512, adds=True),
        Budget(7.1, "HMMA", units=32, wide=3), {
            "sm_86 sm_89 sm_90 sm_100 sm_120": Change(per=10, units=64, wide=12, blocks=4),
            "gfx942": Change(per=47.4, matrix="v_mfma", units=8, wide=9, blocks=2),
        }),
    on_chips("multi, fp32, 16 tokens", "multi_lora_kernel", multi(16, dtype=F32), Budget(74.9, units=3, wide=12, blocks=2), {
        "gfx942": Change(per=44.6, matrix="v_mfma", units=4, wide=9, blocks=6, copies=2),
    }),
    on_chips("multi, fp32, 64 tokens", "multi_lora_kernel", multi(64, dtype=F32), Budget(180.3, units=2, wide=18), {
        "gfx942": Change(per=25, matrix="v_mfma", units=8, wide=16, blocks=2, copies=2),
    }),
    on_chips(
        "multi, f16, 512 tokens", "multi_lora_kernel", multi(512, dtype=F16),
        Budget(5.2, "HMMA", units=32, wide=25, blocks=2), {
            "sm_90": Change(per=29.7, matrix="HGMMA", units=4, blocks=3),
            "sm_100": Change(per=34.8, matrix="UTCHMMA", units=4, wide=53),
            "sm_120": Change(per=4.1),
            "gfx942": Change(per=14.7, matrix="v_mfma", units=8, wide=20),
        }),
    *(on_chips(
        f"multi, one launch{of}, 16 tokens", "multi_small_kernel", multi(16, dtype=dtype, most=64),
        Budget(12.8, "HMMA", units=8, wide=26, blocks=4), {
            "sm_90 sm_100 sm_120": Change(per=10.7),
        }, without=TWO) for of, dtype in (("", BF16), (", f16", F16))),
    on_chips(
        "multi, one launch, 32 tokens", "multi_small_kernel", multi(32, most=64),
        Budget(7.8, "HMMA", units=16, wide=33, blocks=4), {
            "sm_90 sm_100 sm_120": Change(per=6.6),
        }, without=TWO),
    on_chips(
        "multi, one launch, 64 tokens", "multi_small_kernel", multi(64, most=64),
        Budget(5.1, "HMMA", units=32, wide=47, blocks=2), {
            "sm_90": Change(per=29.7, matrix="HGMMA", units=4),
            "sm_100": Change(per=34.8, matrix="UTCHMMA", units=4, wide=75),
            "sm_120": Change(per=4.1),
        }, without=TWO),
    on_chips(
        "multi, one launch, fp32, 16 tokens", "multi_small_kernel", multi(16, dtype=F32, most=64),
        Budget(18.8, units=28, wide=18, blocks=3), {
            "sm_90 sm_100 sm_120": Change(per=74.2, units=3),
        }, without=TWO),
    on_chips(
        "multi, one launch, fp32, 64 tokens", "multi_small_kernel", multi(64, dtype=F32, most=64),
        Budget(11.4, units=34, wide=18), {
            "sm_90 sm_100 sm_120": Change(per=179.8, units=2),
        }, without=TWO),
    on_chips(
        "multi, one launch, two adapters a token, 16 tokens", "multi_small_kernel", multi(16, each=2, most=64),
        Budget(12.8, "HMMA", units=8, wide=27, blocks=3), {
            "sm_90 sm_100 sm_120": Change(per=10.6, wide=20),
        }, without=TWO),
    on_chips(
        "multi, one launch, two adapters a token, fp32, 16 tokens", "multi_small_kernel", multi(16, each=2, dtype=F32, most=64),
        Budget(17.7, units=42, wide=20, blocks=2), {
            "sm_90 sm_100 sm_120": Change(per=74.2, units=3),
        }, without=TWO),
    on_chips(
        "multi, one launch, q, k, v, 16 tokens", "multi_small_kernel", multi(16, QKV, most=64),
        Budget(13.1, "HMMA", units=8, wide=24, blocks=3), {
            "sm_90 sm_100": Change(per=11.1, blocks=4),
            "sm_120": Change(per=9.6, blocks=4),
        }, without=TWO),
    on_chips(
        "multi, one launch, q, k, v, 64 tokens", "multi_small_kernel", multi(64, QKV, most=64),
        Budget(5.2, "HMMA", units=32, wide=39, blocks=2), {
            "sm_90": Change(per=30.7, matrix="HGMMA", units=4),
            "sm_100": Change(per=34.8, matrix="UTCHMMA", units=4, wide=67),
            "sm_120": Change(per=4.1),
        }, without=TWO),
    on_chips(
        "multi, one launch, q, k, v, fp32, 64 tokens", "multi_small_kernel", multi(64, QKV, dtype=F32, most=64),
        Budget(13.4, units=30, wide=14), {
            "sm_90 sm_100 sm_120": Change(per=180.8, units=2),
        }, without=TWO),
    on_chips(
        "multi, one launch, q, k, v, two adapters a token, fp32, 16 tokens", "multi_small_kernel",
        multi(16, QKV, 2, dtype=F32, most=64),
        Budget(20.2, units=40, wide=18, blocks=2), {
            "sm_90 sm_100 sm_120": Change(per=74.9, units=3),
        }, without=TWO),
]  # fmt: skip
