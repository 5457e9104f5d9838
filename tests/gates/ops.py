"""The configurations of lora_linear's Triton kernels, and the budgets of a person."""

from lora_kernels.testing.gates import Budget
from tests.gates.calls import DROPPED, DROPPED_F16, F16, F32, LORA_ONLY, group, linear, on_chips

GATES = [
    on_chips("forward, bf16, r=8", "forward_kernel", linear(8192, 8), {
        "sm_80 sm_86 sm_89": Budget(3.4, "HMMA", units=64, wide=24),
        "sm_120": Budget(2.3, "HMMA", units=64, wide=6),
        "sm_90": Budget(23, "HGMMA", units=4, wide=6),
        "sm_100": Budget(24, "UTCHMMA", units=4, wide=6),
        "gfx942": Budget(6.2, "v_mfma", units=16, wide=12, blocks=2),
    }),
    on_chips("forward, bf16, r=16", "forward_kernel", linear(8192, 16), {
        "sm_80 sm_86 sm_89": Budget(3.4, "HMMA", units=64, wide=33),
        "sm_120": Budget(2.3, "HMMA", units=64, wide=15),
        "sm_90": Budget(23, "HGMMA", units=4, wide=15, blocks=2),
        "sm_100": Budget(27, "UTCHMMA", units=4, wide=15),
        "gfx942": Budget(6.4, "v_mfma", units=16, wide=14, blocks=2),
    }),
    on_chips("forward, bf16, r=64", "forward_kernel", linear(8192, 64), {
        "sm_80 sm_86 sm_89": Budget(3.4, "HMMA", units=64, wide=33),
        "sm_120": Budget(2.3, "HMMA", units=64, wide=15),
        "sm_90": Budget(23, "HGMMA", units=4, wide=15, blocks=2),
        "sm_100": Budget(27, "UTCHMMA", units=4, wide=15),
        "gfx942": Budget(6.4, "v_mfma", units=16, wide=14, blocks=2),
    }),
    on_chips("forward, bf16, r=256", "forward_kernel", linear(8192, 256), {
        "sm_80 sm_86 sm_89": Budget(3.4, "HMMA", units=64, wide=33),
        "sm_120": Budget(2.3, "HMMA", units=64, wide=15),
        "sm_90": Budget(23, "HGMMA", units=4, wide=15, blocks=2),
        "sm_100": Budget(27, "UTCHMMA", units=4, wide=15),
        "gfx942": Budget(6.4, "v_mfma", units=16, wide=14, blocks=2),
    }),
    on_chips("forward, bf16, r=16, 16 tokens", "forward_kernel", linear(16, 16), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(4.4, "HMMA", units=40, wide=17, blocks=4),
        "gfx942": Budget(10.6, "v_mfma", units=8, wide=8, blocks=5),
    }),
    on_chips("forward, bf16, r=64, 16 tokens", "forward_kernel", linear(16, 64), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(9.4, "HMMA", units=16, wide=30, blocks=2),
        "gfx942": Budget(12.5, "v_mfma", units=8, wide=18, blocks=3),
    }),
    on_chips("forward, bf16, r=16, dropout, 64 tokens", "forward_kernel", linear(64, 16, dropout=0.1), {
        "sm_80 sm_86 sm_89 sm_120": Budget(21, "HMMA", units=40, wide=48, blocks=2),
        "sm_90": Budget(93, "HGMMA", units=8, wide=48, blocks=2),
        "sm_100": Budget(99, "UTCHMMA", units=8, wide=48, blocks=4),
        "gfx942": Budget(42, "v_mfma", units=12, wide=18, blocks=3),
    }),
    on_chips("forward, bf16, r=16, dropped base", "forward_kernel", linear(8192, 16, gain=True, dropout=0.1), {
        "sm_80 sm_86 sm_89 sm_120": Budget(16.6, "HMMA", units=64, wide=33, blocks=2),
        "sm_90": Budget(107, "HGMMA", units=8, wide=33, blocks=2),
        "sm_100": Budget(104, "UTCHMMA", units=8, wide=41, blocks=3),
        "gfx942": Budget(33, "v_mfma", units=16, wide=15, blocks=3),
    }),
    on_chips("forward, bf16, r=16, group", "forward_kernel", group(8192, 16), {
        "sm_80 sm_86 sm_89": Budget(3.6, "HMMA", units=64, wide=99),
        "sm_120": Budget(2.3, "HMMA", units=64, wide=45),
        "sm_90": Budget(23, "HGMMA", units=4, wide=45, blocks=2),
        "sm_100": Budget(35, "UTCHMMA", units=4, wide=99),
        "gfx942": Budget(6.2, "v_mfma", units=16, wide=42),
    }),
    on_chips("forward, fp16, r=16", "forward_kernel", linear(8192, 16, F16), {
        "sm_80 sm_86 sm_89": Budget(3.5, "HMMA", units=64, wide=33),
        "sm_120": Budget(2.3, "HMMA", units=64, wide=15),
        "sm_90": Budget(23, "HGMMA", units=4, wide=15),
        "sm_100": Budget(27, "UTCHMMA", units=4, wide=12),
        "gfx942": Budget(6.4, "v_mfma", units=16, wide=14, blocks=2),
    }),
    on_chips("forward, fp32, r=16", "forward_kernel", linear(8192, 16, F32), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(185, units=2, wide=12, blocks=2),
        "gfx942": Budget(10.2, "v_mfma", units=8, blocks=2),
    }),
    on_chips("dx, bf16, r=8", "input_gradient_kernel", linear(8192, 8), {
        "sm_80 sm_86 sm_89 sm_120": Budget(6.2, "HMMA", units=32, wide=36),
        "sm_90": Budget(23, "HGMMA", units=4, wide=25),
        "sm_100": Budget(28, "UTCHMMA", units=4, wide=25),
        "gfx942": Budget(47, "v_mfma", units=8, wide=8),
    }),
    on_chips("dx, bf16, r=16", "input_gradient_kernel", linear(8192, 16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(4.9, "HMMA", units=32, wide=44),
        "sm_90": Budget(23, "HGMMA", units=4, wide=31),
        "sm_100": Budget(25, "UTCHMMA", units=4, wide=31),
        "gfx942": Budget(45, "v_mfma", units=8, wide=9),
    }),
    on_chips("dx, bf16, r=64", "input_gradient_kernel", linear(8192, 64), {
        "sm_80 sm_86 sm_89 sm_120": Budget(4.9, "HMMA", units=32, wide=44),
        "sm_90": Budget(23, "HGMMA", units=4, wide=31),
        "sm_100": Budget(25, "UTCHMMA", units=4, wide=31),
        "gfx942": Budget(45, "v_mfma", units=8, wide=9),
    }),
    on_chips("dx, bf16, r=256", "input_gradient_kernel", linear(8192, 256), {
        "sm_80 sm_86 sm_89 sm_120": Budget(4.9, "HMMA", units=32, wide=44),
        "sm_90": Budget(23, "HGMMA", units=4, wide=31),
        "sm_100": Budget(25, "UTCHMMA", units=4, wide=31),
        "gfx942": Budget(45, "v_mfma", units=8, wide=9),
    }),
    on_chips("dx, bf16, r=16, gain, dropout", "input_gradient_kernel", LORA_ONLY, {
        "sm_80 sm_86 sm_89 sm_120": Budget(10.6, "HMMA", units=32, wide=53),
        "sm_90": Budget(72, "HGMMA", units=4, wide=58),
        "sm_100": Budget(68, "UTCHMMA", units=4, wide=58),
        "gfx942": Budget(49, "v_mfma", units=8, wide=17),
    }),
    on_chips("dx, bf16, r=16, dropped base", "input_gradient_kernel", linear(8192, 16, gain=True, dropout=0.1), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.6, "HMMA", units=64, wide=81, blocks=2),
        "sm_90": Budget(44, "HGMMA", units=8, wide=81, blocks=3),
        "sm_100": Budget(41, "UTCHMMA", units=8, wide=81, blocks=4),
        "gfx942": Budget(26, "v_mfma", units=16, wide=36, blocks=2),
    }),
    on_chips("dx, bf16, r=16, group", "input_gradient_kernel", group(8192, 16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.4, "HMMA", units=32, wide=132),
        "sm_90": Budget(23, "HGMMA", units=4, wide=93, blocks=2),
        "sm_100": Budget(28, "UTCHMMA", units=4, wide=93),
        "gfx942": Budget(45, "v_mfma", units=8, wide=27),
    }),
    on_chips("dx, bf16, r=16, 16 tokens", "input_gradient_kernel", linear(16, 16), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(17.6, "HMMA", units=8, wide=16, blocks=4),
        "gfx942": Budget(19.8, "v_mfma", units=4, wide=8, blocks=6),
    }),
    on_chips("dx, fp16, r=16, gain", "input_gradient_kernel", linear(8192, 16, F16, gain=True), {
        "sm_80 sm_86 sm_89": Budget(15.7, "HMMA", units=48, wide=31),
        "sm_120": Budget(22, "HMMA", units=24, wide=62, blocks=5),
        "sm_90": Budget(39, "HGMMA", units=10, wide=31, blocks=2),
        "sm_100": Budget(57, "UTCHMMA", units=6, wide=31, blocks=4),
        "gfx942": Budget(28, "v_mfma", units=12, wide=2, blocks=2),
    }),
    on_chips("dx, fp16, r=16, dropped base", "input_gradient_kernel", DROPPED_F16, {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(16.3, "HMMA", units=32, wide=58, blocks=3),
        "gfx942": Budget(18.2, "v_mfma", units=32, wide=19, blocks=2),
    }),
    on_chips("dx, fp32, r=16", "input_gradient_kernel", linear(8192, 16, F32), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(184, units=2, wide=24),
        "gfx942": Budget(8.5, "v_mfma", units=8, blocks=3),
    }),
    on_chips("shrink, bf16, r=8", "shrink_kernel", linear(8192, 8), {
        "sm_80 sm_86 sm_89 sm_120": Budget(13.8, "HMMA", units=8, wide=15, blocks=4),
        "sm_90": Budget(30, "HGMMA", units=4, wide=15, blocks=7),
        "sm_100": Budget(31, "UTCHMMA", units=4, wide=20, blocks=7),
        "gfx942": Budget(22, "v_mfma", units=4, wide=6, blocks=3),
    }),
    on_chips("shrink, bf16, r=16", "shrink_kernel", linear(8192, 16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(13.8, "HMMA", units=8, wide=15, blocks=4),
        "sm_90": Budget(30, "HGMMA", units=4, wide=15, blocks=7),
        "sm_100": Budget(32, "UTCHMMA", units=4, wide=20, blocks=7),
        "gfx942": Budget(22, "v_mfma", units=4, wide=6, blocks=3),
    }),
    on_chips("shrink, bf16, r=32", "shrink_kernel", linear(8192, 32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(7.3, "HMMA", units=16, wide=12, blocks=6),
        "sm_90": Budget(34, "HGMMA", units=4, wide=12, blocks=9),
        "sm_100": Budget(32, "UTCHMMA", units=4, wide=18, blocks=9),
        "gfx942": Budget(9.8, "v_mfma", units=8, wide=9, blocks=5),
    }),
    on_chips("shrink, bf16, r=64", "shrink_kernel", linear(8192, 64), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.8, "HMMA", units=32, wide=24, blocks=3),
        "sm_90": Budget(37, "HGMMA", units=4, wide=24, blocks=4),
        "sm_100": Budget(38, "UTCHMMA", units=4, wide=32, blocks=4),
        "gfx942": Budget(14.9, "v_mfma", units=8, wide=12, blocks=2),
    }),
    on_chips("shrink, bf16, r=128", "shrink_kernel", linear(8192, 128), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.8, "HMMA", units=32, wide=24, blocks=3),
        "sm_90": Budget(37, "HGMMA", units=4, wide=24, blocks=4),
        "sm_100": Budget(38, "UTCHMMA", units=4, wide=32, blocks=4),
        "gfx942": Budget(14.9, "v_mfma", units=8, wide=12, blocks=2),
    }),
    on_chips("shrink, bf16, r=256", "shrink_kernel", linear(8192, 256), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.8, "HMMA", units=32, wide=24, blocks=3),
        "sm_90": Budget(37, "HGMMA", units=4, wide=24, blocks=4),
        "sm_100": Budget(38, "UTCHMMA", units=4, wide=32, blocks=4),
        "gfx942": Budget(14.9, "v_mfma", units=8, wide=12, blocks=2),
    }),
    on_chips("shrink, bf16, r=16, dropout", "shrink_kernel", linear(8192, 16, dropout=0.1), {
        "sm_80 sm_86 sm_89 sm_120": Budget(89, "HMMA", units=8, wide=15, blocks=3),
        "sm_90": Budget(169, "HGMMA", units=4, wide=15, blocks=5),
        "sm_100": Budget(180, "UTCHMMA", units=4, wide=20, blocks=7),
        "gfx942": Budget(116, "v_mfma", units=4, wide=6, blocks=4),
    }),
    on_chips("shrink, bf16, r=32, dropout", "shrink_kernel", linear(8192, 32, dropout=0.1), {
        "sm_80 sm_86 sm_89 sm_120": Budget(48, "HMMA", units=16, wide=12, blocks=3),
        "sm_90": Budget(173, "HGMMA", units=4, wide=12, blocks=4),
        "sm_100": Budget(180, "UTCHMMA", units=4, wide=18, blocks=8),
        "gfx942": Budget(57, "v_mfma", units=8, wide=6, blocks=3),
    }),
    on_chips("shrink, bf16, r=16, group", "shrink_kernel", group(8192, 16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(6.9, "HMMA", units=24, wide=21, blocks=3),
        "sm_90": Budget(15.4, "HGMMA", units=12, wide=21, blocks=5),
        "sm_100": Budget(18.8, "UTCHMMA", units=12, wide=28, blocks=5),
        "gfx942": Budget(12.1, "v_mfma", units=12, wide=6, blocks=2),
    }),
    on_chips("shrink, fp32, r=16", "shrink_kernel", linear(8192, 16, F32), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(84, units=5, wide=15, blocks=4),
        "gfx942": Budget(12.8, "v_mfma", units=8, wide=6, blocks=3),
    }),
    on_chips("both sides, bf16, r=8", "both_sides_kernel", linear(8192, 8), {
        "sm_80 sm_86 sm_89 sm_120": Budget(6.3, "HMMA", units=96, wide=8),
        "sm_90 sm_100": Budget(13.2, "HMMA", units=32, wide=16),
        "gfx942": Budget(23, "v_mfma", units=12, wide=2, blocks=2),
    }),
    on_chips("both sides, bf16, r=16", "both_sides_kernel", linear(8192, 16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.4, "HMMA", units=96, wide=12),
        "sm_90 sm_100": Budget(12.2, "HMMA", units=32, wide=20, blocks=2),
        "gfx942": Budget(19.6, "v_mfma", units=12, wide=2, blocks=2),
    }),
    on_chips("both sides, bf16, r=32", "both_sides_kernel", linear(8192, 32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(4.4, "HMMA", units=192, wide=18),
        "sm_90 sm_100": Budget(12.5, "HMMA", units=32, wide=26),
        "gfx942": Budget(14.3, "v_mfma", units=32, wide=3),
    }),
    on_chips("both sides, bf16, r=64", "both_sides_kernel", linear(8192, 64), {
        "sm_80 sm_86 sm_89 sm_120": Budget(4.4, "HMMA", units=192, wide=18),
        "sm_90 sm_100": Budget(12.5, "HMMA", units=32, wide=26),
        "gfx942": Budget(14.3, "v_mfma", units=32, wide=3),
    }),
    on_chips("both sides, bf16, r=256", "both_sides_kernel", linear(8192, 256), {
        "sm_80 sm_86 sm_89 sm_120": Budget(4.4, "HMMA", units=192, wide=18),
        "sm_90 sm_100": Budget(12.5, "HMMA", units=32, wide=26),
        "gfx942": Budget(14.3, "v_mfma", units=32, wide=3),
    }),
    on_chips("both sides, bf16, r=16, gain", "both_sides_kernel", linear(8192, 16, gain=True), {
        "sm_80 sm_86 sm_89 sm_120": Budget(9.5, "HMMA", units=80, wide=10),
        "sm_90 sm_100": Budget(9.8, "HMMA", units=64, wide=14),
        "gfx942": Budget(23, "v_mfma", units=16),
    }),
    on_chips("both sides, fp16, r=16, gain", "both_sides_kernel", linear(8192, 16, F16, gain=True), {
        "sm_80 sm_86 sm_89 sm_120": Budget(15.6, "HMMA", units=60, wide=5),
        "sm_90 sm_100": Budget(19.2, "HMMA", units=48, wide=5),
        "gfx942": Budget(17.6, "v_mfma", units=24),
    }),
    on_chips("both sides, bf16, r=16, group", "both_sides_kernel", group(8192, 16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(5.5, "HMMA", units=96, wide=36),
        "sm_90 sm_100": Budget(12.4, "HMMA", units=32, wide=60, blocks=2),
        "gfx942": Budget(19.6, "v_mfma", units=12, wide=6, blocks=2),
    }),
    on_chips("both sides, fp32, r=16", "both_sides_kernel", linear(8192, 16, F32), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(153, units=3, wide=6, blocks=7),
        "gfx942": Budget(5.6, "v_mfma", units=20, wide=3, blocks=7),
    }),
    on_chips("outer, bf16, r=8", "outer_kernel", linear(8192, 8), {
        "sm_80 sm_86 sm_89 sm_120": Budget(14.7, "HMMA", units=32, wide=8, copies=2),
        "sm_90": Budget(24, "HGMMA", units=16, wide=8, blocks=2, copies=2),
        "sm_100": Budget(27, "UTCHMMA", units=16, wide=8, blocks=4, copies=2),
        "gfx942": Budget(22, "v_mfma", units=16, wide=4, blocks=2, copies=2),
    }),
    on_chips("outer, bf16, r=16", "outer_kernel", linear(8192, 16), {
        "sm_80 sm_86 sm_89 sm_120": Budget(12.8, "HMMA", units=32, wide=8, blocks=2, copies=2),
        "sm_90": Budget(19, "HGMMA", units=16, wide=8, blocks=2, copies=2),
        "sm_100": Budget(23, "UTCHMMA", units=16, wide=8, blocks=4, copies=2),
        "gfx942": Budget(22, "v_mfma", units=16, wide=4, blocks=2, copies=2),
    }),
    on_chips("outer, bf16, r=32", "outer_kernel", linear(8192, 32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(7.9, "HMMA", units=64, wide=17, copies=2),
        "sm_90": Budget(23, "HGMMA", units=16, wide=17, blocks=2, copies=2),
        "sm_100": Budget(23, "UTCHMMA", units=16, wide=17, blocks=2, copies=2),
        "gfx942": Budget(26, "v_mfma", units=16, wide=4, blocks=2, copies=2),
    }),
    on_chips("outer, bf16, r=64", "outer_kernel", linear(8192, 64), {
        "sm_80 sm_86 sm_89 sm_120": Budget(7.9, "HMMA", units=64, wide=17, copies=2),
        "sm_90": Budget(23, "HGMMA", units=16, wide=17, blocks=2, copies=2),
        "sm_100": Budget(23, "UTCHMMA", units=16, wide=17, blocks=2, copies=2),
        "gfx942": Budget(26, "v_mfma", units=16, wide=4, blocks=2, copies=2),
    }),
    on_chips("outer, bf16, r=256", "outer_kernel", linear(8192, 256), {
        "sm_80 sm_86 sm_89 sm_120": Budget(7.9, "HMMA", units=64, wide=17, copies=2),
        "sm_90": Budget(23, "HGMMA", units=16, wide=17, blocks=2, copies=2),
        "sm_100": Budget(23, "UTCHMMA", units=16, wide=17, blocks=2, copies=2),
        "gfx942": Budget(26, "v_mfma", units=16, wide=4, blocks=2, copies=2),
    }),
    on_chips("outer, bf16, r=16, dropout", "outer_kernel", linear(8192, 16, dropout=0.1), {
        "sm_80 sm_86 sm_89 sm_120": Budget(59, "HMMA", units=16, wide=4, blocks=2, copies=2),
        "sm_90": Budget(105, "HGMMA", units=8, wide=4, blocks=3, copies=2),
        "sm_100": Budget(134, "UTCHMMA", units=4, wide=2, blocks=5, copies=2),
        "gfx942": Budget(97, "v_mfma", units=4, wide=1, blocks=4, copies=2),
    }),
    on_chips("outer, bf16, r=16, dropout, group", "outer_kernel", group(8192, 16, 0.1), {
        "sm_80 sm_86 sm_89 sm_100 sm_120": Budget(40, "HMMA", units=24, copies=6),
        "sm_90": Budget(51, "HGMMA", units=18, wide=1, copies=6),
    }, without={"gfx942": "registers are spilled there"}),
    on_chips("outer, fp32, r=16", "outer_kernel", linear(8192, 16, F32), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(7.6, units=4, wide=2, blocks=10),
        "gfx942": Budget(45, "v_mfma", units=4, wide=1, blocks=8, copies=2),
    }),
    on_chips("shrink, bf16, r=16, dropped base", "shrink_kernel", DROPPED, {
        "sm_80 sm_86 sm_89 sm_120": Budget(89, "HMMA", units=8, wide=15, blocks=3),
        "sm_90": Budget(172, "HGMMA", units=4, wide=15, blocks=4),
        "sm_100": Budget(322, "UTCHMMA", units=4, wide=20, blocks=3),
        "gfx942": Budget(116, "v_mfma", units=4, wide=6, blocks=4),
    }),
    on_chips("both sides, bf16, r=16, dropped base", "both_sides_kernel", DROPPED, {
        "sm_80 sm_86 sm_89 sm_120": Budget(10.7, "HMMA", units=80, wide=10),
        "sm_90 sm_100": Budget(11.6, "HMMA", units=64, wide=14),
        "gfx942": Budget(45, "v_mfma", units=32, wide=1),
    }),
    on_chips("expand, bf16, r=16", "expand_kernel", linear(64, 16, form="addmm"), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(10.5, "HMMA", units=16, wide=6, blocks=4),
        "gfx942": Budget(45, "v_mfma", units=4, wide=3, blocks=7),
    }),
    on_chips("expand, bf16, r=16, dropped base", "expand_kernel", DROPPED, {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(11, "HMMA", units=16, wide=10, blocks=3),
        "gfx942": Budget(45, "v_mfma", units=4, wide=9, blocks=5),
    }),
    on_chips("expand, bf16, r=16, back, dropped base", "expand_kernel", DROPPED, {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(10.8, "HMMA", units=16, wide=10, blocks=3),
        "gfx942": Budget(47, "v_mfma", units=4, wide=5, blocks=7),
    }, last=True),
    on_chips("expand, fp16, r=64, float32 adapters", "expand_kernel", linear(64, 64, F16, form="addmm", adapters=F32), {
        "sm_80 sm_86 sm_89 sm_120": Budget(15, "HMMA", units=24, wide=6),
        "sm_90": Budget(75, "HGMMA", units=5, wide=6),
        "sm_100": Budget(106, "UTCHMMA", units=3, wide=6, blocks=2),
        "gfx942": Budget(36.5, "v_mfma", units=6, wide=2, blocks=3),
    }),
    on_chips("rest of gradients, bf16, r=16, gain", "rest_of_gradients_kernel", linear(8192, 16, gain=True, dx=False), {
        "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120": Budget(12.3, units=8, wide=52, blocks=9),
        "gfx942": Budget(12.8, units=4, wide=16, blocks=8),
    }),
]  # fmt: skip
