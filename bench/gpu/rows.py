"""Rows of speed for few minutes: a layer of 4096×4096 in bfloat16, and a batch of many adapters;
what `more` adds stands last.

    ours      PEFT's layer after `fuse`, on what dispatch chooses; the row says which backend and
              candidate that was
    linear    the frozen nn.Linear alone
    peft      PEFT's layer
    addmm     `rivals.lora_by_addmm`
    compile   torch.compile of `rivals.lora_as_written`

The clock is `tune.events`: interleaved rounds in a random order, L2 flushed before each call, the
median of 11. A row for which the reference ran has failed, and its times are kept.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.gpu import rivals, speed
from bench.gpu.setting import Setting, StageFindings, backends_used, fuse_layer, make_peft_layer
from bench.tune import median_event_seconds
from lora_kernels.testing import rms

DTYPE = torch.bfloat16


class Row(NamedTuple):
    """One layer and what is done with it. `adapters`: the dtype of A and B, float32 by PEFT's
    default."""

    kind: str
    backward: bool
    m: int
    k: int = 4096
    n: int = 4096
    r: int = 16
    dropout: float = 0.0
    adapters: torch.dtype = DTYPE

    def __str__(self) -> str:
        what = "forward + backward" if self.backward else "forward"
        wide = "" if self.adapters is DTYPE else ", float32 adapters"
        return f"{self.kind} {what} M={self.m} {self.k}×{self.n} r={self.r} dropout {self.dropout}{wide}"


MAIN_ROWS = [
    Row("lora", False, 8192, dropout=0.05), Row("lora", True, 8192, dropout=0.05),
    Row("dora", True, 8192, dropout=0.05), Row("lora", False, 1), Row("lora", False, 16), Row("lora", False, 64),
    Row("dora", False, 8192, dropout=0.05),
]  # fmt: skip
MULTI_LORA_ROWS = 64  # rows of the batch of many adapters, which is the eighth
FURTHER_ROWS = [
    Row("lora", True, 8192, dropout=0.05, adapters=torch.float32),
    Row("dora", True, 8192, dropout=0.05, adapters=torch.float32),
    Row("lora", True, 8192), Row("dora", True, 8192), Row("lora", True, 8192, r=64, dropout=0.05),
    Row("dora", False, 1), Row("dora", False, 16), Row("lora", True, 1024, dropout=0.05), Row("lora", False, 256),
    Row("lora", True, 8192, n=1024, dropout=0.05), Row("lora", True, 8192, n=14336, dropout=0.05),
    Row("lora", True, 8192, k=14336, dropout=0.05),
]  # fmt: skip

Clock = Callable[[dict[str, Callable[[], object]]], dict[str, Any]]


def run_stage(setting: Setting, found: StageFindings) -> None:
    measure(setting, found, speed.run_untimed if setting.dry else median_event_seconds)


def fill_caches(setting: Setting, found: StageFindings) -> None:
    """Calls what `run_stage` will time, so that Triton's and torch's compilers leave it in their
    caches."""
    measure(setting, found, speed.run_untimed, kept=False)


def measure(setting: Setting, found: StageFindings, clock: Clock, kept: bool = True) -> None:
    more = found.name == "more"
    rows = (
        [simulator_sized(row) for row in (FURTHER_ROWS if more else MAIN_ROWS)]
        if setting.dry
        else FURTHER_ROWS
        if more
        else MAIN_ROWS
    )
    for row in rows[:1] if setting.tiny else rows:
        found.check(str(row), functools.partial(time_layer, setting, found, clock, row, kept))
    if not (more or setting.tiny):
        found.check(f"many adapters, {MULTI_LORA_ROWS} rows", functools.partial(time_multi_lora, setting, found, clock, kept))


def simulator_sized(row: Row) -> Row:
    """The same in sizes that a simulator runs in a second, and no two rows alike."""
    return row._replace(m=row.m if row.m <= 64 else 100 + row.m.bit_length(), k=row.k // 32 + 8, n=row.n // 64 + 8)


def time_layer(setting: Setting, found: StageFindings, clock: Clock, row: Row, kept: bool) -> None:
    with setting.as_dispatched():
        calls = contenders(setting, row)
        ran, slow = backends_used(calls["ours"])
        moved = speed.least_bytes(row.m, row.k, row.n, row.r, row.backward)
        made = speed.measurement_row(
            setting, calls, clock, moved, op="lora_linear", kind=row.kind,
            what="forward + backward" if row.backward else "forward", dropout=row.dropout, M=row.m, K=row.k, N=row.n, r=row.r,
            adapters=str(row.adapters)[6:], ran=ran,
        )  # fmt: skip
    add_timed_row(found, made, slow, kept)


def add_timed_row(found: StageFindings, made: dict[str, Any], slow: list[str], kept: bool) -> None:
    if kept:
        print(f"    {', '.join(made['ran'])}", flush=True)
        speed.add_checked_row(found, made, slow)


def contenders(setting: Setting, row: Row) -> dict[str, Callable[[], object]]:
    """What is timed, on one base weight. Those that compute the same thing, without dropout, are
    held to do so."""
    device, dora = setting.device, row.kind == "dora"
    torch.manual_seed(0)
    stock = make_peft_layer(row.k, row.n, row.r, DTYPE, device, row.dropout, dora)
    ours = fuse_layer(make_peft_layer(row.k, row.n, row.r, DTYPE, device, row.dropout, dora, stock.base_layer))
    for made in (stock, ours):
        for each in (made.lora_A, made.lora_B, made.lora_magnitude_vector):
            each.to(row.adapters)
    ours.load_state_dict(stock.state_dict())
    w = stock.base_layer.weight
    a, b = (nn.Parameter(each["default"].weight.detach().to(DTYPE)) for each in (stock.lora_A, stock.lora_B))
    magnitude = nn.Parameter(stock.lora_magnitude_vector["default"].weight.detach().to(DTYPE)) if dora else None
    x = torch.randn(row.m, row.k, device=device, dtype=DTYPE, requires_grad=row.backward)
    dy = torch.randn(row.m, row.n, device=device, dtype=DTYPE)

    def timed_call(function: Callable[..., Any], leaves: list[Any], *args: Any) -> Callable[[], Any]:
        def call() -> Any:
            if row.backward:
                return torch.autograd.grad(function(x, *args), [x, *leaves], dy)
            with torch.no_grad():
                return function(x, *args)

        return call

    def trained(module: Any) -> list[Any]:
        return [p for p in module.parameters() if p.requires_grad]

    own = [p for p in (a, b, magnitude) if p is not None]
    args = (w, a, b, 2.0, magnitude, row.dropout)
    torch._dynamo.reset()
    # inductor for the CPU would run a C++ compiler, minutes of nothing that a GPU does
    how: dict[str, Any] = {"backend": "aot_eager"} if setting.dry else {"dynamic": False}
    calls = {
        "ours": timed_call(ours, trained(ours)), "linear": timed_call(stock.base_layer, []),
        "peft": timed_call(stock, trained(stock)), "addmm": timed_call(rivals.lora_by_addmm, own, *args),
        "compile": timed_call(torch.compile(rivals.lora_as_written, **how), own, *args),
    }  # fmt: skip
    if not row.dropout:
        assert_same_results(calls)
    return calls


def assert_same_results(calls: dict[str, Callable[[], Any]]) -> None:
    """y, or the gradient of x, of all that are to be compared is one thing but for rounding."""
    first = {name: call() for name, call in calls.items() if name != "linear"}
    first = {name: (t if isinstance(t, torch.Tensor) else t[0]).double() for name, t in first.items()}
    for name, t in first.items():
        error = rms(t - first["peft"]) / rms(first["peft"])
        assert error <= 0.02, f"{name} computes something else than peft: {error:.3f}"


def time_multi_lora(setting: Setting, found: StageFindings, clock: Clock, kept: bool) -> None:
    from bench import multi_lora

    rows, size = (5, 64) if setting.dry else (MULTI_LORA_ROWS, 4096)
    with setting.as_dispatched(), torch.no_grad():
        with torch.device(setting.device):
            calls, used = multi_lora.contenders(rows, size, [8, 16, 32, 64], "bfloat16", "distinct")
        ran, slow = backends_used(calls["ours"])
        moved = used + 2 * (size * size + 2 * rows * size)
        made = speed.measurement_row(
            setting, calls, clock, moved, op="multi_lora", kind="mixed ranks", what="forward", dropout=0.0, M=rows, K=size,
            N=size, adapters="bfloat16", ran=ran,
        )  # fmt: skip
    add_timed_row(found, made, slow, kept)
