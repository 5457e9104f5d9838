"""`python -m bench.multi_lora`: a batch with an adapter for each row, and its rivals, on one base
weight:

    linear      nn.Linear alone
    ours        multi_lora
    ours, add   multi_lora_add_ on a result that is there: what the adapters cost
    peft        PEFT's layer with adapter_names=
    loop        the best plain PyTorch: rows sorted by adapter, addmm_ of each segment
    gather      A and B of each row gathered, padded to the largest rank, two bmm
    vllm        vLLM's Triton path in torch: sorted, padded to the largest rank, u in float32, the
                delta rounded and added
    sglang      SGLang's chunks in torch: segments cut into 16 rows, padded memory, one bmm for all
                chunks

Workloads are Punica's: distinct (an adapter a row), uniform (√rows adapters), skewed (each has 1.5
times as many rows as the next), identical. With --isa avx2 as on a processor without AVX-512 and
AMX. GB/s: the bytes of all A and B that the batch uses, over the time of `ours, add`.
"""

import argparse
import math
import os
import random
from pathlib import Path

ROWS = [
    # rows, K = N, ranks in turn, dtype, workload
    (64, 1024, [16], "float32", "distinct"), (64, 4096, [16], "float32", "distinct"),
    (64, 1024, [8, 16, 32, 64], "float32", "distinct"), (64, 4096, [8, 16, 32, 64], "float32", "distinct"),
    (32, 4096, [16], "bfloat16", "distinct"), (64, 4096, [8, 16, 32, 64], "bfloat16", "distinct"),
    *((64, 2048, [8, 16, 32, 64], dtype, load)
      for dtype in ("float32", "bfloat16") for load in ("uniform", "skewed", "identical")),
    (1, 4096, [16], "float32", "distinct"), (1, 4096, [16], "bfloat16", "distinct"),
    (512, 1024, [16], "float32", "uniform"), (512, 1024, [16], "bfloat16", "uniform"),
]  # fmt: skip


def workload(kind, rows):
    """The adapter of each row, shuffled."""
    draw = random.Random(0)
    if kind == "identical":
        return [0] * rows
    if kind == "distinct":
        return draw.sample(range(rows), rows)
    if kind == "uniform":
        each = math.ceil(math.sqrt(rows))
        return draw.sample([i // each for i in range(rows)], rows)
    left, found = rows, []
    while left:  # each adapter has 1.5 times as many rows as the next
        count = max(1, min(left, round(left / 3)))
        found += [len(set(found))] * count
        left -= count
    return draw.sample(found, rows)


def contenders(rows, size, ranks, dtype, kind):
    """The calls to time, by name, and the bytes of A and B in use."""
    import peft
    import torch
    import torch.nn.functional as F
    from torch import nn

    from lora_kernels import multi_lora, multi_lora_add_
    from lora_kernels.serving import Adapter, AdapterPool, Factors

    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    which = workload(kind, rows)
    used = sorted(set(which))
    of = {u: ranks[i % len(ranks)] for i, u in enumerate(used)}
    base = nn.Sequential(nn.Linear(size, size, bias=False)).to(dtype).requires_grad_(False)
    w, x = base[0].weight, torch.randn(rows, size).to(dtype)
    a = {u: (torch.randn(of[u], size) * size**-0.5).to(dtype) for u in used}
    b = {u: (torch.randn(size, of[u]) * 0.02).to(dtype) for u in used}
    scale = 2.0

    pool = AdapterPool(base, capacity_bytes=1 << 30, slots=len(used), max_rank=max(ranks))
    for u in used:
        pool.load(str(u), Adapter({"0": Factors(a[u], b[u], scale)}))
    slots = pool.sites["0"].slots
    plan = pool.batch([str(u) for u in which]).plan(rows)

    layer = peft.tuners.lora.Linear(nn.Linear(size, size, bias=False).to(dtype), str(used[0]), peft.LoraConfig(), r=of[used[0]])
    for u in used:
        layer.update_layer(str(u), of[u], lora_alpha=scale * of[u], config=peft.LoraConfig(lora_alpha=scale * of[u]))
        layer.lora_A[str(u)].weight.data, layer.lora_B[str(u)].weight.data = a[u], b[u]
    layer.base_layer.weight.data = w.data
    layer.eval().requires_grad_(False)
    names = [str(u) for u in which]

    number = torch.tensor([used.index(u) for u in which])
    order = number.argsort(stable=True)
    counts = number.bincount(minlength=len(used)).tolist()
    most = max(ranks)
    padded_a = torch.zeros(len(used), most, size, dtype=dtype)
    padded_b = torch.zeros(len(used), size, most, dtype=dtype)
    for i, u in enumerate(used):
        padded_a[i, : of[u]], padded_b[i, :, : of[u]] = a[u] * scale, b[u]

    def segment_loop():
        sorted_x = x[order]
        y = F.linear(sorted_x, w)
        for u, part, rows_of in zip(used, y.split(counts), sorted_x.split(counts), strict=True):
            part.addmm_(rows_of @ a[u].T, b[u].T, alpha=scale)
        return torch.empty_like(y).index_copy_(0, order, y)

    def gathered_bmm():
        h = torch.bmm(padded_a[number], x[:, :, None])
        return F.linear(x, w) + torch.bmm(padded_b[number], h)[..., 0]

    def vllm_way():
        y = F.linear(x, w)
        u = x.new_zeros(rows, most, dtype=torch.float32)
        first = 0
        for i, count in enumerate(counts):
            at = order[first : first + count]
            u[at] = (x[at] @ padded_a[i].T).float()
            y[at] += u[at].to(dtype) @ padded_b[i].T
            first += count
        return y

    chunks = [(i, piece) for i, part in enumerate(order.split(counts)) for piece in part.split(16)]
    of_chunk = torch.tensor([i for i, _ in chunks])
    places = torch.full((len(chunks), min(16, rows)), rows)
    for i, (_, piece) in enumerate(chunks):
        places[i, : len(piece)] = piece
    inside = places.flatten() < rows

    def sglang_way():
        y = F.linear(x, w)
        wide = torch.cat([x, x.new_zeros(1, size)])[places]
        delta = torch.bmm(torch.bmm(wide, padded_a[of_chunk].transpose(1, 2)), padded_b[of_chunk].transpose(1, 2))
        y[places.flatten()[inside]] += delta.flatten(0, 1)[inside]
        return y

    y = F.linear(x, w)
    calls = {
        "linear": lambda: F.linear(x, w), "ours": lambda: multi_lora(x, w, slots, plan),
        "ours, add": lambda: multi_lora_add_(y, x, slots, plan), "peft": lambda: layer(x, adapter_names=names),
        "loop": segment_loop, "gather": gathered_bmm, "vllm": vllm_way, "sglang": sglang_way,
    }  # fmt: skip
    wanted = calls["ours"]().float()
    for name, call in calls.items():
        if name not in ("linear", "ours, add"):
            error = (call().float() - wanted).norm() / wanted.norm()
            assert error < (1e-4 if dtype is torch.float32 else 2e-2), f"{name} computes something else: {error}"
    return calls, sum(of.values()) * 2 * size * x.element_size()


def main() -> None:
    """Prints every ratio; --out writes them with their circumstances."""
    parser = argparse.ArgumentParser(prog="bench.multi_lora")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=["avx2"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="two shapes")
    options = parser.parse_args()
    if options.isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = os.environ["MKL_ENABLE_INSTRUCTIONS"] = options.isa.upper()
        os.environ["ATEN_CPU_CAPABILITY"] = options.isa

    import torch

    from bench.paired import interleaved_medians, machine_stamp, measurement_row, write_measured
    from bench.palette import three_digits
    from lora_kernels import _cpu

    if options.isa:
        _cpu.set_level(options.isa)
    torch.set_num_threads(options.threads)
    found = []
    with torch.no_grad():
        for rows, size, ranks, dtype, kind in ROWS[:2] if options.quick else ROWS:
            calls, used = contenders(rows, size, ranks, dtype, kind)
            seconds = interleaved_medians(calls, seconds=2.0)
            shape = {"M": rows, "K": size, "N": size}
            made = measurement_row(
                "multi_lora", kind, getattr(torch, dtype), shape, seconds, what="forward", ranks=ranks, bytes_used=used
            )
            found.append(made)
            ratios = "  ".join(
                f"{name} {three_digits(seconds[name] / seconds['linear'])}" for name in calls if name != "linear"
            )
            rate = used / seconds["ours, add"] / 1e9
            print(f"{kind:9} {dtype:8} {rows}×{size}² r={ranks}: over linear: {ratios}; {rate:.1f} GB/s", flush=True)
            if options.out:
                write_measured(options.out, machine_stamp(), found)


if __name__ == "__main__":
    main()
