"""`python -m bench [--quick] [--threads N] [--out FILE]`: prints every ratio, writes them as JSON with their circumstances."""

import argparse
import json
from pathlib import Path

import torch

from bench import lora_linear, weight_norm
from bench.paired import stamp


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for module in (weight_norm, lora_linear):
        for row in module.rows(options.quick):
            found.append(row)
            ratios = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if " / " in k or k == "rho")
            name = " ".join(str(row[k]) for k in ("op", "dtype", "kind", "pass") if k in row)
            shape = " ".join(f"{k}={row[k]}" for k in ("M", "K", "N", "r") if k in row)
            print(f"{name:48} {shape:28} {ratios}   ours {row['seconds']['ours'] * 1e6:.0f} µs", flush=True)
            if options.out:
                options.out.write_text(json.dumps({"stamp": stamp(), "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
