"""Two models, stock PEFT and fused, from one seed, that step in turn on the same batches."""

import statistics
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from plans import TrainingPlan
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from smollm2 import load_base
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kernels import explain, fuse


@dataclass
class Run:
    """One model on its way through the training."""

    name: str
    model: peft.PeftModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step but the first
    peak_bytes: int = 0

    def summary(self, before: float, after: float) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "losses": self.losses,
            "held_out_before": before,
            "held_out_after": after,
            "step_seconds": self.seconds,
            "median_step_seconds": statistics.median(self.seconds),
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Backends:
    """What ran in one forward pass of a fused model."""

    chosen: dict[str, list[str]]
    fused_layers: int
    adapted_layers: int


def build_runs(method: str, dtype: torch.dtype, base: str, plan: TrainingPlan, seed: int) -> tuple[Run, Run]:
    """(stock, fused): the same model twice, the second with our layers."""
    runs = []
    for name in ("stock", "fused"):
        torch.manual_seed(seed)
        model = peft.get_peft_model(load_base(dtype, base), lora_config(method))
        if name == "fused":
            fuse(model, strict=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        runs.append(Run(name, model, torch.optim.AdamW(trained, lr=plan.learning_rate)))
    return runs[0], runs[1]


def lora_config(method: str) -> peft.LoraConfig:
    """r=8 on all linear layers. No dropout: the two runs would draw different masks and could not
    be compared."""
    return peft.LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        use_dora=method == "dora",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def backends_used(model: peft.PeftModel, ids: Tensor) -> Backends:
    """Which backend each op of a fused model takes, and how many of its adapted layers take
    ours."""
    with torch.no_grad():
        decisions = explain(model, input_ids=ids, use_cache=False).decisions
    chosen = {op: sorted({d.chosen for d in decisions if d.op == op}) for op in sorted({d.op for d in decisions})}
    fused = sum(d.op == "lora_linear_forward" for d in decisions)
    return Backends(chosen, fused, sum(isinstance(module, LoraLayer) for module in model.modules()))


def mean_loss(model: torch.nn.Module, rows: Tensor) -> float:
    """Mean loss over the rows [rows, tokens], four at a time, in eval mode."""
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in rows.split(4)]
    return sum(losses) / len(rows)


def train_both(stock: Run, fused: Run, rows: Tensor, steps: int, console: Console, title: str) -> None:
    """Steps both runs in turn, one row each step, the other one first in every second step.

    The first step also measures memory and warms up: it is on the loss curve, but not among the
    times.
    """
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, loss="")
        for index in range(steps):
            batch = rows[index % len(rows)][None]
            for run in (stock, fused) if index % 2 == 0 else (fused, stock):
                if index == 0:
                    with PeakMemory() as memory:
                        train_step(run, batch)
                    run.peak_bytes = memory.peak
                else:
                    run.seconds.append(train_step(run, batch))
            loss = f"loss {stock.losses[-1]:.6f} stock, {fused.losses[-1]:.6f} fused"
            progress.update(task, advance=1, loss=loss)


def train_step(run: Run, batch: Tensor) -> float:
    """One optimizer step; appends its loss and returns its seconds."""
    run.model.train()
    start = time.perf_counter()
    loss = run.model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    seconds = time.perf_counter() - start
    run.losses.append(loss.item())
    return seconds


class PeakMemory(TorchDispatchMode):
    """The most bytes held at once by tensors made inside the block.

    Unlike the process's size, this is exact and separates two models in one process. Scratch that a
    kernel takes for itself without a tensor is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in given | self._storages:
                self._add_storage(tensor.untyped_storage())
        return result

    def _add_storage(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._storages.add(address)
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._remove_storage, address, size)

    def _remove_storage(self, address: int, size: int) -> None:
        self._storages.discard(address)
        self._held -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
