"""`python -m bench.tune`: times the candidates of lora_kernels.ops.dispatch on this GPU and writes
its architecture's table.

    --quick      a few shapes, to see that it works
    --arch 90    refuses to run on another architecture
    --out DIR    where sm_<arch>.json goes; the package's own tables if not given
    --cpu        times this CPU instead and writes cpu.json: tune_cpu.py

Each shape's candidates and the library's GEMM alone run in interleaved rounds, in a random order
each, with L2 flushed before every call, and the median counts. The fastest becomes the choice near
that shape, and the efficiencies are those with which the cost model says what was measured; a class
of shapes that was not measured keeps its old ones. Then tiles of a few of these shapes are timed,
and rows for tiles.json beside it proposed (tune_tiles.py). Without a GPU: exit status 2.
"""

import argparse
import datetime
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from bench import tune_cpu, tune_tiles
from lora_kernels.ops import cost, dispatch, launch, tables
from lora_kernels.ops.chips import Chip, nearest_chip
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.tuning import Calls, Times, candidate_calls, measured_choice, median_event_seconds
from lora_kernels.testing.gates.launched import refusal

LAYERS = {
    "Llama-3-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "Llama-3-70B": [(8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)],
    "Qwen2.5-0.5B": [(896, 896), (896, 128), (896, 4864), (4864, 896)],
}
TOKENS, RANKS, DTYPES = [1, 16, 64, 256, 1024, 8192], [8, 16, 64, 128], [torch.bfloat16, torch.float16]
BASE = "base"  # the library's GEMM alone


def problems(quick: bool = False) -> Iterator[Problem]:
    """What is measured."""
    layers = LAYERS["Llama-3-8B"] if quick else [layer for model in LAYERS.values() for layer in model]
    for dtype in DTYPES[:1] if quick else DTYPES:
        for k, n in layers:
            for m in [16, 1024, 8192] if quick else TOKENS:
                for r in [16] if quick else RANKS:
                    for direction in ("forward", "backward"):
                        yield Problem(direction, m, k, (n,), (r,), dtype)


def write_measured_table(
    on: Chip, arch: int, shapes: Iterable[Problem], op: Callable[[Problem], Calls], clock: Callable[[Calls], Times],
    folder: str | Path, gpu: str, stamp: dict[str, str], backends: tuple[str, ...] = ("triton",),
) -> Path:  # fmt: skip
    """Measures and writes the table of `arch`; gives its path.

    `op` makes the calls of a problem by candidate, and that of BASE; `clock` takes the seconds of
    each. They are those of `backends`.
    """
    rows = []
    for p in shapes:
        every = op(p)
        planned = dispatch.choose_plan(p, arch, multiprocessors=on.multiprocessors, backends=backends)
        able = [c.name for c in planned.candidates if c.refused is None]
        taken = clock({name: every[name] for name in (*able, BASE)})
        rows.append((p, taken))
        print(f"{p}: " + ", ".join(f"{name} {seconds * 1e6:.1f} µs" for name, seconds in taken.items()), flush=True)
    choices = [measured_choice(p, {name: taken[name] for name in taken if name != BASE}) for p, taken in rows]
    made = fit_efficiencies(rows, on, tables.table_for(arch))._replace(
        arch=arch, gpu=gpu, measured=True, stamp=stamp, choices=tuple(choices)
    )
    path = tables.write_table(made, folder)
    dispatch.clear_caches()
    return path


def fit_efficiencies(rows: list[tuple[Problem, Times]], on: Chip, table: tables.Table) -> tables.Table:
    """The table with those efficiencies for which the model says what was measured: the median of
    each class."""
    ideal, found = dict.fromkeys(tables.SHARES, 1.0), defaultdict(list)
    for p, taken in rows:
        base = cost.gemm_step(p)
        lines = cost.rooflines(base, None, p, on, ideal)
        name = "library" if lines["compute"] > lines["memory"] else "stream"
        found[_size_class(p), name].append(max(lines["compute"], lines["memory"]) / (taken[BASE] - on.launch))
        if cost.LIBRARY in taken:
            launches = cost.candidate_launches(p)[cost.LIBRARY]
            pairs = zip(launches, [None, *launches], strict=False)
            thin = [cost.rooflines(step, before, p, on, ideal) for step, before in pairs if step.kind == "thin"]
            if name == "library" and all(max(each.values()) == each["memory"] for each in thin):
                rest = taken[cost.LIBRARY] - taken[BASE] - len(thin) * on.launch
                found[_size_class(p), "thin"].append(sum(each["memory"] for each in thin) / rest if rest > 0 else 1.0)
    table = _with_medians(table, found)
    found = defaultdict(list)
    for p, taken in rows:
        shares = table.efficiencies(p.is_half, p.m)
        for name, launches in cost.candidate_launches(p).items():
            at = next(i for i, step in enumerate(launches) if step.kind != "thin")
            # where the first launch may hide under the second, its time is no part of the sum
            if name not in taken or name == cost.LIBRARY or (name == "two launches" and p.m <= 64):
                continue
            lines = [cost.rooflines(s, before, p, on, shares) for s, before in zip(launches, [None, *launches], strict=False)]
            rest = taken[name] - len(launches) * on.launch - sum(max(x.values()) for i, x in enumerate(lines) if i != at)
            compute = cost.rooflines(launches[at], None, p, on, ideal)["compute"]
            if rest > 0 and compute > max(lines[at]["memory"], lines[at]["tile"]) / 2:
                found[_size_class(p), launches[at].kind].append(compute / rest)
    return _with_medians(table, found)


def _size_class(p: Problem) -> tuple[str, str]:
    return "half" if p.is_half else "single", next(name for name, most in tables.SIZES.items() if p.m <= most)


def _with_medians(table: tables.Table, found: dict[tuple[tuple[str, str], str], list[float]]) -> tables.Table:
    efficiency = {kind: {size: dict(shares) for size, shares in sizes.items()} for kind, sizes in table.efficiency.items()}
    for ((kind, size), name), values in found.items():
        efficiency[kind][size][name] = round(min(1.0, max(0.01, statistics.median(values))), 3)
    return table._replace(efficiency=efficiency)


def on_device(device: str) -> Callable[[Problem], Calls]:
    """The calls of a problem on the backends for GPUs, and the library's GEMM alone."""

    def device_calls(p: Problem) -> Calls:
        x, w, dy = (torch.randn(shape, dtype=p.dtype, device=device) for shape in ((p.m, p.k), (*p.n, p.k), (p.m, *p.n)))
        return {BASE: lambda: x @ w.T if p.direction == "forward" else dy @ w, **candidate_calls(p, device)}

    return device_calls


def circumstances() -> dict[str, str]:
    """What the figures hold for."""

    def program_output(*words: str) -> str:
        try:
            return subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
        except OSError:
            return ""

    changed = program_output("git", "status", "--porcelain")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": program_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "commit": program_output("git", "rev-parse", "--short", "HEAD") + (" and uncommitted changes" if changed else ""),
        "date": datetime.date.today().isoformat(),
    }


def main(argv: list[str] | None = None) -> int:
    """The exit status: 2 if there is no such GPU."""
    argv = sys.argv[1:] if argv is None else argv
    if "--cpu" in argv:
        return tune_cpu.main([word for word in argv if word != "--cpu"])
    parser = argparse.ArgumentParser(prog="bench.tune")
    parser.add_argument("--arch", type=int, help="refuse to run on another architecture; 90 is sm_90")
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--out", type=Path, default=Path(tables.FOLDER), help="the folder of the table")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print("bench.tune: it measures on an NVIDIA GPU, and torch finds none here; nothing was written", file=sys.stderr)
        return 2
    here = torch.empty(0, device="cuda")
    arch, multiprocessors = launch.architecture(here), launch.multiprocessors(here)
    if options.arch not in (None, arch):
        print(f"bench.tune: this GPU is sm_{arch}, not sm_{options.arch}; nothing was written", file=sys.stderr)
        return 2
    stamp = circumstances()
    shapes, on = problems(options.quick), nearest_chip(arch, multiprocessors)
    without = launch.refuse_binary(arch)
    print(f"bench.tune: CUDA C++ is {'measured, too' if without is None else f'left out: {without}'}")
    backends = ("triton",) if without else ("triton", "cuda")
    print(
        write_measured_table(
            on, arch, shapes, on_device("cuda"), median_event_seconds, options.out, stamp["gpu"], stamp, backends
        )
    )
    why = f"measured on {stamp['gpu']}, {stamp['date']}"
    try:
        rows = tune_tiles.propose(
            problems(quick=True), arch, partial(candidate_calls, device="cuda"), median_event_seconds,
            partial(refusal, arch=arch), options.out, why, backends=backends,
        )  # fmt: skip
    except FileNotFoundError as error:
        print(f"bench.tune: no tile was timed, since the gates cannot be asked: {error}", file=sys.stderr)
        return 0
    tune_tiles.report(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
