"""Time and bandwidth of a Llama-3-8B's layers in bfloat16, ours and its rivals on one base weight,
in interleaved rounds:

    linear    nn.Linear alone, frozen: what a merged model costs
    ours      PEFT's layer after `fuse`
    peft      PEFT's layer
    compile   PEFT's layer through torch.compile, for r = 16
    addmm     `rivals.Addmm`, without DoRA

Bytes are the least that the work can move: each operand once. `tune.events` is the clock: CUDA
events, L2 flushed before each call, a random order in each round, the median.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.rivals import Addmm
from bench.gpu.setting import Setting, StageFindings, backends_used, fuse_layer, make_peft_layer
from bench.tune import LAYERS, median_event_seconds
from lora_kernels import merged_weight, weight_norm
from lora_kernels.ops import launch
from lora_kernels.ops.chips import nearest_chip

TOKENS, RANKS, DROPOUTS = [1, 16, 256, 1024, 8192], [16, 64], [0.0, 0.1]
DTYPE = torch.bfloat16
Calls = dict[str, Callable[[], object]]
Clock = Callable[[Calls], dict[str, float | None]]


def run_stage(setting: Setting, found: StageFindings) -> None:
    """A row fails if one of its contenders does not run, or ours on the reference; no speed is a
    failure."""
    clock = run_untimed if setting.dry else median_event_seconds
    with setting.as_dispatched():
        for shape in layer_cases(setting):
            found.check(f"{shape}", lambda shape=shape: add_checked_row(found, *layer_row(setting, clock, *shape)))
        for k, n, r in matrices(setting):
            for make in (norm_row, merge_row):
                name = f"{make.__name__} {k}×{n} r {r}"
                found.check(name, lambda make=make, at=(k, n, r): add_checked_row(found, *make(setting, clock, *at)))


def run_untimed(calls: Calls) -> dict[str, float | None]:
    """The clock of a dry run: each call runs, and no time is taken, because a simulator's would be
    taken for a GPU's."""
    for call in calls.values():
        call()
    return dict.fromkeys(calls)


def matrices(setting: Setting) -> Iterator[tuple[int, int, int]]:
    layers = [(48, 32)] if setting.dry else LAYERS["Llama-3-8B"]
    for k, n in layers:
        for r in [4] if setting.dry else RANKS[:1] if setting.quick else RANKS:
            yield k, n, r


def layer_cases(setting: Setting) -> Iterator[tuple[int, int, int, int, bool, float, bool]]:
    """k, n, r, tokens, DoRA or not, dropout, with the backward or not."""
    for k, n, r in matrices(setting):
        for tokens in [5] if setting.dry else [1, 256, 8192] if setting.quick else TOKENS:
            for use_dora in (False, True):
                for dropout in [0.0] if setting.tiny or setting.quick else DROPOUTS:
                    for backward in (False, True):
                        if not (setting.tiny and use_dora):
                            yield k, n, r, tokens, use_dora, dropout, backward


def layer_row(
    setting: Setting, clock: Clock, k: int, n: int, r: int, tokens: int, use_dora: bool, dropout: float, backward: bool
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    calls = contenders(setting, k, n, r, tokens, use_dora, dropout, backward)
    ran, slow = backends_used(calls["ours"])
    made = measurement_row(
        setting, calls, clock, least_bytes(tokens, k, n, r, backward), op="lora_linear", kind="dora" if use_dora else "lora",
        what="forward + backward" if backward else "forward", dropout=dropout, M=tokens, K=k, N=n, r=r, ran=ran,
    )  # fmt: skip
    return made, slow


def contenders(
    setting: Setting, k: int, n: int, r: int, tokens: int, use_dora: bool, dropout: float, backward: bool
) -> Calls:  # fmt: skip
    """The calls to time."""
    device = setting.device
    torch.manual_seed(0)
    stock = make_peft_layer(k, n, r, DTYPE, device, dropout, use_dora)
    ours = fuse_layer(make_peft_layer(k, n, r, DTYPE, device, dropout, use_dora, stock.base_layer))
    x = torch.randn(tokens, k, device=device, dtype=DTYPE, requires_grad=backward)
    dy = torch.randn(tokens, n, device=device, dtype=DTYPE)
    a, b = (each["default"].weight for each in (stock.lora_A, stock.lora_B))

    def timed_call(module, leaves):
        def run():
            if backward:
                return torch.autograd.grad(module(x), [x, *leaves], dy)
            with torch.no_grad():
                return module(x)

        return run

    def trained(module):
        return [p for p in module.parameters() if p.requires_grad]

    calls = {
        "linear": timed_call(stock.base_layer, []),
        "ours": timed_call(ours, trained(ours)),
        "peft": timed_call(stock, trained(stock)),
    }
    if r == RANKS[0] and not setting.quick and not setting.dry:
        torch._dynamo.reset()
        calls["compile"] = timed_call(torch.compile(stock, dynamic=False), trained(stock))
    if not use_dora:
        w = stock.base_layer.weight
        calls["addmm"] = timed_call(lambda x: Addmm.apply(x, w, a, b, 2.0, dropout), [a, b])
    return calls


def least_bytes(m: int, k: int, n: int, r: int, backward: bool) -> int:
    """Bytes of a forward: x, W, A, B read and y written. Of a backward: dy, W, x, A, B read and dx,
    dA, dB written. Without h, which the backward could compute again."""
    adapter = r * (k + n)
    elements = m * k + n * k + adapter + m * n
    if backward:
        elements += m * n + n * k + m * k + adapter + m * k + adapter
    return elements * DTYPE.itemsize


def norm_row(setting: Setting, clock: Clock, k: int, n: int, r: int) -> tuple[dict[str, Any], list[str]]:
    w, a, b = tensors(setting, k, n, r)
    calls = {"ours": lambda: weight_norm(w, a, b, 2.0), "torch": lambda: torch.linalg.vector_norm(w + 2.0 * (b @ a), dim=1)}
    moved = (w.numel() + a.numel() + b.numel()) * DTYPE.itemsize + n * 4
    ran, slow = backends_used(calls["ours"])
    return measurement_row(
        setting, calls, clock, moved, op="weight_norm", kind="dora", what="norm", K=k, N=n, r=r, ran=ran
    ), slow


def merge_row(setting: Setting, clock: Clock, k: int, n: int, r: int) -> tuple[dict[str, Any], list[str]]:
    w, a, b = tensors(setting, k, n, r)
    calls = {"ours": lambda: merged_weight(w, a, b, 2.0), "torch": lambda: w + 2.0 * (b @ a)}
    moved = (2 * w.numel() + a.numel() + b.numel()) * DTYPE.itemsize
    ran, slow = backends_used(calls["ours"])
    return measurement_row(
        setting, calls, clock, moved, op="merged_weight", kind="lora", what="merge", K=k, N=n, r=r, ran=ran
    ), slow


def tensors(setting: Setting, k: int, n: int, r: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device=setting.device, dtype=DTYPE) for shape in ((n, k), (r, k), (n, r))]


def measurement_row(setting: Setting, calls: Calls, clock: Clock, moved: int, **what: Any) -> dict[str, Any]:
    """One measurement as plain values. Without a GPU it has no seconds, and so no ratio and no
    rate."""
    seconds = clock(calls)
    ours = seconds["ours"]
    made: dict[str, Any] = {**what, "dtype": str(DTYPE)[6:], "floor_bytes": moved, "seconds": seconds, "ratios": {}}
    if ours is not None:
        rivals = {name: taken for name, taken in seconds.items() if name != "ours" and taken is not None}
        made["ratios"] = {f"ours / {name}": ours / taken for name, taken in rivals.items()}
        if base := rivals.pop("linear", None):
            made["ratios"] |= {f"{name} / linear": taken / base for name, taken in rivals.items()}
        made["floor_bytes_per_second"] = moved / ours
        here = torch.empty(0, device=setting.device)
        # the nearest that is known
        on = nearest_chip(launch.architecture(here), launch.multiprocessors(here))
        made["share_of_the_vendors_rate"] = moved / ours / on.dram
    return made


def add_checked_row(found: StageFindings, made: dict[str, Any], slow: list[str]) -> None:
    """The row, and a failure where the reference ran."""
    add_and_print_row(found, made)
    assert not slow, "; ".join(slow)


def add_and_print_row(found: StageFindings, made: dict[str, Any]) -> None:
    found.add_measurement(made)
    shape = " ".join(f"{key}={made[key]}" for key in ("M", "K", "N", "r", "dropout") if key in made)
    name = f"{made['op']} {made['kind']} {made['what']}"
    if made["seconds"]["ours"] is None:
        print(f"    {name:40} {shape}: ran {', '.join(made['seconds'])}; no time taken", flush=True)
        return
    ratios = "  ".join(f"{key} {value:.3f}" for key, value in made["ratios"].items())
    rate = made["floor_bytes_per_second"] / 1e9
    print(f"    {name:40} {shape}  ours {made['seconds']['ours'] * 1e6:.1f} µs, {rate:.0f} GB/s  {ratios}", flush=True)
