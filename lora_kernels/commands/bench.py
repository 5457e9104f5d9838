"""`bench`: is it faster for me? A layer, or a model, without an adapter, with PEFT's and with ours,
on the same weights."""

import copy
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lora_kernels.commands.paired import interleaved_medians
from lora_kernels.integrations import fuse
from lora_kernels.ops import explain

SHAPE = re.compile(r"(\d+)x(\d+)")
CONTENDERS = ("base", "PEFT", "ours")
METHODS, PASSES = ("LoRA", "DoRA"), ("forward", "step")

Times = dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True)
class Job:
    """What is timed: modules that share all weights, and how one is called on an input [tokens, in]
    that wants its gradient."""

    name: str
    modules: dict[str, nn.Module]
    x: Tensor
    call: Callable[[nn.Module, Tensor], Tensor]
    layers: str
    """How many, and how many of them are PEFT's."""


def bench(
    what: str, tokens: int = 512, rank: int = 16, dtype: str | None = None, device: str | None = None, seconds: float = 3.0,
    plot: Path | None = None,
) -> int:  # fmt: skip
    """Times `what`, a shape or a model, and prints a table; the exit status."""
    shape = SHAPE.fullmatch(what)
    wanted = ["peft", *([] if shape else ["transformers"]), *(["matplotlib"] if plot else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        print(f"bench: {' and '.join(missing)} not installed: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    if plot and not plot.parent.is_dir():
        print(f"bench: {plot.parent} is no folder for the picture", file=sys.stderr)
        return 2
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = None if dtype is None else getattr(torch, dtype)
    console, times, by = Console(), Times(), ""
    try:
        base = _make_layer(shape, kind, place) if shape else _load_model(what, kind, place)
    except (OSError, ValueError) as error:
        told = f"{what!r} is neither a shape such as 4096x4096 nor a model that loads"
        print(f"bench: {told}: {_first_line(error)}", file=sys.stderr)
        return 2
    for method in METHODS:
        job = _make_job(what, base, bool(shape), method, tokens, rank)
        with torch.no_grad():
            ran = {d.chosen for d in explain(job.call, job.modules["ours"], job.x).decisions}
        by = ", ".join(sorted(ran))
        for step in PASSES:
            with console.status(f"{method}, {step}"):
                times[method, step] = measure(job, step == "step", seconds)
    where = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{what}, {job.layers}, {tokens} tokens, rank {rank}, {str(job.x.dtype)[6:]}, {where}, backend {by}"
    console.print(title, soft_wrap=True)
    console.print(times_table(times))
    if busy := _load_warning():
        console.print(busy, soft_wrap=True)
    console.print(headline(times))
    if plot:
        from lora_kernels.commands.picture import draw_picture

        draw_picture(times, headline(times), title, plot)
        console.print(f"picture: {plot}")
    return 0


def measure(job: Job, backward: bool, seconds: float) -> dict[str, float]:
    """The median seconds of each contender, in turn in one process."""
    x = job.x.requires_grad_(backward)
    parameters = [p for m in job.modules.values() for p in m.parameters() if p.requires_grad]
    dy = torch.randn_like(job.call(job.modules["base"], x))

    def run_step(module: nn.Module) -> None:
        if not backward:
            with torch.no_grad():
                job.call(module, x)
            return
        job.call(module, x).backward(dy)
        for t in (x, *parameters):
            t.grad = None

    wait = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    return interleaved_medians({name: lambda m=m: run_step(m) for name, m in job.modules.items()}, seconds=seconds, wait=wait)  # type: ignore[misc]


def times_table(times: Times) -> Table:
    """Milliseconds, and how ours compares."""
    made = Table()
    made.add_column("")
    for name in ("base, ms", "PEFT, ms", "ours, ms", "beside PEFT", "over base"):
        made.add_column(name, justify="right")
    for (method, step), t in times.items():
        style = "" if t["ours"] <= t["PEFT"] else "yellow"
        over = f"{t['ours'] / t['base'] - 1:+.0%}"
        made.add_row(f"{method} {step}", *(f"{t[name] * 1e3:.3g}" for name in CONTENDERS), speedup_label(t), over, style=style)
    return made


def speedup_label(t: dict[str, float]) -> str:
    """How much faster ours is than PEFT, or slower."""
    faster = t["PEFT"] / t["ours"]
    if 0.99 < faster < 1.01:
        return "as fast"
    return f"{faster:.2f}x faster" if faster >= 1 else f"{1 / faster:.2f}x slower"


def headline(times: Times) -> str:
    """The answer in a sentence."""
    return "A step beside PEFT's: " + ", ".join(f"{method} {speedup_label(times[method, 'step'])}" for method in METHODS)


def _make_layer(shape: re.Match[str], dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    n_in, n_out = map(int, shape.groups())
    return nn.Sequential(nn.Linear(n_in, n_out, bias=False, dtype=dtype or torch.float32, device=device)).requires_grad_(False)


def _load_model(name: str, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    import transformers

    # 4.56 gave it another name
    key = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(name, **{key: dtype or "auto"})
    return model.to(device).eval().requires_grad_(False)


def _make_job(name: str, base: Any, is_layer: bool, method: str, tokens: int, rank: int) -> Job:
    import peft
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(0)
    targets = ["0"] if is_layer else "all-linear"
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=method == "DoRA", target_modules=targets)
    stock = peft.get_peft_model(_sharing(base), config)
    for module in stock.modules():
        if isinstance(module, LoraLayer):  # B is zero at first, which no training leaves it
            for b in module.lora_B.values():
                nn.init.normal_(b.get_parameter("weight"), std=0.02)
    ours = _sharing(stock)
    report = fuse(ours)
    count, left = len(report.fused), len(report.left)
    layers = "one layer" if count == 1 and not left else f"{count} layers" + (f" and {left} left to PEFT" if left else "")
    modules = dict(zip(CONTENDERS, (base, stock, ours), strict=True))
    if is_layer:
        weight = base[0].weight
        return Job(name, modules, torch.randn(tokens, weight.shape[1]).to(weight), lambda m, x: m(x), layers)
    embedding = base.get_input_embeddings().weight
    x = embedding.detach()[torch.randint(len(embedding), (1, tokens), device=embedding.device)].clone()
    return Job(name, modules, x, lambda m, x: m(inputs_embeds=x, use_cache=False).logits, layers)


def _sharing(module: Any) -> Any:
    """A copy with the same tensors: of three models in one process one has weights."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(t): t for t in tensors})


def _load_warning() -> str | None:
    """What to know of the times if other programs run."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load <= 1.5 * cores:
        return None
    return f"The load is {load:.1f} on {cores} cores: threads wait for each other, and an idle machine may say otherwise."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
