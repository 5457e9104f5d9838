"""The configurations of lora_linear's Triton kernels, and the budgets of a person."""

from lora_kernels.testing.gates import Budget, Change
from tests.gates.calls import DROPPED, DROPPED_F16, F16, F32, LORA_ONLY, group, linear, on_chips

GATES = [
    on_chips("forward, bf16, r=8", "forward_kernel", linear(8192, 8), Budget(3.4, "HMMA", units=64, wide=24), {
        "sm_120": Change(per=2.3, wide=6),
        "sm_90": Change(per=23, matrix="HGMMA", units=4, wide=6),
        "sm_100": Change(per=26.3, matrix="UTCHMMA", units=4, wide=6),
        "gfx942": Change(per=6.2, matrix="v_mfma", units=16, wide=12, blocks=2),
    }),
    *(on_chips(f"forward, bf16, r={r}", "forward_kernel", linear(8192, r), Budget(3.4, "HMMA", units=64, wide=33), {
        "sm_120": Change(per=2.3, wide=15),
        "sm_90": Change(per=23, matrix="HGMMA", units=4, wide=9, blocks=2),
        "sm_100": Change(per=27, matrix="UTCHMMA", units=4, wide=9),
        "gfx942": Change(per=6.4, matrix="v_mfma", units=16, wide=14, blocks=2),
    }) for r in (16, 64, 256)),
    on_chips(
        "forward, bf16, r=16, 16 tokens", "forward_kernel", linear(16, 16),
        Budget(4.4, "HMMA", units=40, wide=17, blocks=4), {
            "gfx942": Change(per=10.6, matrix="v_mfma", units=8, wide=8, blocks=5),
        }),
    on_chips(
        "forward, bf16, r=64, 16 tokens", "forward_kernel", linear(16, 64),
        Budget(9.4, "HMMA", units=16, wide=30, blocks=2), {
            "gfx942": Change(per=12.5, matrix="v_mfma", units=8, wide=18, blocks=3),
        }),
    on_chips(
        "forward, bf16, r=16, dropout, 64 tokens", "forward_kernel", linear(64, 16, dropout=0.1),
        Budget(21, "HMMA", units=40, wide=48, blocks=2), {
            "sm_90": Change(per=12.2, wide=22, blocks=3),
            "sm_100": Change(per=99, matrix="UTCHMMA", units=8, blocks=4),
            "gfx942": Change(per=42, matrix="v_mfma", units=12, wide=18, blocks=3),
            "sm_100, triton 3.7.1": Change(spilled=4),
        }),
    on_chips(
        "forward, bf16, r=16, dropped base", "forward_kernel", linear(8192, 16, gain=True, dropout=0.1),
        Budget(16.6, "HMMA", units=64, wide=33, blocks=2), {
            "sm_90": Change(per=107, matrix="HGMMA", units=8, wide=11, blocks=3),
            "sm_100": Change(per=104, matrix="UTCHMMA", units=8, wide=35, blocks=3),
            "gfx942": Change(per=33, matrix="v_mfma", units=16, wide=15, blocks=3),
        }),
    on_chips("forward, bf16, r=16, group", "forward_kernel", group(8192, 16), Budget(3.6, "HMMA", units=64, wide=99), {
        "sm_120": Change(per=2.3, wide=45),
        "sm_90": Change(per=23, matrix="HGMMA", units=4, wide=27, blocks=2),
        "sm_100": Change(per=35, matrix="UTCHMMA", units=4, wide=81),
        "gfx942": Change(per=6.2, matrix="v_mfma", units=16, wide=42),
        "sm_90, triton 3.9.0": Change(spilled=6),
        "sm_90, triton 3.8.0, ptxas 13.3": Change(spilled=6),
    }),
    on_chips("forward, fp16, r=16", "forward_kernel", linear(8192, 16, F16), Budget(3.5, "HMMA", units=64, wide=33), {
        "sm_120": Change(per=2.3, wide=15),
        "sm_90": Change(per=23, matrix="HGMMA", units=4, wide=9),
        "sm_100": Change(per=27, matrix="UTCHMMA", units=4, wide=9),
        "gfx942": Change(per=6.4, matrix="v_mfma", units=16, wide=14, blocks=2),
    }),
    on_chips("forward, fp32, r=16", "forward_kernel", linear(8192, 16, F32), Budget(185, units=2, wide=12, blocks=2), {
        "gfx942": Change(per=10.2, matrix="v_mfma", units=8, wide=0),
    }),
    on_chips("dx, bf16, r=8", "input_gradient_kernel", linear(8192, 8), Budget(6.2, "HMMA", units=32, wide=36), {
        "sm_90": Change(per=23, matrix="HGMMA", units=4, wide=23),
        "sm_100": Change(per=28, matrix="UTCHMMA", units=4, wide=23),
        "gfx942": Change(per=47, matrix="v_mfma", units=8, wide=8),
    }),
    *(on_chips(f"dx, bf16, r={r}", "input_gradient_kernel", linear(8192, r), Budget(4.9, "HMMA", units=32, wide=44), {
        "sm_90": Change(per=23, matrix="HGMMA", units=4, wide=25, blocks=2),
        "sm_100": Change(per=27.1, matrix="UTCHMMA", units=4, wide=25),
        "gfx942": Change(per=45, matrix="v_mfma", units=8, wide=9),
    }) for r in (16, 64, 256)),
    on_chips("dx, bf16, r=16, gain, dropout", "input_gradient_kernel", LORA_ONLY, Budget(10.6, "HMMA", units=32, wide=53), {
        "sm_90": Change(per=72, matrix="HGMMA", units=4, wide=38),
        "sm_100": Change(per=68, matrix="UTCHMMA", units=4, wide=52),
        "gfx942": Change(per=49, matrix="v_mfma", units=8, wide=17),
    }),
    on_chips(
        "dx, bf16, r=16, dropped base", "input_gradient_kernel", linear(8192, 16, gain=True, dropout=0.1),
        Budget(5.6, "HMMA", units=64, wide=81, blocks=2), {
            "sm_90": Change(per=44, matrix="HGMMA", units=8, wide=61, blocks=3),
            "sm_100": Change(per=41, matrix="UTCHMMA", units=8, wide=75),
            "gfx942": Change(per=26, matrix="v_mfma", units=16, wide=36),
        }),
    on_chips("dx, bf16, r=16, group", "input_gradient_kernel", group(8192, 16), Budget(5.4, "HMMA", units=32, wide=132), {
        "sm_90": Change(per=23, matrix="HGMMA", units=4, wide=75),
        "sm_100": Change(per=28, matrix="UTCHMMA", units=4, wide=75),
        "gfx942": Change(per=45, matrix="v_mfma", units=8, wide=27),
    }),
    on_chips(
        "dx, bf16, r=16, 16 tokens", "input_gradient_kernel", linear(16, 16),
        Budget(17.6, "HMMA", units=8, wide=16, blocks=4), {
            "gfx942": Change(per=19.8, matrix="v_mfma", units=4, wide=8, blocks=6),
        }),
    on_chips(
        "dx, fp16, r=16, gain", "input_gradient_kernel", linear(8192, 16, F16, gain=True),
        Budget(15.7, "HMMA", units=48, wide=31), {
            "sm_120": Change(per=22, units=24, wide=62, blocks=5),
            "sm_90": Change(per=39, matrix="HGMMA", units=10, wide=30, blocks=2),
            "sm_100": Change(per=57, matrix="UTCHMMA", units=6, wide=30, blocks=2),
            "gfx942": Change(per=28, matrix="v_mfma", units=12, wide=2, blocks=2),
        }),
    on_chips(
        "dx, fp16, r=16, dropped base", "input_gradient_kernel", DROPPED_F16,
        Budget(16.3, "HMMA", units=32, wide=58, blocks=3), {
            "gfx942": Change(per=18.2, matrix="v_mfma", wide=19, blocks=2),
        }),
    on_chips("dx, fp32, r=16", "input_gradient_kernel", linear(8192, 16, F32), Budget(184, units=2, wide=24), {
        "gfx942": Change(per=8.5, matrix="v_mfma", units=8, wide=0, blocks=3),
    }),
    on_chips("shrink, bf16, r=8", "shrink_kernel", linear(8192, 8), Budget(13.8, "HMMA", units=8, wide=15, blocks=4), {
        "sm_90": Change(per=30, matrix="HGMMA", units=4, blocks=7),
        "sm_100": Change(per=31, matrix="UTCHMMA", units=4, wide=20, blocks=7),
        "gfx942": Change(per=22, matrix="v_mfma", units=4, wide=6, blocks=3),
    }),
    on_chips("shrink, bf16, r=16", "shrink_kernel", linear(8192, 16), Budget(13.8, "HMMA", units=8, wide=15, blocks=4), {
        "sm_90": Change(per=30, matrix="HGMMA", units=4, blocks=7),
        "sm_100": Change(per=32, matrix="UTCHMMA", units=4, wide=20, blocks=7),
        "gfx942": Change(per=22, matrix="v_mfma", units=4, wide=6, blocks=3),
    }),
    on_chips("shrink, bf16, r=32", "shrink_kernel", linear(8192, 32), Budget(7.3, "HMMA", units=16, wide=12, blocks=6), {
        "sm_90": Change(per=34, matrix="HGMMA", units=4, blocks=9),
        "sm_100": Change(per=32, matrix="UTCHMMA", units=4, wide=18, blocks=9),
        "gfx942": Change(per=9.8, matrix="v_mfma", units=8, wide=9, blocks=5),
    }),
    *(on_chips(f"shrink, bf16, r={r}", "shrink_kernel", linear(8192, r), Budget(5.8, "HMMA", units=32, wide=24, blocks=3), {
        "sm_90": Change(per=37, matrix="HGMMA", units=4, blocks=4),
        "sm_100": Change(per=38, matrix="UTCHMMA", units=4, wide=32, blocks=4),
        "gfx942": Change(per=14.9, matrix="v_mfma", units=8, wide=12, blocks=2),
    }) for r in (64, 128, 256)),
    on_chips(
        "shrink, bf16, r=16, dropout", "shrink_kernel", linear(8192, 16, dropout=0.1),
        Budget(89, "HMMA", units=8, wide=15, blocks=3), {
            "sm_90": Change(per=81.6, units=16, wide=30, blocks=6),
            "sm_100": Change(per=180, matrix="UTCHMMA", units=4, wide=20, blocks=7),
            "gfx942": Change(per=116, matrix="v_mfma", units=4, wide=6, blocks=4),
        }),
    on_chips(
        "shrink, bf16, r=32, dropout", "shrink_kernel", linear(8192, 32, dropout=0.1),
        Budget(48, "HMMA", units=16, wide=12, blocks=3), {
            "sm_90": Change(per=44.3, units=32, wide=24, blocks=4),
            "sm_100": Change(per=180, matrix="UTCHMMA", units=4, wide=18, blocks=8),
            "gfx942": Change(per=57, matrix="v_mfma", units=8, wide=6),
            "sm_90, triton 3.8.0, ptxas 13.3": Change(spilled=10),
        }),
    on_chips("shrink, bf16, r=16, group", "shrink_kernel", group(8192, 16), Budget(6.9, "HMMA", units=24, wide=21, blocks=3), {
        "sm_90": Change(per=15.4, matrix="HGMMA", units=12, blocks=5),
        "sm_100": Change(per=18.8, matrix="UTCHMMA", units=12, wide=28, blocks=5),
        "gfx942": Change(per=12.1, matrix="v_mfma", units=12, wide=6, blocks=2),
    }),
    on_chips("shrink, fp32, r=16", "shrink_kernel", linear(8192, 16, F32), Budget(84, units=5, wide=15, blocks=4), {
        "gfx942": Change(per=12.8, matrix="v_mfma", units=8, wide=6, blocks=3),
    }),
    on_chips("both sides, bf16, r=8", "both_sides_kernel", linear(8192, 8), Budget(6.3, "HMMA", units=96, wide=8), {
        "sm_90": Change(per=13.2, units=32, wide=16),
        "sm_100": Change(per=13.2, units=32, blocks=2),
        "gfx942": Change(per=23, matrix="v_mfma", units=12, wide=2, blocks=2),
    }),
    on_chips("both sides, bf16, r=16", "both_sides_kernel", linear(8192, 16), Budget(5.4, "HMMA", units=96, wide=12), {
        "sm_90": Change(per=12.2, units=32, wide=20, blocks=2),
        "sm_100": Change(per=12.2, units=32, blocks=2),
        "gfx942": Change(per=19.6, matrix="v_mfma", units=12, wide=2, blocks=2),
    }),
    *(on_chips(f"both sides, bf16, r={r}", "both_sides_kernel", linear(8192, r), Budget(4.4, "HMMA", units=192, wide=18), {
        "sm_90": Change(per=12.5, units=32, wide=26),
        "sm_100": Change(per=12.5, units=32, wide=17),
        "gfx942": Change(per=14.3, matrix="v_mfma", units=32, wide=3),
    }) for r in (32, 64, 256)),
    on_chips(
        "both sides, bf16, r=16, gain", "both_sides_kernel", linear(8192, 16, gain=True),
        Budget(9.5, "HMMA", units=80, wide=10), {
            "sm_90": Change(per=9.8, units=64, wide=14),
            "sm_100": Change(per=9.8, units=64),
            "gfx942": Change(per=23, matrix="v_mfma", units=16, wide=0),
        }),
    on_chips(
        "both sides, fp16, r=16, gain", "both_sides_kernel", linear(8192, 16, F16, gain=True),
        Budget(15.6, "HMMA", units=60, wide=5), {
            "sm_90 sm_100": Change(per=19.2, units=48),
            "gfx942": Change(per=17.6, matrix="v_mfma", units=24, wide=0),
        }),
    on_chips("both sides, bf16, r=16, group", "both_sides_kernel", group(8192, 16), Budget(5.5, "HMMA", units=96, wide=36), {
        "sm_90": Change(per=12.4, units=32, wide=60, blocks=2),
        "sm_100": Change(per=12.4, units=32, blocks=2),
        "gfx942": Change(per=19.6, matrix="v_mfma", units=12, wide=6, blocks=2),
    }),
    on_chips("both sides, fp32, r=16", "both_sides_kernel", linear(8192, 16, F32), Budget(153, units=3, wide=6, blocks=7), {
        "gfx942": Change(per=5.6, matrix="v_mfma", units=20, wide=3),
    }),
    on_chips("outer, bf16, r=8", "outer_kernel", linear(8192, 8), Budget(14.7, "HMMA", units=32, wide=8, copies=2), {
        "sm_90": Change(per=24, matrix="HGMMA", units=16, blocks=2),
        "sm_100": Change(per=27, matrix="UTCHMMA", units=16, blocks=4),
        "gfx942": Change(per=22, matrix="v_mfma", units=16, wide=4, blocks=2),
    }),
    on_chips(
        "outer, bf16, r=16", "outer_kernel", linear(8192, 16),
        Budget(12.8, "HMMA", units=32, wide=8, blocks=2, copies=2), {
            "sm_90": Change(per=19, matrix="HGMMA", units=16),
            "sm_100": Change(per=23, matrix="UTCHMMA", units=16, blocks=4),
            "gfx942": Change(per=22, matrix="v_mfma", units=16, wide=4),
        }),
    *(on_chips(f"outer, bf16, r={r}", "outer_kernel", linear(8192, r), Budget(7.9, "HMMA", units=64, wide=17, copies=2), {
        "sm_90": Change(per=23, matrix="HGMMA", units=16, blocks=2),
        "sm_100": Change(per=23, matrix="UTCHMMA", units=16, blocks=2),
        "gfx942": Change(per=26, matrix="v_mfma", units=16, wide=4, blocks=2),
    }) for r in (32, 64, 256)),
    on_chips(
        "outer, bf16, r=16, dropout", "outer_kernel", linear(8192, 16, dropout=0.1),
        Budget(59, "HMMA", units=16, wide=4, blocks=2, copies=2), {
            "sm_90": Change(per=105, matrix="HGMMA", units=8, blocks=3),
            "sm_100": Change(per=134, matrix="UTCHMMA", units=4, wide=2, blocks=5),
            "gfx942": Change(per=97, matrix="v_mfma", units=4, wide=1, blocks=4),
        }),
    on_chips(
        "outer, bf16, r=16, dropout, group", "outer_kernel", group(8192, 16, 0.1),
        Budget(40, "HMMA", units=24, copies=6), {
            "sm_90": Change(per=51, matrix="HGMMA", units=18, wide=1),
        }, without={"gfx942": "registers are spilled there"}),
    on_chips("outer, fp32, r=16", "outer_kernel", linear(8192, 16, F32), Budget(7.6, units=4, wide=2, blocks=10), {
        "gfx942": Change(per=45, matrix="v_mfma", wide=1, blocks=8, copies=2),
    }),
    on_chips("shrink, bf16, r=16, dropped base", "shrink_kernel", DROPPED, Budget(89, "HMMA", units=8, wide=15, blocks=3), {
        "sm_90": Change(per=82.5, units=16, wide=30, blocks=4),
        "sm_100": Change(per=322, matrix="UTCHMMA", units=4, wide=20, blocks=2),
        "gfx942": Change(per=116, matrix="v_mfma", units=4, wide=6, blocks=4),
    }),
    on_chips("both sides, bf16, r=16, dropped base", "both_sides_kernel", DROPPED, Budget(10.7, "HMMA", units=80, wide=10), {
        "sm_90": Change(per=11.6, units=64, wide=14),
        "sm_100": Change(per=11.6, units=64),
        "gfx942": Change(per=45, matrix="v_mfma", units=32, wide=1),
    }),
    on_chips(
        "expand, bf16, r=16", "expand_kernel", linear(64, 16, form="addmm"),
        Budget(10.5, "HMMA", units=16, wide=6, blocks=4), {
            "gfx942": Change(per=45, matrix="v_mfma", units=4, wide=3, blocks=7),
        }),
    on_chips("expand, bf16, r=16, dropped base", "expand_kernel", DROPPED, Budget(11, "HMMA", units=16, wide=10, blocks=3), {
        "gfx942": Change(per=45, matrix="v_mfma", units=4, wide=9, blocks=5),
    }),
    on_chips(
        "expand, bf16, r=16, back, dropped base", "expand_kernel", DROPPED,
        Budget(10.8, "HMMA", units=16, wide=10, blocks=3), {
            "gfx942": Change(per=47, matrix="v_mfma", units=4, wide=5, blocks=7),
        }, last=True),
    on_chips(
        "expand, fp16, r=64, float32 adapters", "expand_kernel", linear(64, 64, F16, form="addmm", adapters=F32),
        Budget(15, "HMMA", units=24, wide=6), {
            "sm_90": Change(per=70, matrix="HGMMA", units=5, wide=3),
            "sm_100": Change(per=100, matrix="UTCHMMA", units=3, wide=3, blocks=2),
            "gfx942": Change(per=36.5, matrix="v_mfma", units=6, wide=2, blocks=3),
        }),
    on_chips(
        "rest of gradients, bf16, r=16, gain", "rest_of_gradients_kernel", linear(8192, 16, gain=True, dx=False),
        Budget(12.3, units=8, wide=52, blocks=9), {
            "gfx942": Change(per=12.8, units=4, wide=16, blocks=8),
            "sm_90, triton 3.6.0": Change(spilled=2),
        }),
]  # fmt: skip
