"""`python -m bench`: prints every ratio, the losing ones too, and with --out writes them with their
circumstances.

    --quick             fewer shapes, one rank
    --threads 1 2       how many threads, one after the other
    --out FILE          JSON; `python -m bench.report FILE` draws it and writes the tables of
                        docs/benchmarks.md
    --isa avx2          as on a processor without native bf16 (bf16 only, and without what takes
                        torch minutes)
"""

import argparse
import os
from pathlib import Path


def main() -> None:
    """Runs the benchmarks."""
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, one rank")
    parser.add_argument("--threads", type=int, nargs="+", help="torch's own number if not given")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--isa", choices=["avx2"], help="as on a processor without native bf16")
    options = parser.parse_args()
    if options.isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = options.isa.upper()  # read when torch is imported

    import torch

    from bench import lora_linear, memory, weight_norm
    from bench.paired import machine_stamp, write_measured
    from lora_kernels import _cpu

    limits = {}
    if options.isa:
        _cpu.set_level(options.isa)
        limits = {"dtypes": [torch.bfloat16], "slow_backward": True}
    found, circumstances = [], machine_stamp()

    def add_row(row):
        found.append(row)
        print_row(row)
        if options.out:
            write_measured(options.out, circumstances, found)

    for threads in options.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for module in (weight_norm, lora_linear):
            for row in module.measurements(options.quick, **limits):
                add_row(row)
    for row in memory.measurements():
        add_row(row)


def print_row(row):
    """One line."""
    shape = " ".join(f"{key}={row[key]}" for key in ("M", "K", "N", "r") if key in row)
    name = " ".join((row["op"], row["kind"], row["dtype"], row["what"]))
    if "bytes" in row:
        values = "  ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in row["bytes"].items())
        print(f"{name:50} {shape:26} {values}", flush=True)
        return
    ratios = "  ".join(f"{key} {value:.3f}" for key, value in row["ratios"].items())
    rho = f"  ρ {row['rho']:.3f}" if "rho" in row else ""
    us = row["seconds"]["ours"] * 1e6
    print(f"{name:50} {shape:26} {row['threads']} threads  ours {us:.0f} µs{rho}  {ratios}", flush=True)


if __name__ == "__main__":
    main()
