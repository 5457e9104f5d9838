"""Whether the register hazard of sm_90 (`witness_kernel`) gives wrong numbers on this GPU, by the assembler of this process.

Each kind of A runs 1000 times, or in the simulator once. A wrong number is a finding about Triton and ptxas, not about our
kernels: it is a row of the file and fails nothing. What fails is the kind "plain", whose A comes from shared memory as it was
loaded, or a kind that is wrong with a loop that is not pipelined: then the witness itself is no good.
"""

from functools import partial
from typing import Any

import torch

from bench.gpu.ready import release
from bench.gpu.setting import Found, Setting

KINDS = ("plain", "cast", "where", "scale", "rest")
TIMES = 1000
TILES = {4: 64, 8: 128}  # rows of a tile, by warps


def stage(setting: Setting, found: Found) -> None:
    by = assembler()
    for kind in KINDS:
        for warps in (8,) if setting.tiny else TILES:
            for stages in (3,) if kind == "plain" or setting.tiny else (3, 1):
                name = f"{kind}, {warps} warps, {'pipelined' if stages > 1 else 'not pipelined'}, ptxas {by}"
                found.check(name, partial(witness, setting, found, by, kind, warps, stages))


def assembler() -> str:
    """The version of the ptxas that Triton takes for sm_90; "" without one."""
    try:
        from triton import knobs

        return ".".join(map(str, release(knobs.nvidia.ptxas.path)))
    except (ImportError, RuntimeError):
        return ""


def witness(setting: Setting, found: Found, by: str, kind: str, warps: int, stages: int) -> None:
    import triton

    m, n, k = (128, 128, 512) if setting.dry else (2048, 2048, 4096)
    torch.manual_seed(0)
    a = torch.randn(m, k, device=setting.device, dtype=torch.float32 if kind in ("cast", "rest") else torch.bfloat16)
    b = torch.randn(k, n, device=setting.device, dtype=torch.bfloat16)
    wanted = operand(kind, a).double() @ b.double()
    tile = TILES[warps]
    args = {"m": m, "n": n, "k": k, "BM": tile, "BN": 128, "BK": 64, "KIND": kind, "STAGES": stages}
    grid = (m // tile, n // 128)
    # of a sum of k products of deviation 1, whose rounding is far smaller; a wrong operand is wrong by far more
    bound = 0.02 * k**0.5
    times = 1 if setting.dry else TIMES
    worst, wrong, said = torch.zeros((), device=setting.device), torch.zeros((), device=setting.device), ""
    for _ in range(times):
        c = torch.full((m, n), torch.nan, device=setting.device)
        try:
            launch(setting, grid, {"a": a, "b": b, "c": c, **args}, warps)
        except AssertionError as finding:  # of the simulator
            said = str(finding)[:600]
        error = (c - wanted).abs().nan_to_num(torch.inf).amax().float()
        worst, wrong = torch.maximum(worst, error), wrong + (error > bound)
    row: dict[str, Any] = {
        "op": "witness", "kind": kind, "warps": warps, "stages": stages, "triton": triton.__version__, "ptxas": by,
        "times": times, "wrong": int(wrong), "worst": float(f"{worst.item():.4g}"), "bound": bound, "simulator": said,
    }  # fmt: skip
    found.row(row)
    print(f"    {kind:6} {warps} warps, {stages} stages, ptxas {by}: {row['wrong']} of {times} wrong {said[:100]}", flush=True)
    sound = kind == "plain" or stages == 1
    assert not sound or not row["wrong"], f"{row['wrong']} of {times} wrong, though nothing is overwritten there"


def operand(kind: str, a: torch.Tensor) -> torch.Tensor:
    """What is multiplied, in the dtype of the sums."""
    if kind == "where":
        (m, k), d = a.shape, a.device
        return torch.where((torch.arange(k, device=d)[None] + torch.arange(m, device=d)[:, None]) % 3 == 0, a.float(), 0.0)
    return a.bfloat16().float() if kind == "cast" else a.float() * 0.5 if kind == "scale" else a.float()


def launch(setting: Setting, grid: tuple[int, int], args: dict[str, Any], warps: int) -> None:
    from bench.gpu.witness_kernel import matmul

    if not setting.dry:
        matmul[grid](**args, num_warps=warps, num_stages=3)
        return
    from lora_kernels.testing.triton_ptx import simulate_triton

    simulate_triton(matmul, grid, args, [args["c"]], arch=setting.arch, warps=warps, stages=3)
