"""The configurations of multi_lora's Triton kernels, and the budgets of a person."""

from lora_kernels.testing.gates import Budget
from tests.gates.calls import F16, F32, multi, on_chips

TWO = {"gfx942": "scalar registers are spilled; two launches are made there"}

GATES = [
    on_chips("multi, shrink, 16 tokens", "multi_shrink_kernel", multi(16), {
        "sm_80 sm_86 sm_89": Budget(17.5, "HMMA", units=4, wide=6, blocks=10),
        "sm_90 sm_100": Budget(14.9, "HMMA", units=4, wide=6, blocks=12),
        "sm_120": Budget(12.9, "HMMA", units=4, wide=6, blocks=11),
        "gfx942": Budget(16.2, "v_mfma", units=4, blocks=8),
    }),
    on_chips("multi, shrink, 512 tokens", "multi_shrink_kernel", multi(512), {
        "sm_80": Budget(12.9, "HMMA", units=8, wide=15, blocks=7),
        "sm_86 sm_89 sm_120": Budget(12.9, "HMMA", units=8, wide=15, blocks=4),
        "sm_90": Budget(26.3, "HGMMA", units=4, wide=15, blocks=7),
        "sm_100": Budget(34.4, "UTCHMMA", units=4, wide=20, blocks=7),
        "gfx942": Budget(21, "v_mfma", units=4, wide=6, blocks=3),
    }),
    on_chips("multi, 16 tokens", "multi_lora_kernel", multi(16), {
        "sm_80 sm_86 sm_89 sm_90": Budget(23.3, "HMMA", units=4, wide=8, blocks=3),
        "sm_100": Budget(13.9, "HMMA", units=8, wide=20, blocks=6),
        "sm_120": Budget(11.2, "HMMA", units=8, wide=20, blocks=4),
        "gfx942": Budget(5.7, "v_mfma", units=16, wide=11, blocks=3),
    }),
    on_chips("multi, 64 tokens", "multi_lora_kernel", multi(64), {
        "sm_80 sm_86 sm_89 sm_120": Budget(12.7, "HMMA", units=32, wide=42, blocks=2, copies=1),
        "sm_90": Budget(101.3, "HGMMA", units=4, wide=42, blocks=3, copies=1),
        "sm_100": Budget(113.9, "UTCHMMA", units=4, wide=70, blocks=3, copies=1),
        "gfx942": Budget(58.6, "v_mfma", units=8, wide=29, blocks=2, copies=1),
    }),
    on_chips("multi, 512 tokens", "multi_lora_kernel", multi(512), {
        "sm_80 sm_86 sm_89 sm_120": Budget(3.3, "HMMA", units=64, wide=25),
        "sm_90": Budget(29.8, "HGMMA", units=4, wide=25),
        "sm_100": Budget(35.1, "UTCHMMA", units=4, wide=65),
        "gfx942": Budget(6, "v_mfma", units=16, wide=20),
    }),
    on_chips("multi, shrink of q, k, v, 16 tokens", "multi_shrink_kernel", multi(16, (4096, 1024, 1024)), {
        "sm_80 sm_86 sm_89 sm_120": Budget(17, "HMMA", units=4, wide=18, blocks=8),
        "sm_90": Budget(14.2, "HMMA", units=4, wide=18, blocks=10),
        "sm_100": Budget(14.7, "HMMA", units=4, wide=18, blocks=9),
        "gfx942": Budget(16.2, "v_mfma", units=4, blocks=8),
    }),
    on_chips("multi, two adapters a token, 64 tokens", "multi_lora_kernel", multi(64, each=2), {
        "sm_80 sm_86 sm_89 sm_120": Budget(12.7, "HMMA", units=8, wide=17, blocks=4),
        "sm_90": Budget(10.5, "HMMA", units=8, wide=17, blocks=5),
        "sm_100": Budget(9.6, "HMMA", units=8, wide=12, blocks=4),
        "gfx942": Budget(21, "v_mfma", units=4, wide=10, blocks=3),
    }),
    on_chips("multi, on a product that is there, 16 tokens", "multi_lora_kernel", multi(16, adds=True), {
        "sm_80": Budget(34.5, "HMMA", units=8, wide=3, blocks=5, copies=2),
        "sm_86 sm_89 sm_90 sm_100": Budget(46, "HMMA", units=4, wide=1, blocks=4, copies=2),
        "sm_120": Budget(43.5, "HMMA", units=4, wide=1, blocks=3, copies=2),
        "gfx942": Budget(56.1, "v_mfma", units=4, wide=3, blocks=8, copies=2),
    }),
    on_chips("multi, on a product that is there, 512 tokens", "multi_lora_kernel", multi(512, adds=True), {
        "sm_80": Budget(7, "HMMA", units=32, wide=3),
        "sm_86 sm_89 sm_90 sm_100 sm_120": Budget(9.9, "HMMA", units=64, wide=12, blocks=4),
        "gfx942": Budget(46.6, "v_mfma", units=8, wide=9, blocks=2),
    }),
    on_chips("multi, fp32, 16 tokens", "multi_lora_kernel", multi(16, dtype=F32), {
        "sm_80 sm_100": Budget(73.4, units=3, wide=12, blocks=3),
        "sm_86 sm_89": Budget(75.1, units=3, wide=12, blocks=4),
        "sm_90 sm_120": Budget(70.7, units=2, wide=6, blocks=2),
        "gfx942": Budget(43.7, "v_mfma", units=4, wide=9, blocks=6, copies=2),
    }),
    on_chips("multi, fp32, 64 tokens", "multi_lora_kernel", multi(64, dtype=F32), {
        "sm_80 sm_120": Budget(176.8, units=2, wide=18),
        "sm_86 sm_89": Budget(167.5, units=4, wide=33, blocks=3),
        "sm_90": Budget(168.7, units=4, wide=33, blocks=2),
        "sm_100": Budget(123.9, units=3, wide=13, blocks=3),
        "gfx942": Budget(24.5, "v_mfma", units=8, wide=16, blocks=2, copies=2),
    }),
    on_chips("multi, f16, 512 tokens", "multi_lora_kernel", multi(512, dtype=F16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.1, "HMMA", units=32, wide=25, blocks=2),
        "sm_90": Budget(29.1, "HGMMA", units=4, wide=25, blocks=3),
        "sm_100": Budget(34.1, "UTCHMMA", units=4, wide=53, blocks=3),
        "gfx942": Budget(14.4, "v_mfma", units=8, wide=20, blocks=2),
    }),
    on_chips("multi, one launch, 16 tokens", "multi_small_kernel", multi(16, most=64), {
        "sm_80": Budget(8.4, "HMMA", units=16, wide=52, blocks=7),
        "sm_86 sm_89": Budget(8.4, "HMMA", units=16, wide=52, blocks=4),
        "sm_90 sm_100": Budget(7.4, "HMMA", units=16, wide=52, blocks=8),
        "sm_120": Budget(16.1, "HMMA", units=4, wide=8, blocks=4),
    }, without=TWO),
    on_chips("multi, one launch, 32 tokens", "multi_small_kernel", multi(32, most=64), {
        "sm_80 sm_86 sm_89": Budget(31, "HMMA", units=16, wide=34, blocks=3, copies=2),
        "sm_90 sm_100": Budget(9.6, "HMMA", units=8, wide=13, blocks=2),
        "sm_120": Budget(15.1, "HMMA", units=16, wide=34, blocks=4, copies=1),
    }, without=TWO),
    on_chips("multi, one launch, 64 tokens", "multi_small_kernel", multi(64, most=64), {
        "sm_80 sm_86 sm_89 sm_120": Budget(14.5, "HMMA", units=32, wide=48, blocks=2, copies=1),
        "sm_90": Budget(100.6, "HGMMA", units=4, wide=48, blocks=3, copies=1),
        "sm_100": Budget(114.1, "UTCHMMA", units=4, wide=76, blocks=4, copies=1),
    }, without=TWO),
    on_chips("multi, one launch, f16, 16 tokens", "multi_small_kernel", multi(16, dtype=F16, most=64), {
        "sm_80": Budget(12.9, "HMMA", units=8, wide=26, blocks=5),
        "sm_86 sm_89": Budget(8.6, "HMMA", units=16, wide=52, blocks=4),
        "sm_90": Budget(7.6, "HMMA", units=16, wide=52, blocks=10),
        "sm_100": Budget(9.9, "HMMA", units=16, wide=52, blocks=8),
        "sm_120": Budget(32, "HMMA", units=12, wide=27, blocks=4, copies=2),
    }, without=TWO),
    on_chips("multi, one launch, fp32, 16 tokens", "multi_small_kernel", multi(16, dtype=F32, most=64), {
        "sm_80 sm_86 sm_89": Budget(12.5, units=33, wide=39, blocks=6),
        "sm_90 sm_100 sm_120": Budget(77, units=5, wide=39, blocks=4),
    }, without=TWO),
    on_chips("multi, one launch, fp32, 64 tokens", "multi_small_kernel", multi(64, dtype=F32, most=64), {
        "sm_80": Budget(11.9, units=33, wide=18, blocks=2),
        "sm_86 sm_89": Budget(12.5, units=60, wide=39, blocks=3),
        "sm_90 sm_120": Budget(169.5, units=4, wide=39, blocks=3),
        "sm_100": Budget(121.3, units=3, wide=23, blocks=3),
    }, without=TWO),
    on_chips("multi, one launch, two adapters a token, 16 tokens", "multi_small_kernel", multi(16, each=2, most=64), {
        "sm_80 sm_86 sm_89": Budget(12.9, "HMMA", units=8, wide=27, blocks=4),
        "sm_90 sm_100 sm_120": Budget(10.7, "HMMA", units=8, wide=20, blocks=4),
    }, without=TWO),
    on_chips(
        "multi, one launch, two adapters a token, fp32, 16 tokens", "multi_small_kernel", multi(16, each=2, dtype=F32, most=64),
        {
            "sm_80 sm_86 sm_89": Budget(21.7, units=41, wide=20, blocks=3),
            "sm_90 sm_100 sm_120": Budget(68.6, units=2, wide=7, blocks=2),
        }, without=TWO,
    ),
]
