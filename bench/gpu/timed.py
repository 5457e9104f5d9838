"""`--minutes N`: what is worth most first, each stage with a share of the time.

    s of 480  stage       what
         20   ceilings    the library's GEMMs, with torch.addmm and beta 1 too, copies, a launch
         90   essentials  every kernel at real tile sizes against float64, by every backend that
                          takes it
         60   witness     a textbook matmul with the register hazard of sm_90, 1000 times, and our
                          ops that had it, by each assembler: Triton's own, and one from 13.3 on
        150   rows        eight rows of speed: ours, the frozen linear, PEFT, "addmm" in plain
                          torch, torch.compile
         60   repeats     the same bits again, on other streams, in CUDA graphs
         45   tuned       bench.tune on a few shapes, into sm_<arch>.json beside the JSON file
         25   sanitizer   compute-sanitizer's memcheck on three cases
         30   more        further rows of speed; what is left of the time

A stage that ends early leaves its time to those behind it; one that runs out stops between two
checks, and the others are "not run: time". Where the module _cuda is not there and nvcc is, it is
built first. Kernels are compiled by a process for each core: the checks of `essentials`, `witness`
and `repeats` are shared among so many, and what `rows`, `tuned` and `more` will time is called once
before.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.gpu.record import Record
from bench.gpu.running import Work, not_run, run_in_processes


@dataclass(frozen=True)
class TimedStage:
    name: str
    module: str
    seconds: float
    """Of 480."""
    shared: bool = False
    """Its checks are shared among processes."""
    ahead: float = 0.0
    """The share of its time in which processes may compile."""


STAGES = (
    TimedStage("ceilings", "ceilings", 20), TimedStage("essentials", "essentials", 90, shared=True),
    TimedStage("witness", "witness", 60, shared=True), TimedStage("rows", "rows", 150, ahead=0.5),
    TimedStage("repeats", "repeats", 60, shared=True), TimedStage("tuned", "tuned", 45, ahead=0.5),
    TimedStage("sanitizer", "sanitizer", 25), TimedStage("more", "rows", 30, ahead=0.6),
)  # fmt: skip
LEAST_SHARE = 0.02  # of a stage's share: with less it does not begin


def schedule(
    seconds: float, clock: Callable[[], float], stages: tuple[TimedStage, ...] = STAGES
) -> Iterator[tuple[TimedStage, float | None]]:
    """Each stage with the seconds that it has as it begins; None where there are none left."""
    whole = sum(stage.seconds for stage in stages)
    began = planned = clock()
    for stage in stages:
        share = stage.seconds * seconds / whole
        planned += share
        now = clock()
        # who begins late has his share all the same, at the cost of the last ones
        left = min(began + seconds, max(planned, now + share)) - now
        yield stage, left if left > LEAST_SHARE * share else None


def run_stages(
    record: Record, minutes: float, words: list[str], cores: int, assemblers: dict[str, dict[str, str | None]],
    only: list[str] | None = None, each: Callable[..., None] = run_in_processes, clock: Callable[[], float] = time.monotonic,
    drawn: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """The stages in their order. `assemblers`: the environment of each that `witness` tries.
    `drawn` is called after rows."""
    stages = tuple(stage for stage in STAGES if only is None or stage.name in only)
    for stage, left in schedule(60 * minutes, clock, stages):
        if left is None:
            not_run(record, stage.name, "time")
            continue
        began = clock()
        if stage.name == "witness":
            for i, environment in enumerate(assemblers.values()):
                rest = (left - (clock() - began)) / (len(assemblers) - i)
                each(Work(stage.name, stage.module), record, rest, words, cores, environment)
        else:
            if stage.ahead and cores > 1:
                each(Work(stage.name, stage.module, "warm"), record, left * stage.ahead, words, cores)
            rest = left - (clock() - began)
            each(Work(stage.name, stage.module), record, rest, words, cores if stage.shared else 1)
        entry = record.finish_stage(stage.name, share_seconds=round(left, 1), wall_seconds=round(clock() - began, 1))
        print(stage_summary(stage.name, entry), flush=True)
        if stage.module == "rows":
            drawn()


def stage_summary(name: str, stage: dict[str, Any]) -> str:
    """A line about a stage, and what failed in it."""
    lines = [f"{name:12} {stage['status']:8} {stage['checked']} checks, {stage['failed']} failed"]
    lines += [f"    {text.splitlines()[0][:300]}" for text in stage["failures"]]
    reasons = stage["not_run"]
    shown = reasons if len(reasons) <= 6 else [*reasons[:5], f"and {len(reasons) - 5} more, in the JSON file"]
    return "\n".join(lines + [f"    not run: {text[:300]}" for text in shown])
