"""`python -m bench.never_slower`: is a fused layer ever slower than PEFT's and than plain PyTorch?
Prints every case where it is, with the ratio; exit status 1 where there is one.

    --levels avx2 avx512    instruction sets of ours; all that this processor runs if not given
    --dtypes float32        of float32, bfloat16, float16
    --shapes 576 1024       square layers
    --tokens 1 64 --ranks 8 --kinds lora dora --what forward step
    --dropout 0.1           of the adapters, which train; 0 if not given
    --threads 1             by the time of one core, which a busy machine disturbs least
    --seconds 0.3           of each case, at least; --limit 30 leaves out what would take longer
    --all                   prints what is not slower, too
    --out FILE              JSON

Ours must take at most 1.02 times the best of both, by the medians of interleaved rounds on one base
weight. A case over that is measured twice more, and the middle ratio counts. Each level runs in a
process of its own, in which PyTorch's libraries are held to it, too: ATEN_CPU_CAPABILITY,
ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS, which MKL heeds on Intel's processors alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ALLOWED = 1.02
DTYPES, SHAPES = ("float32", "bfloat16", "float16"), (576, 1024, 4096, 11008)
TOKENS, RANKS, KINDS = (1, 4, 16, 64, 256, 1024), (8, 64), ("lora", "dora")
WHAT = ("forward", "step")
"""Without gradients; forward and backward."""
HELD_TO = {
    "portable": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "ATEN_CPU_CAPABILITY": "avx512"},
    "amx": {},
}
"""What the environment of PyTorch's libraries says so that they have no more than a level of ours;
read when torch is imported."""


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured, the short ones first."""
    for size in options.shapes:
        for what in options.what:
            for dtype in options.dtypes:
                for tokens in options.tokens:
                    for r in options.ranks:
                        for kind in options.kinds:
                            case = {"dtype": dtype, "size": size, "M": tokens, "r": r, "kind": kind, "what": what}
                            yield {**case, "dropout": options.dropout}


def ratio(seconds: dict[str, float]) -> float:
    """Ours over the best of PEFT and plain PyTorch."""
    return seconds["ours"] / min(seconds["peft"], seconds["torch"])


def measure(case: dict[str, Any], seconds: float, limit: float) -> dict[str, Any] | None:
    """The case with the seconds of each and the ratio; None where it would take longer than
    `limit`."""
    import torch

    from bench.lora_linear import contenders
    from lora_kernels.commands.paired import interleaved_medians

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    size, backward = case["size"], case["what"] == "step"
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    calls = contenders(size, size, case["M"], case["r"], dtype, backward, case["kind"] == "dora", dropout=case["dropout"])
    calls.pop("linear")
    if (measured_once(calls["peft"]) + measured_once(calls["ours"])) * MIN_CALLS > limit:
        return None
    for call in calls.values():
        warm_up(call, seconds)
    found = [interleaved_medians(calls, seconds=seconds, clock=clock)]
    if ratio(found[0]) > ALLOWED:
        found += [interleaved_medians(calls, seconds=seconds, clock=clock) for _ in range(2)]
    middle = sorted(found, key=ratio)[len(found) // 2]
    return {**case, "seconds": middle, "ratio": ratio(middle)}


MIN_CALLS = 18  # of each contender, at least


def warm_up(call: Any, seconds: float) -> None:
    """Dozens of calls: the interpreter and the allocator are slower in the first ones."""
    end = time.perf_counter() + seconds
    for _ in range(60):
        call()
        if time.perf_counter() > end:
            return


def measured_once(call: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def line(row: dict[str, Any]) -> str:
    """A case in words."""
    s = row["seconds"]
    rival = min(("peft", "torch"), key=s.__getitem__)
    dropout = f" dropout={row['dropout']}" if row["dropout"] else ""
    return (
        f"{row['level']:10} {row['dtype']:8} {row['kind']} {row['what']:7} {row['size']}² M={row['M']} r={row['r']}{dropout}:"
        f" {row['ratio']:.2f} × {'PEFT' if rival == 'peft' else 'PyTorch'}, {1e6 * s[rival]:.0f} µs"
    )


def run_level(options: argparse.Namespace) -> int:
    """Measures one level in this process, a line of JSON for each case."""
    import torch

    from lora_kernels import _cpu

    _cpu.set_level(options.held)
    torch.set_num_threads(options.threads)
    for case in cases(options):
        row = measure(case, options.seconds, options.limit)
        print(json.dumps({**case, "level": options.held} if row is None else {**row, "level": options.held}), flush=True)
    return 0


def rows_of(level: str, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a process of its own measures on a level."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.never_slower", *argv, "--held", level]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **HELD_TO.get(level, {})}) as child:
        assert child.stdout is not None
        yield from map(json.loads, child.stdout)
    if child.returncode:
        raise RuntimeError(f"bench.never_slower: {level} ended with {child.returncode}")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many were slower, and the middle ratio."""
    measured = [row["ratio"] for row in rows if "ratio" in row]
    slower = sum(each > ALLOWED for each in measured)
    middle = f", median ratio {statistics.median(measured):.2f}" if measured else ""
    return f"{slower} of {len(measured)} slower than {ALLOWED}{middle}; {len(rows) - len(measured)} left out"


def probability(text: str) -> float:
    """A number from 0 on and below 1, as a dropout is."""
    p = float(text)
    if not 0.0 <= p < 1.0:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), found {text}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a case is slower."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="bench.never_slower")
    for name, of in (("dtypes", DTYPES), ("kinds", KINDS), ("what", WHAT)):
        parser.add_argument(f"--{name}", nargs="+", choices=of, default=of)
    for name, numbers in (("shapes", SHAPES), ("tokens", TOKENS), ("ranks", RANKS)):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=numbers)
    parser.add_argument("--levels", nargs="+")
    parser.add_argument("--dropout", type=probability, default=0.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--held", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.held:
        return run_level(options)

    from bench.paired import machine_stamp, write_measured
    from lora_kernels import _cpu

    rows: list[dict[str, Any]] = []
    for level in options.levels or _cpu.levels():
        own = []
        for row in rows_of(level, argv):
            own.append(row)
            if "ratio" in row and (options.all or row["ratio"] > ALLOWED):
                print(line(row), flush=True)
        print(f"{level}: {summary(own)}", flush=True)
        rows += own
        if options.out:
            write_measured(options.out, {**machine_stamp(), "threads": options.threads}, rows)
    return int(any(row.get("ratio", 0) > ALLOWED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
