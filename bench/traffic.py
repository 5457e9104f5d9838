"""`python -m bench.traffic`: the bytes that a training step of a layer moves on a GPU, counted in
the simulator.

    --m 8192 --k 4096 --n 4096 --r 16 --dropout 0.1      the layer, in bf16; --n 4096 1024 1024:
                                                         three that share x
    --experts 32 --top 4                                 experts, without dropout, of which each
                                                         token has four
    --forward                                            of experts only y, as in an evaluation
    --peft                                               B as PEFT's parameter has it, the experts
                                                         side by side
    --arch 80                                            whose kernels: 90 is sm_90
    --cache 50 --line 128 --resident 132                 MiB and bytes of the second-level cache;
                                                         blocks that run side by side
    --out FILE                                           JSON

The kernels' real PTX runs on every block of the grid, and its trace passes through a cache that
drops the least recently used line. Bytes, not time. At the sizes above it takes two cores some ten
minutes and 8 GB of memory.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.paired import machine_stamp
from lora_kernels import Member, expert_lora_linear, lora_linear_group, use_backend
from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ptxsim import device

MIB = 2**20


def count_bytes(
    m: int, k: int, n: list[int], r: int, dropout: float, arch: int = 80, cache: int = 50 * MIB, line: int = 128,
    resident: int = 132,
) -> dict[str, Any]:  # fmt: skip
    """Bytes read and written by a forward and a backward as two and three launches: behind one
    cache that lives through the step, and of each launch with an empty cache. Beside them the least
    that is possible if no tensor stays in the cache between launches. Then x is read three times
    (h, the product, dA), each dy twice, each w twice; dx and each y are written.

        least = 2 · (4 · MK + 3 · M ΣN + 2 · K ΣN)
    """
    x = random_matrix(m, k).requires_grad_()
    members = [
        Member(random_matrix(wide, k), random_matrix(r, k).requires_grad_(), random_matrix(wide, r).requires_grad_(), 2.0)
        for wide in n
    ]
    with use_backend("triton", simulate=True), device(arch, trace=True, check=False, resident=resident, shuffle=False) as sim:
        with forced_candidate("two launches"):
            ys = lora_linear_group(x, members, dropout)
        with forced_candidate("fused"):
            torch.autograd.backward(ys, [random_matrix(m, wide) for wide in n])
    through, apart = sim.dram(cache, line), sim.dram(cache, line, apart=True)
    least = 2 * (4 * m * k + 3 * m * sum(n) + 2 * k * sum(n))
    return {
        "arch": arch, "m": m, "k": k, "n": n, "r": r, "dropout": dropout, "cache": cache, "line": line, "resident": resident,
        "launches": sim.launches, "read": through[0], "written": through[1], "apart_read": apart[0], "apart_written": apart[1],
        "least": least,
    }  # fmt: skip


def count_expert_bytes(
    m: int, k: int, n: int, r: int, experts: int, top: int, forward: bool = False, peft: bool = False,
    index: bool = False, arch: int = 80, cache: int = 50 * MIB, line: int = 128, resident: int = 132,
) -> dict[str, Any]:  # fmt: skip
    """The same of `expert_lora_linear`, and its shared-memory accesses over the fewest possible: m
    tokens with `top` experts each, drawn at random, so M = m · top rows, of which H experts have
    some. The least counts A and B too, since each expert has its own; dA and dB are written for all
    E.

        least = 2 · (4 · MK + 3 · MN + 2 · H KN + (2 H + E) · r (K + N))
        least = 2 · (MK + MN + H (KN + r (K + N)))                                  only y

    With `index` x has m rows, which three of the four MK and that of y read, and there is the index
    itself, 8 M each time.
    """
    chosen = torch.stack([torch.randperm(experts)[:top] for _ in range(m)])
    counts = torch.bincount(chosen.reshape(-1), minlength=experts)
    rows, hit = m * top, int((counts > 0).sum())
    x, w = random_matrix(m if index else rows, k), random_matrix(experts * n, k).view(experts, n, k)
    at = chosen.reshape(-1).argsort(stable=True) // top if index else None
    a, b = random_matrix(experts * r, k).view(experts, r, k), random_matrix(experts * n, r).view(experts, n, r)
    if peft:
        b = b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    leaves = [t.requires_grad_(not forward) for t in (x, a, b)]
    with use_backend("triton", simulate=True), device(arch, trace=True, check=False, resident=resident, shuffle=False) as sim:
        y = expert_lora_linear(x, counts.cumsum(0), w, a, b, 2.0, index=at)
        if not forward:
            torch.autograd.grad(y, leaves, random_matrix(rows, n))
    through, apart = sim.dram(cache, line), sim.dram(cache, line, apart=True)
    if forward:
        least = 2 * (len(x) * k + rows * n + hit * (k * n + r * (k + n)))
    else:
        least = 2 * ((3 * len(x) + rows) * k + 3 * rows * n + 2 * hit * k * n + (2 * hit + experts) * r * (k + n))
    least += 8 * rows * (1 if forward else 3) if index else 0
    return {
        "arch": arch, "m": m, "k": k, "n": n, "r": r, "experts": experts, "top": top, "hit": hit, "forward": forward,
        "peft": peft, "index": index, "cache": cache, "line": line, "resident": resident, "launches": sim.launches,
        "read": through[0], "written": through[1], "apart_read": apart[0], "apart_written": apart[1], "least": least,
        "shared": sim.counters["shared_wavefronts"] / max(sim.counters["shared_ideal"], 1),
    }  # fmt: skip


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.traffic", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in {"arch": 80, "m": 8192, "k": 4096, "r": 16, "cache": 50, "line": 128, "resident": 132}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--n", type=int, nargs="+", default=[4096])
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--top", type=int, default=1)
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--index", action="store_true")
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args())
    out, options["cache"] = options.pop("out"), options["cache"] * MIB
    of_experts = {name: options.pop(name) for name in ("experts", "top", "forward", "peft", "index")}
    began = time.monotonic()
    torch.manual_seed(0)
    if of_experts["experts"]:
        options.pop("dropout")
        (options["n"],) = options["n"]
        row = count_expert_bytes(**options, **of_experts)
    else:
        row = count_bytes(**options)
    total, apart = row["read"] + row["written"], row["apart_read"] + row["apart_written"]
    names = ("m", "k", "n", "r", "dropout", "experts", "top", "hit")
    layer = ", ".join(f"{name} {row[name]}" for name in names if name in row)
    print(f"sm_{row['arch']}: {layer}: {row['launches']} launches")
    for name, size in {"behind the cache": total, "each launch apart": apart, "least": row["least"]}.items():
        print(f"{name:18} {size / MIB:9.1f} MiB  {size / row['least']:.3f} of the least")
    print(f"{time.monotonic() - began:.0f} s")
    if out:
        out.write_text(json.dumps({"stamp": machine_stamp(), "rows": [row]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
