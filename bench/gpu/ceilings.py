"""What this GPU can do at most: the library's GEMMs, a copy, a launch. All else is measured against
these."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu.setting import Setting, StageFindings

GEMMS = [(8192, 4096, 4096), (8192, 8192, 8192)]  # M, N, K
ROUNDS, LAUNCHES = 15, 200
FLUSH = 2**30  # bytes: more than any L2
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def run_stage(setting: Setting, found: StageFindings) -> None:
    gemms = [(32, 24, 16)] if setting.dry else GEMMS
    for dtype in (BF16, F16):
        for shape in gemms:
            for how in ("mm", "addmm"):
                name = f"{how} {'×'.join(map(str, shape))} {str(dtype)[6:]}"
                found.check(name, partial(time_gemm, setting, found, name, how, shape, dtype))
    found.check("copy", partial(time_copy, setting, found))
    found.check("launch", partial(time_launch, setting, found))
    for tf32 in (False, True):
        name = f"mm {'×'.join(map(str, gemms[0]))} {'tf32' if tf32 else 'float32'}"
        found.check(name, partial(time_gemm, setting, found, name, "mm", gemms[0], F32, tf32))


def time_gemm(
    setting: Setting, found: StageFindings, name: str, how: str, shape: tuple[int, int, int], dtype: torch.dtype,
    tf32: bool = False,
) -> None:  # fmt: skip
    """x Wᵀ, or y + x Wᵀ with the sum in the library's own epilogue, on random data: zeros would run
    at a higher clock."""
    m, n, k = shape
    x, w = (torch.randn(rows, k, device=setting.device, dtype=dtype) for rows in (m, n))
    y = torch.randn(m, n, device=setting.device, dtype=dtype)
    usual = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        call = partial(torch.mm, x, w.T, out=y) if how == "mm" else partial(torch.addmm, y, x, w.T, beta=1, out=y)
        seconds = median_gpu_seconds(setting, call)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = usual
    flops = 2 * m * n * k
    add_ceiling_row(found, name, seconds, M=m, N=n, K=k, dtype="tf32" if tf32 else str(dtype)[6:], flops=flops)


def time_copy(setting: Setting, found: StageFindings) -> None:
    """Bytes read and written."""
    one = torch.zeros(1024 if setting.dry else 2**31, dtype=torch.uint8, device=setting.device)
    other = torch.empty_like(one)
    add_ceiling_row(found, "copy", median_gpu_seconds(setting, lambda: other.copy_(one)), bytes=2 * one.numel())


def time_launch(setting: Setting, found: StageFindings) -> None:
    """A kernel of one number, of many in a row: what a further launch costs the GPU, and what it
    costs the host."""
    one = torch.zeros(1, device=setting.device)

    def launch_many() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    seconds = median_gpu_seconds(setting, launch_many)
    host = None
    if not setting.dry:
        torch.cuda.synchronize()
        start = time.perf_counter()
        launch_many()
        host = (time.perf_counter() - start) / LAUNCHES
        torch.cuda.synchronize()
    add_ceiling_row(found, "launch", None if seconds is None else seconds / LAUNCHES, host_seconds=host)


def median_gpu_seconds(setting: Setting, call: Callable[[], object]) -> float | None:
    """The median seconds of a call on the GPU, with L2 flushed before each; in a dry run it is
    called, and no time is taken."""
    call()
    if setting.dry:
        return None
    call()
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    marks = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in marks) / 1e3


def add_ceiling_row(found: StageFindings, what: str, seconds: float | None, **more: Any) -> None:
    made: dict[str, Any] = {"op": "ceiling", "what": what, **more, "seconds": seconds}
    rate = ""
    if seconds is not None and "flops" in more:
        made["flops_per_second"] = more["flops"] / seconds
        rate = f", {made['flops_per_second'] / 1e12:.0f} TFLOP/s"
    elif seconds is not None and "bytes" in more:
        made["bytes_per_second"] = more["bytes"] / seconds
        rate = f", {made['bytes_per_second'] / 1e12:.2f} TB/s"
    found.add_measurement(made)
    print(f"    {what:32} {'no time taken' if seconds is None else f'{seconds * 1e6:.1f} µs'}{rate}", flush=True)
