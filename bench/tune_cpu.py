"""`python -m bench.tune --cpu`: times the ways of a CPU layer and writes rows of cpu.json, one for
each level and dtype, for the processor that is here.

    --cpu --levels avx2 avx512     all that this processor runs if not given
    --cpu --threads 2              one if not given, by its core's time and the fastest round
    --cpu --quick                  fewer shapes and tokens, to see that it works
    --cpu --out DIR                where cpu.json goes; the package's own if not given

Each candidate runs the whole op, with its thin passes, in interleaved rounds. At each number of
tokens the one with the least mean logarithm over the shapes wins, and a limit between two numbers
of tokens is their geometric mean. As in bench.never_slower, each level has a process of its own, in
which PyTorch's libraries are held to it.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.never_slower import DTYPES, HELD_TO
from lora_kernels.ops.tables import cpu as table
from lora_kernels.ops.tables.cpu import ALL, NEVER, CpuRow

TOKENS, SIZES, RANK = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 1024), (576, 1024, 4096), 16
LOST = 3.0
"""A candidate that takes so many times as long as the best, and more so than for fewer tokens, is
not timed for more."""

Times = Mapping[tuple[int, int], Mapping[str, float]]
"""By size and tokens: the seconds of each candidate."""


def candidates(level: str, dtype: str, direction: str) -> dict[str, CpuRow]:
    """A row for each, that runs it whatever the tokens; "gemm" is what no number of a row names."""
    plain = CpuRow(level, dtype, 0, 1, 0, NEVER, 1, 0, NEVER, 64)
    found = {"gemm": plain} if dtype == "float32" else {"gemm": plain, "addmm": replace(plain, addmm_from=0, addmm_back_from=0)}
    if direction == "forward":
        return {"small": replace(plain, small=ALL), "packed": replace(plain, packed=ALL), **found}
    return {"small": replace(plain, small_back=ALL), "streamed": replace(plain, streamed=ALL), **found}


def measure(
    level: str, dtype: str, direction: str, rows: Mapping[str, CpuRow], quick: bool = False, codes: bool = False
) -> Times:
    """Runs candidates; each of `rows` is one. `codes`: over a W of 4 bits."""
    import torch

    from lora_kernels.commands.paired import interleaved_medians

    one = torch.get_num_threads() == 1
    clock, pick = (time.process_time, min) if one else (time.perf_counter, statistics.median)
    times: dict[tuple[int, int], dict[str, float]] = {}
    for size in SIZES[:1] if quick else SIZES:
        alive, before = dict(rows), dict.fromkeys(rows, math.inf)
        for tokens in TOKENS[::4] if quick else TOKENS:
            calls = {name: layer_call(row, size, tokens, direction, codes) for name, row in alive.items()}
            taken = interleaved_medians(calls, rounds=15, seconds=0.01 if quick else 0.15, clock=clock, pick=pick)
            times[size, tokens] = taken
            ratios = {name: each / min(taken.values()) for name, each in taken.items()}
            alive = {name: row for name, row in alive.items() if ratios[name] < max(LOST, before[name])}
            before = ratios
    return times


def layer_call(row: CpuRow, size: int, tokens: int, direction: str, codes: bool = False) -> Callable[[], object]:
    """One direction of a LoRA layer by a row, over a plain W or one of 4 bits."""
    import torch

    from lora_kernels import QuantisedWeight, lora_linear
    from lora_kernels.ops.cpu_gemm import forced_choice

    dtype, generator = getattr(torch, row.dtype), torch.Generator().manual_seed(0)
    x, w, a, b = (
        (scale * torch.randn(shape, generator=generator)).to(dtype)
        for shape, scale in (((tokens, size), 1), ((size, size), 0.03), ((RANK, size), 0.03), ((size, RANK), 0.02))
    )
    dy = x.clone()
    if codes:
        some = torch.randint(256, (size * size // 2,), generator=generator).to(torch.uint8)
        w = QuantisedWeight(some, w.shape, torch.full((size * size // 64,), 0.03), 64, dtype, torch.linspace(-1, 1, 16))
    if direction == "forward":

        def forward() -> object:
            with forced_choice(row), torch.no_grad():
                return lora_linear(x, w, a, b, 2.0)

        return forward
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = lora_linear(x, w, a, b, 2.0)

    def backward() -> object:
        with forced_choice(row):
            return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    return backward


def winners(times: Times, names: Sequence[str]) -> dict[int, str]:
    """Of each number of tokens the candidate with the least mean logarithm over the sizes; what was
    not timed there had lost before."""
    found = {}
    for tokens in sorted({tokens for _, tokens in times}):
        of = [taken for (_, t), taken in times.items() if t == tokens]
        worst = max(max(taken.values()) for taken in of) * LOST
        found[tokens] = min(names, key=lambda name: sum(math.log(taken.get(name, worst)) for taken in of))
    return found


def span(won: Mapping[int, str], name: str) -> tuple[int, int]:
    """From and up to how many tokens a candidate wins, the longest run; (1, 0) if never."""
    tokens, best = list(won), (0, 0)
    first = 0
    for i in range(len(tokens) + 1):
        if i == len(tokens) or won[tokens[i]] != name:
            best = max(best, (i - first, -first))
            first = i + 1
    if not best[0]:
        return 1, 0
    first, last = -best[1], -best[1] + best[0] - 1
    begin = 1 if first == 0 else math.isqrt(tokens[first - 1] * tokens[first]) + 1
    return begin, ALL if last == len(tokens) - 1 else math.isqrt(tokens[last] * tokens[last + 1])


def fit(level: str, dtype: str, forward: Times, back: Times, where: str) -> CpuRow:
    """The row of what was measured."""
    ahead, behind = list(candidates(level, dtype, "forward")), list(candidates(level, dtype, "backward"))
    ours, ours_back = [n for n in ahead if n != "addmm"], [n for n in behind if n != "addmm"]
    won_of_ours, won_back_of_ours = winners(forward, ours), winners(back, ours_back)
    begin, small = span(won_of_ours, "small")
    begin_back, small_back = span(won_back_of_ours, "small")
    packed, streamed = span(won_of_ours, "packed"), span(won_back_of_ours, "streamed")
    won, won_back = winners(forward, ahead), winners(back, behind)
    addmm_from = _from(span(won, "addmm"))
    small = min(small, span(won, "small")[1]) if begin == 1 else 0
    small_back = min(small_back, span(won_back, "small")[1]) if begin_back == 1 else 0
    addmm_back_from = _from(span(won_back, "addmm"))
    return CpuRow(
        level, dtype, small, *packed, addmm_from, *streamed, addmm_back_from, 64, 0, table.processor(), where, 0, small_back
    )


def _from(of: tuple[int, int]) -> int:
    """From where a candidate wins for good."""
    return of[0] if of[1] == ALL else NEVER


def fit_thin(row: CpuRow, times: Times) -> CpuRow:
    """With the limit of the library's thin passes, from the times of "own" and "library"."""
    begin, thin = span(winners(times, ["own", "library"]), "library")
    return replace(row, thin=thin if begin == 1 else 0)


def fit_codes(row: CpuRow, times: Times) -> CpuRow:
    """With the limit of the kernel that streams W's codes, from the times of "small" and "own"."""
    begin, small = span(winners(times, ["own", "small"]), "small")
    return replace(row, small_codes=small if begin == 1 else 0)


def run_level(level: str, threads: int, quick: bool) -> int:
    """Measures a level in this process, a line of JSON for each row."""
    import torch

    from lora_kernels import _cpu

    _cpu.set_level(level)
    torch.set_num_threads(threads)
    where = (
        f"{threads} threads"
        + (" by processor time, the fastest round" if threads == 1 else "")
        + f", torch {torch.__version__}"
    )
    for dtype in DTYPES:
        times = [measure(level, dtype, d, candidates(level, dtype, d), quick) for d in ("forward", "backward")]
        row = fit(level, dtype, *times, where)
        if dtype == "float32":
            own = measure(level, dtype, "backward", {"own": row, "library": replace(row, thin=ALL)}, quick)
            row = fit_thin(row, own)
        own = {"own": replace(row, small=0), "small": replace(row, small=ALL)}
        row = fit_codes(row, measure(level, dtype, "forward", own, quick, codes=True))
        print(json.dumps(asdict(row)), flush=True)
    return 0


def merged(old: Sequence[CpuRow], new: Sequence[CpuRow]) -> list[CpuRow]:
    """Old rows with new ones in the place of those of the same level, dtype and processor."""
    keys = {(row.level, row.dtype, row.processor): row for row in (*old, *new)}
    return list(keys.values())


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="bench.tune --cpu")
    parser.add_argument("--levels", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=table.FILE.parent)
    parser.add_argument("--held", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.held:
        return run_level(options.held, options.threads, options.quick)

    from lora_kernels import _cpu

    found: list[CpuRow] = []
    for level in options.levels or _cpu.levels():
        command = [sys.executable, "-m", "bench.tune", "--cpu", *argv, "--held", level]
        done = subprocess.run(
            command, env={**os.environ, **HELD_TO.get(level, {})}, stdout=subprocess.PIPE, text=True, check=True
        )
        print(done.stdout, end="", flush=True)
        found += [CpuRow(**json.loads(line)) for line in done.stdout.splitlines()]
    file = options.out / table.FILE.name
    table.write(merged(table.read(file) if file.exists() else (), found), file)
    print(file)
    return 0
