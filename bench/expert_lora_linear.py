"""`python -m bench.expert_lora_linear`: the experts of a layer (gate and up, activation, down, the
weighted sum over each token's experts) with LoRA on both weights, forward + backward:

    ours       PEFT's ParamWrapper after `fuse`
    op         expert_lora_linear twice, the rows gathered and summed in plain PyTorch
    peft NAME  PEFT's ParamWrapper, by each implementation of transformers: eager, grouped_mm,
               batched_mm
    frozen NAME  the same module without an adapter: y and the gradient of x alone
    loop       each expert's rows through F.linear, and through A and B
    split      torch's grouped_mm for W, A and B, which forms no W + sBA either
    op mxfp4   op over codes of the same numbers, with --codes

    --shapes qwen mixtral   Qwen3-30B-A3B's layer, and Mixtral's scaled down
    --dtypes bfloat16 float32 --tokens 64 512
    --threads 1             by processor time, which a busy machine disturbs least
    --seconds 5             of each case, at least ten rounds of each contender
    --codes                 W has numbers that MXFP4 has, as gpt-oss's experts
    --only NAME...          with ours these contenders, or those whose names begin so
    --quick                 few and small, to see that it works
    --no-memory             leaves out the peaks of memory
    --out FILE              JSON

All run in turn in one process. GOALS that are missed are printed at the end. Memory is the peak
beyond what was resident before a step; `outputs` are y and the gradients, which all have.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

R, SCALE = 16, 2.0
# hidden, intermediate, experts, of which each token takes
SHAPES = {"qwen": (2048, 768, 128, 8), "mixtral": (1024, 3584, 8, 2), "quick": (64, 32, 8, 2)}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
DTYPES, TOKENS = ("bfloat16", "float32"), (64, 512)
GOALS = {"qwen": 1 / 8, "mixtral": 1 / 2.5}
"""Ours over the fastest of PEFT's at most."""
FROZEN_GOAL = 1.15
"""Ours over (1 + ρ) times the fastest without an adapter, ρ the share of the adapter's products."""
MEMORY_GOAL = 1 / 20
"""Ours over PEFT's, beyond the outputs, of the first shape."""


def experts_module(shape: str, dtype: Any) -> Any:
    """transformers' module in a holder, as a model has it."""
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    hidden, inner, experts, _ = SHAPES[shape]
    config = SimpleNamespace(
        num_experts=experts, hidden_size=hidden, moe_intermediate_size=inner, hidden_act="silu", _experts_implementation="eager"
    )
    torch.manual_seed(0)
    made = Qwen3MoeExperts(config).to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5).requires_grad_(False)
    return torch.nn.ModuleDict({"experts": made})


def mxfp4_experts(module: Any) -> dict[str, Any]:
    """Random codes, by the name of the weight, whose numbers the module gets."""
    import torch

    from lora_kernels.nn.quantised_experts import mxfp4_weight

    found = {}
    for name, p in module.named_parameters():
        experts, n_out, n_in = p.shape
        blocks = torch.randint(256, (experts, n_out, n_in // 32, 16), dtype=torch.uint8)
        found[name] = mxfp4_weight(blocks, torch.full((experts, n_out, n_in // 32), 121, dtype=torch.uint8), p.dtype)
        p.data.copy_(found[name].dequantise())
    return found


def peft_experts(holder: Any) -> tuple[Any, dict[str, Any]]:
    """PEFT's wrapper of it, with random B, and the factors by the name of their weight."""
    import peft
    import torch

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=R, lora_alpha=SCALE * R, target_modules=[], target_parameters=targets)
    outer = peft.get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model["experts"]
    factors, wrapper = {}, outer
    while hasattr(wrapper, "parameter_name"):
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        torch.nn.init.normal_(b, std=0.02)
        factors[wrapper.parameter_name] = a, b
        wrapper = wrapper.base_layer
    return outer, factors


def fused(wrapper: Any) -> Any:
    """A copy of the wrapper, fused, that shares its parameters."""
    import torch

    from lora_kernels import fuse

    # memory of what is there is not copied
    holder = torch.nn.ModuleDict({"experts": wrapper})
    made = copy.deepcopy(holder, {id(p): p for p in holder.parameters()})
    report = fuse(made)
    if report.left or not report.fused:
        raise RuntimeError(f"left to PEFT: {report.left}")
    return made["experts"]


def routing(shape: str, tokens: int) -> tuple[Any, Any]:
    """Experts and weights of each token."""
    import torch

    _, _, experts, top = SHAPES[shape]
    torch.manual_seed(1)
    weights, index = torch.rand(tokens, experts).topk(top)
    return index, weights / weights.sum(1, keepdim=True)


def sorted_by_expert(run: Callable[[Any, Any, Any], Any], x: Any, index: Any, weights: Any, experts: int) -> Any:
    """The block around run(rows sorted by expert, the end of each expert's, their number)."""
    import torch

    order = index.flatten().argsort(stable=True)
    ends = torch.bincount(index.flatten(), minlength=experts).cumsum(0).to(torch.int32)
    y = run(x[order // index.shape[1]], ends, experts)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return (y[back].view(*index.shape, -1) * weights[..., None]).sum(1).to(x.dtype)


def by_experts(factors: tuple[Any, Any], experts: int) -> tuple[Any, Any]:
    """A [experts, r, in] and B [experts, out, r] of PEFT's parameters."""
    a, b = factors
    return a.view(experts, R, -1), b.view(len(b), R, experts).permute(2, 0, 1)


def swiglu(both: Any) -> Any:
    """The activation of gate and up."""
    from torch.nn import functional as F

    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def linear_by_ours(x: Any, ends: Any, w: Any, a: Any, b: Any) -> Any:
    """One weight of all experts."""
    from lora_kernels import expert_lora_linear

    return expert_lora_linear(x, ends, w, a, b, SCALE)


def linear_by_split(x: Any, ends: Any, w: Any, a: Any, b: Any) -> Any:
    """The same by torch's grouped products."""
    from torch.nn.functional import grouped_mm

    b = b.contiguous()  # it takes no other strides
    return grouped_mm(x, w.mT, offs=ends) + SCALE * grouped_mm(grouped_mm(x, a.mT, offs=ends), b.mT, offs=ends)


def linear_by_loop(x: Any, ends: Any, w: Any, a: Any, b: Any) -> Any:
    """The same, one expert after the other."""
    import torch
    from torch.nn import functional as F

    pieces, first = [], 0
    for e, last in enumerate(ends.tolist()):
        if last > first:
            rows = x[first:last]
            pieces.append(F.linear(rows, w[e]) + SCALE * F.linear(F.linear(rows, a[e]), b[e]))
        first = last
    return torch.cat(pieces)


def contenders(case: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The steps to time, by name."""
    import torch

    shape, dtype = case["shape"], getattr(torch, case["dtype"])
    hidden, _, experts, _ = SHAPES[shape]
    holder = experts_module(shape, dtype)
    module = holder["experts"]
    codes = mxfp4_experts(module) if case.get("codes") else {}
    config, dense = module.config, dict(module.named_parameters())
    index, weights = routing(shape, case["tokens"])
    weights = weights.to(dtype)
    x = torch.randn(case["tokens"], hidden, dtype=dtype, requires_grad=True)
    dy = torch.randn(case["tokens"], hidden, dtype=dtype)
    stock, factors = peft_experts(holder)
    ours = fused(stock)
    learnt = [t for pair in factors.values() for t in pair]

    def timed(layer: Callable[[], Any]) -> Callable[[], Any]:
        def step() -> None:
            layer().backward(dy)
            for leaf in (x, *learnt):
                leaf.grad = None

        return step

    def block(linear: Callable[..., Any], weights_by_name: Any = dense) -> Callable[[], Any]:
        def run(rows: Any, ends: Any, experts: int) -> Any:
            up, down = ((weights_by_name[name], *by_experts(factors[name], experts)) for name in ("gate_up_proj", "down_proj"))
            return linear(swiglu(linear(rows, ends, *up)), ends, *down)

        return timed(lambda: sorted_by_expert(run, x, index, weights, experts))

    def stocks(called: Any, implementation: str) -> Callable[[], Any]:
        def run() -> Any:
            config._experts_implementation = implementation
            return called(x, index, weights)

        return timed(run)

    found = {
        "ours": timed(lambda: ours(x, index, weights)),
        "op": block(linear_by_ours),
        "split": block(linear_by_split),
        "loop": block(linear_by_loop),
    }
    if codes:
        found["op mxfp4"] = block(linear_by_ours, codes)
    for name in IMPLEMENTATIONS:
        # a copy of the weights for each token
        if name != "batched_mm" or case["tokens"] * SHAPES[shape][3] <= experts:
            found[f"peft {name}"] = stocks(stock, name)
            found[f"frozen {name}"] = stocks(module, name)
    return found


def measure(case: dict[str, Any], seconds: float, only: Sequence[str] = ("",)) -> dict[str, float]:
    """Seconds of each contender that is ours or whose name begins with one of `only`."""
    import torch

    from lora_kernels.commands.paired import interleaved_medians

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    calls = {name: call for name, call in contenders(case).items() if name.startswith(("ours", *only))}
    return interleaved_medians(calls, rounds=2000, seconds=seconds, clock=clock)


def rho(shape: str) -> float:
    """The share of the adapter's products in a step: 3 of each factor for 2 of W."""
    hidden, inner, _, _ = SHAPES[shape]
    sizes = (2 * inner, hidden), (hidden, inner)
    return 1.5 * R * sum(map(sum, sizes)) / sum(n * k for n, k in sizes)


def peak(name: str, case: dict[str, Any]) -> int:
    """Bytes of a step at its peak beyond what was resident before."""
    from bench.memory import peak_of

    call = contenders(case)[name]
    call()
    return int(peak_of(call)[0])


def outputs(case: dict[str, Any]) -> int:
    """Bytes of y, of its gradient for x and of those of the adapter."""
    hidden, inner, experts, _ = SHAPES[case["shape"]]
    numbers = 2 * case["tokens"] * hidden + experts * R * sum((2 * inner, hidden, hidden, inner))
    return numbers * (2 if case["dtype"] == "bfloat16" else 4)


def memory(case: dict[str, Any]) -> dict[str, int]:
    """The same for those that it is asked of, the median of three processes each, which the
    allocator's reuse tells apart; and of the outputs."""
    found = {"outputs": outputs(case)}
    for name in ("ours", "peft eager", "peft grouped_mm"):
        command = [sys.executable, "-W", "ignore", "-m", "bench.expert_lora_linear", "--peak", name, json.dumps(case)]
        runs = [subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True) for _ in range(3)]
        found[name] = statistics.median(int(run.stdout.splitlines()[-1]) for run in runs)
    return found


def fastest(row: dict[str, Any], kind: str) -> float:
    """The seconds of the fastest of PEFT's, or of those without an adapter."""
    return min((taken for name, taken in row["seconds"].items() if name.startswith(kind)), default=float("inf"))


def line(row: dict[str, Any]) -> str:
    """A case in words."""
    ours = row["seconds"]["ours"]
    ratios = "  ".join(f"/ {name} {ours / taken:.3f}" for name, taken in row["seconds"].items() if name != "ours")
    return f"{row['shape']:8} {row['dtype']:8} tokens={row['tokens']}: {1e3 * ours:.1f} ms  {ratios}"


def missed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Goals that were not reached."""
    for row in rows:
        ours, goal, most = row["seconds"]["ours"], GOALS.get(row["shape"], 1.0), FROZEN_GOAL * (1 + rho(row["shape"]))
        if ours > goal * fastest(row, "peft"):
            yield f"goal {goal:.3f} of PEFT: {line(row)}"
        if ours > most * fastest(row, "frozen"):
            yield f"goal {most:.3f} without an adapter: {line(row)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="bench.expert_lora_linear")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=("qwen", "mixtral"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--codes", action="store_true")
    parser.add_argument("--only", nargs="+", default=("",))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.tokens, options.seconds = ("quick",), (4, 16), 0.0
    if options.peak:
        name, case = options.peak
        print(peak(name, json.loads(case)))
        return 0

    import torch

    from bench.paired import machine_stamp, write_measured

    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            for tokens in options.tokens:
                case = {"shape": shape, "dtype": dtype, "tokens": tokens, "codes": options.codes}
                rows.append({**case, "seconds": measure(case, options.seconds, options.only)})
                print(line(rows[-1]), flush=True)
    peaks = {}
    if not options.no_memory:
        peaks = memory({"shape": options.shapes[0], "dtype": "bfloat16", "tokens": options.tokens[-1]})
        print("memory of a step:", {name: f"{taken / 2**20:.1f} MiB" for name, taken in peaks.items()})
    for text in missed(rows):
        print(text)
    if peaks:
        ours, *theirs = (taken - peaks["outputs"] for name, taken in peaks.items() if name != "outputs")
        if ours > MEMORY_GOAL * min(theirs):
            print(f"goal {MEMORY_GOAL} of PEFT's memory beyond the outputs: {ours / min(theirs):.4f}")
    if options.out:
        stamp = {**machine_stamp(), "threads": options.threads, "transformers": __import__("transformers").__version__}
        write_measured(options.out, stamp, rows, peaks=peaks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
