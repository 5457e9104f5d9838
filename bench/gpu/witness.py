"""Whether the register hazard of sm_90 (`witness_kernel`) gives wrong numbers on this GPU, by the
assembler of this process.

Each kind of A runs 1000 times, or in the simulator once. A wrong number is a finding about Triton
and ptxas, not about our kernels: it is a row of the file and fails nothing. What fails is the kind
"plain", whose A comes from shared memory as it was loaded, or a kind whose loop is not pipelined;
and an op of ours by that assembler.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu import essentials
from bench.gpu.determinism import assert_same_bits
from bench.gpu.ready import assembler
from bench.gpu.setting import Setting, StageFindings
from lora_kernels.testing import Problem, make_problem, run

KINDS = ("plain", "cast", "where", "scale", "rest")
TIMES, OURS_TIMES = 1000, 100
OURS = [  # of our own kernels those that once had the hazard
    ("dora, dropout", 64, torch.bfloat16), ("dropout", 64, torch.bfloat16), ("lora", 64, torch.float32),
    ("dora, dropout, lora_only", 64, torch.bfloat16), ("dora", 64, torch.bfloat16),
]  # fmt: skip
TILE_ROWS_BY_WARPS = {4: 64, 8: 128}  # rows of a tile, by warps


def run_stage(setting: Setting, found: StageFindings) -> None:
    by = assembler()
    for kind in KINDS:
        for warps in (8,) if setting.tiny else TILE_ROWS_BY_WARPS:
            for stages in (3,) if kind == "plain" or setting.tiny else (3, 1):
                name = f"{kind}, {warps} warps, {'pipelined' if stages > 1 else 'not pipelined'}, ptxas {by}"
                found.check(name, partial(run_witness, setting, found, by, kind, warps, stages))
    tokens, n_in, n_out = essentials.DRY_RUN_SIZES if setting.dry else essentials.ALIGNED_SIZES
    for name, r, adapters in OURS[:1] if setting.dry else OURS:
        flags = essentials.FLAGS[name]
        make = partial(make_problem, tokens, n_in, n_out, r, torch.bfloat16, adapters, device=setting.device, **flags)
        call = partial(essentials.on_poisoned_memory, setting, "triton", partial(check_our_kernel, setting, make))
        found.check(f"ours: {name}, r {r}, {str(adapters)[6:]} adapters, ptxas {by}", call)


def check_our_kernel(setting: Setting, make: Callable[[], Problem]) -> None:
    """One of our ops on Triton's kernels: right, and with the same bits each time."""
    essentials.check_forward_backward(make)
    p = make()
    assert_same_bits(lambda: list(run(p).values()), 1 if setting.dry else OURS_TIMES, setting.device)


def run_witness(setting: Setting, found: StageFindings, by: str, kind: str, warps: int, stages: int) -> None:
    import triton

    m, n, k = (128, 128, 512) if setting.dry else (2048, 2048, 4096)
    torch.manual_seed(0)
    a = torch.randn(m, k, device=setting.device, dtype=torch.float32 if kind in ("cast", "rest") else torch.bfloat16)
    b = torch.randn(k, n, device=setting.device, dtype=torch.bfloat16)
    wanted = operand(kind, a).double() @ b.double()
    tile = TILE_ROWS_BY_WARPS[warps]
    args = {"m": m, "n": n, "k": k, "BM": tile, "BN": 128, "BK": 64, "KIND": kind, "STAGES": stages}
    grid = (m // tile, n // 128)
    # of a sum of k products of deviation 1, whose rounding is far smaller; a wrong operand is wrong
    # by far more
    bound = 0.005 * k**0.5
    times = 1 if setting.dry else TIMES
    worst, wrong, said = torch.zeros((), device=setting.device), torch.zeros((), device=setting.device), ""
    for _ in range(times):
        c = torch.full((m, n), torch.nan, device=setting.device)
        try:
            launch_matmul(setting, grid, {"a": a, "b": b, "c": c, **args}, warps)
        except AssertionError as finding:  # of the simulator
            said = str(finding)[:600]
        error = (c - wanted).abs().nan_to_num(torch.inf).amax().float()
        worst, wrong = torch.maximum(worst, error), wrong + (error > bound)
    row: dict[str, Any] = {
        "op": "witness", "kind": kind, "warps": warps, "stages": stages, "triton": triton.__version__, "ptxas": by,
        "times": times, "wrong": int(wrong), "worst": float(f"{worst.item():.4g}"), "bound": bound, "simulator": said,
    }  # fmt: skip
    found.add_measurement(row)
    print(f"    {kind:6} {warps} warps, {stages} stages, ptxas {by}: {row['wrong']} of {times} wrong {said[:100]}", flush=True)
    # what the simulator says is in the row, whatever the kind
    sound = kind == "plain" or stages == 1
    why = "though no register is overwritten there: a fence is missing, or the witness is no good"
    assert said or not sound or not row["wrong"], f"{row['wrong']} of {times} wrong, {why}"


def operand(kind: str, a: torch.Tensor) -> torch.Tensor:
    """What is multiplied, in the dtype of the sums."""
    if kind == "where":
        (m, k), d = a.shape, a.device
        return torch.where((torch.arange(k, device=d)[None] + torch.arange(m, device=d)[:, None]) % 3 == 0, a.float(), 0.0)
    return a.bfloat16().float() if kind == "cast" else a.float() * 0.5 if kind == "scale" else a.float()


def launch_matmul(setting: Setting, grid: tuple[int, int], args: dict[str, Any], warps: int) -> None:
    from bench.gpu.witness_kernel import matmul

    if not setting.dry:
        matmul[grid](**args, num_warps=warps, num_stages=3)
        return
    from lora_kernels.ptxsim.triton_ptx import simulate_triton

    simulate_triton(matmul, grid, args, [args["c"]], arch=setting.arch, warps=warps, stages=3)
