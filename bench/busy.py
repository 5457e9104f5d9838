"""`python -m bench.busy`: small calls on cores that other processes want, too.

    --busy N      processes that never rest (2); 0 for an idle machine
    --rounds N    calls of each, in turns (300)

PEFT is its formula in plain torch. Where a team of threads waits at a barrier for one that another
process keeps from its core, a call of 0.1 ms takes 20 to 100; so calls that are shorter than such a
stall run on one thread for a while (`csrc/bindings/team.h`).
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from bench.paired import machine_stamp
from lora_kernels import lora_linear

SHAPES = ((1, 1024), (1, 4096), (8, 1024), (64, 1024))  # tokens, in and out features


def times_of(tokens: int, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, ours and PEFT's in turns."""
    torch.manual_seed(0)
    w, a, b, x = (torch.randn(shape) for shape in ((size, size), (16, size), (size, 16), (tokens, size)))
    calls = {
        "PEFT": lambda: F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0,
        "ours": lambda: lora_linear(x, w, a, b, 2.0),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=300)
    given = parser.parse_args()
    print(machine_stamp(), f"{given.busy} busy processes, {torch.get_num_threads()} threads", sep="\n")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.busy)]
    try:
        print(f"{'tokens':>6} {'size':>5} {'PEFT µs, median':>16} {'ours':>8} {'ratio':>6} {'of means':>9} {'of 90 %':>8}")
        for tokens, size in SHAPES:
            times = times_of(tokens, size, given.rounds)
            median, mean, late = (
                [of(times[name]) * 1e6 for name in ("PEFT", "ours")]
                for of in (statistics.median, statistics.mean, lambda t: statistics.quantiles(t, n=10)[-1])
            )
            print(
                f"{tokens:6} {size:5} {median[0]:16.0f} {median[1]:8.0f} {median[1] / median[0]:6.2f}"
                f" {mean[1] / mean[0]:9.2f} {late[1] / late[0]:8.2f}"
            )
    finally:
        for each in busy:
            each.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
