"""What the gates compile: the ops' kernels as their launchers choose them (experts.py, ops.py,
quantised.py, serving.py, weights.py), and the simulator's corpus."""

from pathlib import Path

import torch

from lora_kernels.ops import cuda_shared_memory, missing_backends
from lora_kernels.ops.launch import CSRC
from lora_kernels.ops.tables.tiles import Tile, compiled
from lora_kernels.testing.gates import Budget, Change, Configuration, Cuda, Triton
from lora_kernels.testing.gates.configuration import NVIDIA

MISSING = missing_backends().get("triton")
if not MISSING:
    from tests.gates import experts, ops, quantised, serving, weights

KERNELS = Path(__file__).parents[1] / "ptxsim" / "kernels"
HALF, SINGLE = torch.bfloat16, torch.float32
CUDA = " ".join(NVIDIA)
ALL = f"{CUDA} gfx942"
ELSE = " ".join(chip for chip in NVIDIA if chip != "sm_90")
LORA = dict.fromkeys("xwaby", HALF) | {"m": 4096, "n": 4096, "k": 4096, "r": 16, "scale": 0.5, "R": 16}


def corpus(name, args, **launch):
    return Triton(f"tests.ptxsim.triton_kernels:{name}", args, **launch)


def lora(m, n, k, **launch):
    return corpus("lora", LORA | {"BM": m, "BN": n, "BK": k}, **launch)


ROW_NORM = dict.fromkeys("wab", HALF) | {"norm": SINGLE, "n": 4096, "k": 4096, "scale": 0.5, "R": 16, "BN": 64, "BK": 32}
SPLIT_K = {"x": HALF, "w": HALF, "y": SINGLE, "m": 64, "n": 4096, "k": 4096, "ATOMIC": True, "PARTS": 8, "B": 32}
GATHER = {"x": HALF, "a": HALF, "which": torch.int64, "h": SINGLE, "k": 4096, "R": 16, "BK": 64}
SOFTMAX = {"x": HALF, "y": HALF, "n": 4096, "B": 4096}
DROPOUT = {"x": SINGLE, "y": SINGLE, "n": 4096, "p": 0.3, "seed": 42, "B": 1024}

CORPUS = [
    Configuration("lora 128x128x64, 8 warps, 3 stages", lora(128, 128, 64, warps=8), Budget(3.4, "HMMA", units=72, wide=25), {
        "sm_80": Change(blocks=2),
        "sm_90": Change(per=16.5, matrix="HGMMA", units=8, blocks=2),
        "sm_100": Change(per=22, matrix="UTCHMMA", units=8, wide=33, blocks=2),
    }, without={"gfx942": "needs 68 KiB of LDS; 2 stages are shipped there"}),
    Configuration(
        "lora 128x128x64, 8 warps, 2 stages", lora(128, 128, 64, warps=8, stages=2), Budget(5.7, "v_mfma", units=20, wide=12),
        without={CUDA: "3 stages are shipped there"}),
    Configuration("lora 64x64x32, 4 warps, 3 stages", lora(64, 64, 32), Budget(5.4, "HMMA", units=20, wide=13, blocks=4), {
        "sm_90": Change(per=26.5, matrix="HGMMA", units=4, blocks=7),
        "sm_100": Change(per=33, matrix="UTCHMMA", units=4, wide=17),
        "gfx942": Change(per=15.5, matrix="v_mfma", units=6, wide=6, blocks=3),
    }),
    Configuration(
        "row_norm 64x32, 4 warps, 3 stages", corpus("row_norm", ROW_NORM),
        Budget(40, "HMMA", units=4, wide=3, blocks=9), {
            "sm_90": Change(per=134, matrix="HGMMA", units=1),
            "sm_100": Change(per=140, matrix="UTCHMMA", units=1, wide=5),
            "gfx942": Change(per=57, matrix="v_mfma", units=2, blocks=6),
        }),
    Configuration(
        "split_k 32x32x32, 4 warps, 3 stages", corpus("split_k", SPLIT_K),
        Budget(13.5, "HMMA", units=4, wide=6, blocks=9), {
            "sm_90 sm_100": Change(per=9.2, blocks=12),
            "gfx942": Change(per=14, matrix="v_mfma", wide=0, blocks=8),
        }),
    Configuration("gather 16x64, 4 warps, 3 stages", corpus("gather", GATHER), Budget(30, units=2, wide=2, blocks=12), {
        "gfx942": Change(per=23, wide=0, blocks=8),
    }),
    Configuration("softmax 4096, 4 warps", corpus("softmax", SOFTMAX), Budget(134, units=4, wide=4, blocks=10), {
        "gfx942": Change(per=294, units=2, wide=2, blocks=8),
    }),
    Configuration("dropout 1024, 4 warps", corpus("dropout", DROPOUT), Budget(270, units=2, wide=2, blocks=10), {
        "gfx942": Change(per=375, units=1, wide=1, blocks=8),
    }),
    Configuration(
        "matmul.cu 64x64x32, 4 warps, 2 stages", Cuda(KERNELS / "matmul.cu", "matmul", threads=128),
        Budget(7.4, "HMMA", units=16, wide=8, blocks=5)),
]  # fmt: skip


def cuda_op(source: str, kernel: str, tile: Tile, shared: int = 0) -> Cuda:
    return Cuda(CSRC / source, kernel, tile.threads, shared=shared)


def cuda_ranks(op: str, kind: str, ranks: int) -> Cuda:
    tile = compiled(f"{op}.cu")
    return cuda_op(f"{op}/cuda.cu", f"{op}_{kind}_{ranks}", tile, cuda_shared_memory.shared_of_update(tile, ranks))


def cuda_any(op: str, kind: str) -> Cuda:
    tile = compiled(f"{op}_any.cu")
    return cuda_op(f"{op}/cuda_any.cu", f"{op}_any_{kind}", tile, cuda_shared_memory.shared_of_update_any(tile))


def cuda_gemm(row: str, source: str, kernel: str, **answers: int) -> Cuda:
    tile = compiled(row, **answers)
    return cuda_op(source, kernel, tile, cuda_shared_memory.shared_of_gemm(tile))


def cuda_small(kind: str, tokens: int) -> Cuda:
    tile = compiled("lora_linear_small.cu", m=tokens, int8="i8" in kind)
    name = f"lora_linear_small_{kind}_{tokens}"
    return cuda_op("lora_linear/cuda_small.cu", name, tile, cuda_shared_memory.shared_of_small(tile))


def cuda_codes(kind: str, tokens: int) -> Cuda:
    tile = compiled("lora_linear_codes.cu", m=tokens, int8=kind.startswith("i8"))
    shared = cuda_shared_memory.shared_of_small if kind.startswith("i8") else cuda_shared_memory.shared_of_codes
    return cuda_op("lora_linear/cuda_codes.cu", f"lora_linear_codes_{kind}_{tokens}", tile, shared(tile))


def cuda_shrink(kind: str, ranks: int) -> Cuda:
    split, pieces = "split" in kind or "any" in kind, "any" not in kind
    tile = compiled("lora_linear_shrink.cu", r=ranks, split=split, pieces=pieces)
    name = f"lora_linear_shrink_{kind}" + (f"_{ranks}" if pieces else "")
    return cuda_op("lora_linear/cuda_thin.cu", name, tile, cuda_shared_memory.shared_of_shrink(tile, split))


def cuda_sides(kind: str, times: str, ranks: int) -> Cuda:
    pieces = times != "any_"
    tile = compiled("lora_linear_sides.cu", r=ranks, times=bool(times), pieces=pieces)
    name = f"lora_linear_sides_{times}{kind}" + (f"_{ranks}" if pieces else "")
    return cuda_op("lora_linear/cuda_sides.cu", name, tile, cuda_shared_memory.shared_of_sides(tile))


def cuda_outer(name: str) -> Cuda:
    # whatever it is, but for its ranks
    tile = compiled("lora_linear_outer.cu", dtype=HALF, r=16, pieces=True)
    return cuda_op("lora_linear/cuda_outer.cu", f"lora_linear_outer_{name}", tile, cuda_shared_memory.shared_of_outer(tile))


BACKWARD = [
    *(Configuration(f"lora_linear_sides.cu, {kind}, {times}r<={ranks}", cuda_sides(kind, times, ranks), budget)
      for kind, times, ranks, budget in (
          ("bf16", "", 16, Budget(19.0, "HMMA", units=320, wide=38, copies=1)),
          ("bf16", "", 32, Budget(11.2, "HMMA", units=320, wide=22, copies=1)),
          ("bf16", "times_", 16, Budget(23.1, "HMMA", units=320, wide=74, copies=1)),
          ("bf16", "times_", 32, Budget(13.1, "HMMA", units=320, wide=42, copies=1)),
          ("f16", "", 16, Budget(22.1, "HMMA", units=448, wide=38, copies=1)),
          ("f16", "", 32, Budget(12.6, "HMMA", units=448, wide=22, copies=1)),
          ("f16", "times_", 16, Budget(24.6, "HMMA", units=448, wide=74, copies=1)),
          ("f16", "times_", 32, Budget(13.8, "HMMA", units=448, wide=42, copies=1)),
      )),
    *(Configuration(f"lora_linear_sides.cu, {kind}, any layout", cuda_sides(kind, "any_", 16), budget)
      for kind, budget in (
          ("bf16", Budget(28.6, "HMMA", units=320, wide=2, copies=17)),
          ("f16", Budget(28.0, "HMMA", units=448, wide=2, copies=17)),
      )),
    *(Configuration(f"lora_linear_outer.cu, {kind}, {name}", cuda_outer(kernel), budget)
      for kind, name, kernel, budget in (
          ("bf16", "r<=16", "bf16_16", Budget(11.0, "HMMA", units=64, wide=28, copies=3)),
          ("bf16", "r<=64", "bf16_64", Budget(4.2, "HMMA", units=256, wide=28, copies=3)),
          ("bf16", "drop_r<=16", "drop_bf16_16", Budget(42.9, "HMMA", units=16, wide=40)),
          ("bf16", "drop_r<=64", "drop_bf16_64", Budget(11.9, "HMMA", units=64, wide=40)),
          ("f16", "r<=16", "f16_16", Budget(19.8, "HMMA", units=96, wide=40, copies=2)),
          ("f16", "r<=32", "f16_32", Budget(14.7, "HMMA", units=192, wide=40, copies=2)),
          ("f16", "drop_r<=16", "drop_f16_16", Budget(40.7, "HMMA", units=24, wide=40)),
          ("f16", "drop_r<=32", "drop_f16_32", Budget(25.1, "HMMA", units=48, wide=40)),
          ("bf16", "any layout", "any_bf16", Budget(42.9, "HMMA", units=16, wide=8)),
          ("f16", "any layout", "any_f16", Budget(40.6, "HMMA", units=24, wide=8)),
      )),
    *(Configuration(f"lora_linear_dx.cu{name.replace('_', ', ')}", cuda_gemm(
        "lora_linear_dx.cu", "lora_linear/cuda_dx.cu", f"lora_linear_dx{name}"), Budget(per, "HMMA", units=64, wide=28))
      for name, per in (("", 6.3), ("_gain", 17.9), ("_drop", 6.3), ("_gain_drop", 17.9))),
    *(Configuration(f"lora_linear_dx_small.cu, m<={tokens}", cuda_op(
        "lora_linear/cuda_dx_small.cu", f"lora_linear_dx_small_{tokens}", compiled("lora_linear_dx_small.cu", m=tokens),
        cuda_shared_memory.shared_of_dx_small(compiled("lora_linear_dx_small.cu", m=tokens))), budget)
      for tokens, budget in (
          (16, Budget(43, "HMMA", units=32, wide=60)), (64, Budget(20, "HMMA", units=64, wide=47)),
      )),
    *(Configuration(
        f"lora_linear_sums.cu, {name}",
        cuda_op("lora_linear/cuda_sums.cu", f"lora_linear_{name}", compiled("lora_linear_sums.cu")),
        Budget(per, units=units, blocks=blocks))
      for name, per, units, blocks in (("sums", 6.3, 4, 6), ("zero_gain", 6.6, 16, 5))),
]  # fmt: skip
SPECIALISED = [
    Configuration(f"lora_linear_specialised.cu, {kind}", cuda_op(
        "lora_linear/cuda_specialised_sm90a.cu", f"lora_linear_specialised_{kind}", compiled("lora_linear_specialised.cu"),
        cuda_shared_memory.shared_of_specialised(compiled("lora_linear_specialised.cu"))),
        Budget(per, "HGMMA", units=4, wide=wide), without={ELSE: "its code is for sm_90a"})
    for kind, per, wide in (("bf16", 13.1, 2), ("f16", 13.1, 2), ("dx_bf16", 12.6, 5), ("dx_f16", 12.6, 5),
                            ("dx_drop_bf16", 13.1, 5), ("dx_drop_f16", 13.1, 5))
] + [
    Configuration("lora_linear_specialised.cu, pairs", cuda_op(
        "lora_linear/cuda_specialised_sm90a.cu", "lora_linear_pairs", compiled("lora_linear_pairs.cu")),
        Budget(6.5, units=12, blocks=8), without={ELSE: "its code is for sm_90a"}),
]  # fmt: skip
# by tokens, of the loop that cuda_small.cu and multi_lora/cuda.cu share
SMALL = {16: Budget(24.4, "HMMA", units=8, wide=57), 64: Budget(10.5, "HMMA", units=32, wide=51)}
CUDA_OPS = [
    *BACKWARD,
    *SPECIALISED,
    *(Configuration(f"lora_linear_expand.cu, {kind}", cuda_op(
        "lora_linear/cuda_expand.cu", f"lora_linear_expand_{kind}", compiled("lora_linear_expand.cu"),
        cuda_shared_memory.shared_of_expand(compiled("lora_linear_expand.cu"))),
        Budget(3.9, "HMMA", units=24, wide=16, blocks=1))
      for kind in ("bf16", "f16")),
    *(Configuration(f"{op}.cu, {kind}, any rank, type and layout", cuda_any(op, kind), budget)
      for op, budget in (
          ("weight_norm", Budget(6.2, "HMMA", units=96, wide=22, copies=1)),
          ("merge", Budget(6.0, "HMMA", units=96, wide=22, copies=1)),
      ) for kind in ("bf16", "f16")),
    *(Configuration(f"weight_norm.cu, {kind}, r={ranks}", cuda_ranks("weight_norm", kind, ranks), budget)
      for kind in ("bf16", "f16") for ranks, budget in (
          (16, Budget(43, "HMMA", units=8, wide=15, blocks=3)), (32, Budget(21, "HMMA", units=16, wide=12, blocks=2)),
          (64, Budget(14, "HMMA", units=32, wide=16, blocks=2)), (128, Budget(9, "HMMA", units=64, wide=24)),
      )),
    *(Configuration(f"merge.cu, {kind}, r={ranks}", cuda_ranks("merge", kind, ranks), budget)
      for kind in ("bf16", "f16") for ranks, budget in (
          (16, Budget(60, "HMMA", units=8, wide=15, blocks=3)), (32, Budget(28.1, "HMMA", units=16, wide=12, blocks=2)),
          (64, Budget(14.2, "HMMA", units=32, wide=16, blocks=2)), (128, Budget(11.2, "HMMA", units=64, wide=24)),
      )),
    *(Configuration(f"lora_linear_small.cu, {kind}, m<={tokens}", cuda_small(kind, tokens), budget)
      for kind in ("bf16", "f16") for tokens, budget in SMALL.items()),
    *(Configuration(f"lora_linear_small.cu, {kind}, m<={tokens}", cuda_small(kind, tokens), budget)
      for kind in ("i8_bf16", "i8_f16") for tokens, budget in (
          (16, Budget(29.8, "HMMA", units=16, wide=82)), (64, Budget(16.8, "HMMA", units=64, wide=67)),
      )),
    *(Configuration(f"lora_linear_codes.cu, {kind}, m<={tokens}", cuda_codes(kind, tokens), budget)
      for kind in ("u4_bf16", "u4_f16") for tokens, budget in (
          (16, Budget(33.5, "HMMA", units=16, wide=60, blocks=2)), (64, Budget(11.8, "HMMA", units=64, wide=84)),
      )),
    *(Configuration(f"lora_linear_codes.cu, {kind}, m<={tokens}", cuda_codes(kind, tokens), budget)
      for kind in ("i8_bf16", "i8_f16") for tokens, budget in (
          (16, Budget(34.2, "HMMA", units=16, wide=82)), (64, Budget(17.6, "HMMA", units=64, wide=90)),
      )),
    *(Configuration(f"multi_lora.cu, {kind}, m<={tokens}", cuda_gemm(
        "multi_lora_small.cu", "multi_lora/cuda.cu", f"multi_lora_small_{kind}_{tokens}", m=tokens), budget)
      for kind in ("bf16", "f16") for tokens, budget in SMALL.items()),
    *(Configuration(f"multi_lora.cu, {kind}, {name} of any number of tokens", cuda_op(
        "multi_lora/cuda_any.cu", f"multi_lora_{name}_{kind}", compiled(f"multi_lora_{name}.cu")), budget)
      for kind in ("bf16", "f16") for name, budget in (
          ("shrink", Budget(56, "HMMA", units=16, wide=8)), ("expand", Budget(18, units=16)),
      )),
    *(Configuration(f"lora_linear_shrink.cu, {kind}, r<={ranks}", cuda_shrink(kind, ranks), budget)
      for kind in ("bf16", "f16") for ranks, budget in (
          (16, Budget(17.7, "HMMA", units=8, wide=20, blocks=2)), (64, Budget(7.2, "HMMA", units=32, wide=32)),
      )),
    *(Configuration(f"lora_linear_shrink.cu, {kind}, r<={ranks}", cuda_shrink(kind, ranks), budget)
      for kind in ("drop_bf16", "drop_f16") for ranks, budget in (
          (16, Budget(97, "HMMA", units=8, wide=20, blocks=2)), (64, Budget(31, "HMMA", units=32, wide=32)),
      )),
    *(Configuration(f"lora_linear_shrink.cu, {kind}, r<={ranks}", cuda_shrink(kind, ranks), budget)
      for kind, ranks, budget in (
          ("split_bf16", 16, Budget(11.7, "HMMA", units=16, wide=18)),
          ("split_bf16", 64, Budget(5.6, "HMMA", units=64, wide=24)),
          ("split_f16", 16, Budget(18.5, "HMMA", units=24, wide=18)),
          ("split_f16", 64, Budget(6.4, "HMMA", units=96, wide=24)),
          ("drop_split_bf16", 16, Budget(52.4, "HMMA", units=16, wide=18)),
          ("drop_split_bf16", 64, Budget(18.9, "HMMA", units=64, wide=24)),
          ("drop_split_f16", 16, Budget(44.3, "HMMA", units=24, wide=18)),
          ("drop_split_f16", 64, Budget(14.2, "HMMA", units=96, wide=24)),
      )),
    *(Configuration(f"lora_linear_shrink.cu, {kind}, any layout", cuda_shrink(f"any_{kind}", 16), budget)
      for kind, budget in (
          ("bf16", Budget(62.3, "HMMA", units=16, wide=6, copies=1)),
          ("f16", Budget(51.8, "HMMA", units=24, wide=6, copies=1)),
      )),
    Configuration(
        "lora_linear_shrink.cu, pack",
        cuda_op("lora_linear/cuda_thin.cu", "lora_linear_pack", compiled("lora_linear_pack.cu")),
        Budget(36.4, units=3),
    ),
    *(Configuration(
        f"lora_linear_tiles.cu, {kind}",
        cuda_gemm("lora_linear_tiles.cu", "lora_linear/cuda_tiles.cu", f"lora_linear_tiles_{kind}"),
        Budget(6.4, "HMMA", units=64, wide=25),
      ) for kind in ("bf16", "f16")),
]  # fmt: skip
GATES = [*([] if MISSING else experts.GATES + ops.GATES + quantised.GATES + serving.GATES + weights.GATES), *CUDA_OPS, *CORPUS]
