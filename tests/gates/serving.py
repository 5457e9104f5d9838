"""The configurations of multi_lora's Triton kernels, and the budgets of a person."""

from lora_kernels.testing.gates import Budget
from tests.gates.calls import F16, F32, multi, on_chips

QKV = (4096, 1024, 1024)
TWO = {"gfx942": "scalar registers are spilled; h has its own launch there"}

GATES = [
    on_chips("multi, shrink, 16 tokens", "multi_shrink_kernel", multi(16), {
        "sm_80 sm_86 sm_89": Budget(17.8, "HMMA", units=4, wide=6, blocks=10),
        "sm_90 sm_100": Budget(15.2, "HMMA", units=4, wide=6, blocks=12),
        "sm_120": Budget(12.9, "HMMA", units=4, wide=6, blocks=11),
        "gfx942": Budget(16.5, "v_mfma", units=4, blocks=8),
    }),
    on_chips("multi, shrink, 512 tokens", "multi_shrink_kernel", multi(512), {
        "sm_80 sm_86 sm_89": Budget(13.2, "HMMA", units=8, wide=15, blocks=4),
        "sm_90": Budget(27.3, "HGMMA", units=4, wide=15, blocks=7),
        "sm_100": Budget(35.1, "UTCHMMA", units=4, wide=20, blocks=7),
        "sm_120": Budget(10.1, "HMMA", units=8, wide=15, blocks=4),
        "gfx942": Budget(21.4, "v_mfma", units=4, wide=6, blocks=3),
    }),
    on_chips("multi, shrink of q, k, v, 16 tokens", "multi_shrink_kernel", multi(16, QKV), {
        "sm_80 sm_86 sm_89": Budget(17.8, "HMMA", units=4, wide=6, blocks=10),
        "sm_90 sm_100": Budget(15.2, "HMMA", units=4, wide=6, blocks=12),
        "sm_120": Budget(12.9, "HMMA", units=4, wide=6, blocks=11),
        "gfx942": Budget(16.5, "v_mfma", units=4, blocks=8),
    }),
    on_chips("multi, 16 tokens", "multi_lora_kernel", multi(16), {
        "sm_80 sm_86 sm_89": Budget(12.9, "HMMA", units=8, wide=20, blocks=4),
        "sm_90 sm_100 sm_120": Budget(10.9, "HMMA", units=8, wide=20, blocks=4),
        "gfx942": Budget(5.8, "v_mfma", units=16, wide=11, blocks=3),
    }),
    on_chips("multi, 64 tokens", "multi_lora_kernel", multi(64), {
        "sm_80 sm_86 sm_89": Budget(5.2, "HMMA", units=32, wide=41, blocks=2),
        "sm_90": Budget(29.7, "HGMMA", units=4, wide=41, blocks=2),
        "sm_100": Budget(34.8, "UTCHMMA", units=4, wide=69, blocks=2),
        "sm_120": Budget(4.1, "HMMA", units=32, wide=41, blocks=2),
        "gfx942": Budget(14.7, "v_mfma", units=8, wide=28, blocks=2),
    }),
    on_chips("multi, 512 tokens", "multi_lora_kernel", multi(512), {
        "sm_80 sm_86 sm_89": Budget(3.4, "HMMA", units=64, wide=25),
        "sm_90": Budget(30.4, "HGMMA", units=4, wide=25),
        "sm_100": Budget(34.8, "UTCHMMA", units=4, wide=65),
        "sm_120": Budget(2.7, "HMMA", units=64, wide=25),
        "gfx942": Budget(6.1, "v_mfma", units=16, wide=20),
    }),
    on_chips("multi, q, k, v, 512 tokens", "multi_lora_kernel", multi(512, QKV), {
        "sm_80 sm_86 sm_89": Budget(3.4, "HMMA", units=64, wide=25),
        "sm_90": Budget(31.5, "HGMMA", units=4, wide=25),
        "sm_100": Budget(44.3, "UTCHMMA", units=4, wide=77, blocks=2),
        "sm_120": Budget(2.7, "HMMA", units=64, wide=25),
        "gfx942": Budget(6.1, "v_mfma", units=16, wide=20),
    }, spilled={"sm_100, triton 3.6.0": 7}),
    on_chips("multi, two adapters a token, 64 tokens", "multi_lora_kernel", multi(64, each=2), {
        "sm_80 sm_86 sm_89": Budget(12.4, "HMMA", units=8, wide=17, blocks=3),
        "sm_90 sm_100": Budget(10.7, "HMMA", units=8, wide=12, blocks=4),
        "sm_120": Budget(9.4, "HMMA", units=8, wide=17, blocks=4),
        "gfx942": Budget(21.4, "v_mfma", units=4, wide=10, blocks=3),
    }),
    on_chips("multi, on a product that is there, 16 tokens", "multi_lora_kernel", multi(16, adds=True), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(35.6, "HMMA", units=8, wide=3, blocks=4, copies=2),
        "gfx942": Budget(57.2, "v_mfma", units=4, wide=3, blocks=8, copies=2),
    }),
    on_chips("multi, on a product that is there, 512 tokens", "multi_lora_kernel", multi(512, adds=True), {
        "sm_80": Budget(7.1, "HMMA", units=32, wide=3),
        "sm_86 sm_89 sm_90 sm_100 sm_120": Budget(10, "HMMA", units=64, wide=12, blocks=4),
        "gfx942": Budget(47.4, "v_mfma", units=8, wide=9, blocks=2),
    }),
    on_chips("multi, fp32, 16 tokens", "multi_lora_kernel", multi(16, dtype=F32), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(74.9, units=3, wide=12, blocks=2),
        "gfx942": Budget(44.6, "v_mfma", units=4, wide=9, blocks=6, copies=2),
    }),
    on_chips("multi, fp32, 64 tokens", "multi_lora_kernel", multi(64, dtype=F32), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(180.3, units=2, wide=18),
        "gfx942": Budget(25, "v_mfma", units=8, wide=16, blocks=2, copies=2),
    }),
    on_chips("multi, f16, 512 tokens", "multi_lora_kernel", multi(512, dtype=F16), {
        "sm_80 sm_86 sm_89": Budget(5.2, "HMMA", units=32, wide=25, blocks=2),
        "sm_90": Budget(29.7, "HGMMA", units=4, wide=25, blocks=3),
        "sm_100": Budget(34.8, "UTCHMMA", units=4, wide=53, blocks=2),
        "sm_120": Budget(4.1, "HMMA", units=32, wide=25, blocks=2),
        "gfx942": Budget(14.7, "v_mfma", units=8, wide=20, blocks=2),
    }),
    on_chips("multi, one launch, 16 tokens", "multi_small_kernel", multi(16, most=64), {
        "sm_80 sm_86 sm_89": Budget(12.8, "HMMA", units=8, wide=26, blocks=4),
        "sm_90 sm_100 sm_120": Budget(10.7, "HMMA", units=8, wide=26, blocks=4),
    }, without=TWO),
    on_chips("multi, one launch, 32 tokens", "multi_small_kernel", multi(32, most=64), {
        "sm_80 sm_86 sm_89": Budget(7.8, "HMMA", units=16, wide=33, blocks=4),
        "sm_90 sm_100 sm_120": Budget(6.6, "HMMA", units=16, wide=33, blocks=4),
    }, without=TWO),
    on_chips("multi, one launch, 64 tokens", "multi_small_kernel", multi(64, most=64), {
        "sm_80 sm_86 sm_89": Budget(5.1, "HMMA", units=32, wide=47, blocks=2),
        "sm_90": Budget(29.7, "HGMMA", units=4, wide=47, blocks=2),
        "sm_100": Budget(34.8, "UTCHMMA", units=4, wide=75, blocks=2),
        "sm_120": Budget(4.1, "HMMA", units=32, wide=47, blocks=2),
    }, without=TWO),
    on_chips("multi, one launch, f16, 16 tokens", "multi_small_kernel", multi(16, dtype=F16, most=64), {
        "sm_80 sm_86 sm_89": Budget(12.8, "HMMA", units=8, wide=26, blocks=4),
        "sm_90 sm_100 sm_120": Budget(10.7, "HMMA", units=8, wide=26, blocks=4),
    }, without=TWO),
    on_chips("multi, one launch, fp32, 16 tokens", "multi_small_kernel", multi(16, dtype=F32, most=64), {
        "sm_80 sm_86 sm_89": Budget(18.8, units=28, wide=18, blocks=3),
        "sm_90 sm_100 sm_120": Budget(74.2, units=3, wide=18, blocks=3),
    }, without=TWO),
    on_chips("multi, one launch, fp32, 64 tokens", "multi_small_kernel", multi(64, dtype=F32, most=64), {
        "sm_80 sm_86 sm_89": Budget(11.4, units=34, wide=18),
        "sm_90 sm_100 sm_120": Budget(179.8, units=2, wide=18),
    }, without=TWO),
    on_chips("multi, one launch, two adapters a token, 16 tokens", "multi_small_kernel", multi(16, each=2, most=64), {
        "sm_80 sm_86 sm_89": Budget(12.8, "HMMA", units=8, wide=27, blocks=3),
        "sm_90 sm_100 sm_120": Budget(10.6, "HMMA", units=8, wide=20, blocks=3),
    }, without=TWO),
    on_chips(
        "multi, one launch, two adapters a token, fp32, 16 tokens", "multi_small_kernel",
        multi(16, each=2, dtype=F32, most=64),
        {
            "sm_80 sm_86 sm_89": Budget(17.7, units=42, wide=20, blocks=2),
            "sm_90 sm_100 sm_120": Budget(74.2, units=3, wide=20, blocks=2),
        }, without=TWO,
    ),
    on_chips("multi, one launch, q, k, v, 16 tokens", "multi_small_kernel", multi(16, QKV, most=64), {
        "sm_80 sm_86 sm_89": Budget(13.1, "HMMA", units=8, wide=24, blocks=3),
        "sm_90 sm_100": Budget(11.1, "HMMA", units=8, wide=24, blocks=4),
        "sm_120": Budget(9.6, "HMMA", units=8, wide=24, blocks=4),
    }, without=TWO),
    on_chips("multi, one launch, q, k, v, 64 tokens", "multi_small_kernel", multi(64, QKV, most=64), {
        "sm_80 sm_86 sm_89": Budget(5.2, "HMMA", units=32, wide=39, blocks=2),
        "sm_90": Budget(30.7, "HGMMA", units=4, wide=39, blocks=2),
        "sm_100": Budget(34.8, "UTCHMMA", units=4, wide=67, blocks=2),
        "sm_120": Budget(4.1, "HMMA", units=32, wide=39, blocks=2),
    }, without=TWO),
    on_chips("multi, one launch, q, k, v, fp32, 64 tokens", "multi_small_kernel", multi(64, QKV, dtype=F32, most=64), {
        "sm_80 sm_86 sm_89": Budget(13.4, units=30, wide=14),
        "sm_90 sm_100 sm_120": Budget(180.8, units=2, wide=14),
    }, without=TWO),
    on_chips(
        "multi, one launch, q, k, v, two adapters a token, fp32, 16 tokens", "multi_small_kernel",
        multi(16, QKV, 2, dtype=F32, most=64),
        {
            "sm_80 sm_86 sm_89": Budget(20.2, units=40, wide=18, blocks=2),
            "sm_90 sm_100 sm_120": Budget(74.9, units=3, wide=18, blocks=2),
        }, without=TWO,
    ),
]
