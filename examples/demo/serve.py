"""Serves SmolLM2-135M-Instruct with 32 adapters at once, and compares with the base alone, PEFT and
merged models.

    make serve-demo                 a few minutes on two cores
    make serve-demo ARGS=--quick    one workload, 8 adapters, few tokens; about a minute

The adapters are random: LoRA, rsLoRA and DoRA in turn, of ranks 4 to 64, on every linear layer. The
workloads are Punica's: each request wants an adapter of its own (distinct), few adapters have as
many requests each (uniform), some have many more than others (skewed), all want the same
(identical). PEFT's `adapter_names=` refuses DoRA, so PEFT serves LoRA of the same rank in its
place; merged: a model for each adapter, whose requests are batches of their own. The run fails
(exit status 1) if the logits of a mixed batch differ from those of merged models by more than
rounding. Results: serve_out/summary.json and serve_out/summary.png.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

WORKLOADS = ("distinct", "uniform", "skewed", "identical")
RANKS = (4, 8, 16, 32, 64)
KINDS = ("lora", "rslora", "dora")
# error of the logits over the largest, 30 layers deep
ALLOWED = {"float32": 1e-4, "bfloat16": 5e-2}


def main(argv: list[str] | None = None) -> int:
    """Runs the demo and returns its exit status: 0 all is right, 1 logits are wrong, 2 something
    needed is missing."""
    parser = argparse.ArgumentParser(prog="serve-demo", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one workload, few tokens")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--requests", type=int, default=32, help="in one batch")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each request")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("serve_out"))
    options = parser.parse_args(argv)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # for smollm2 and bench.palette
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    import smollm2

    try:
        smollm2.packaged_file(*smollm2.WEIGHTS)
    except smollm2.MissingPackageError as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        return 2
    for name in ("adapters", "requests", "tokens"):
        if getattr(options, name) < 2:
            parser.error(f"--{name}: wanted at least 2, found {getattr(options, name)}")
    if options.quick:
        options.adapters, options.requests, options.tokens = min(options.adapters, 8), min(options.requests, 8), 4
    result = run_workloads(options, console)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_picture(result, options.out / "summary.png")
    console.print(f"Written: {options.out / 'summary.json'}, {options.out / 'summary.png'}")
    return 0 if result["passed"] else 1


def workload(kind: str, requests: int, adapters: int) -> list[int]:
    """The adapter of each request, shuffled; Punica's (arXiv:2310.18547, section 7) four
    popularities."""
    if kind == "distinct":
        found = [i % adapters for i in range(requests)]
    elif kind == "uniform":
        found = [i % min(adapters, math.isqrt(requests - 1) + 1) for i in range(requests)]
    elif kind == "identical":
        found = [0] * requests
    else:
        # the i-th most popular has 1.5 times the requests of the next
        shares = [1.5**-i for i in range(adapters)]
        found = random.Random(0).choices(range(adapters), shares, k=requests)
    return random.Random(0).sample(found, requests)


def random_adapter(model, index: int):
    """An adapter of the pool; kind and rank follow from the index."""
    import torch

    from lora_kernels.serving import Adapter, Factors

    draw = torch.Generator().manual_seed(index)
    kind, r = KINDS[index % len(KINDS)], RANKS[index % len(RANKS)]
    scale = 2 * r / r**0.5 if kind == "rslora" else 2.0
    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            n_out, n_in = module.weight.shape
            a = torch.randn(r, n_in, generator=draw) * n_in**-0.5
            b = torch.randn(n_out, r, generator=draw) * 0.02 / scale
            norm = module.weight.float().norm(dim=1) if kind == "dora" else None
            factors[name] = Factors(a, b, scale, norm)
    return Adapter(factors)


def peft_model(model, adapters):
    """The same adapters in PEFT, DoRA's as LoRA."""
    import peft
    import torch

    made = None
    for index, adapter in enumerate(adapters):
        some = next(iter(adapter.factors.values()))
        targets = sorted({name.rpartition(".")[2] for name in adapter.factors})
        config = peft.LoraConfig(r=some.r, lora_alpha=some.scale * some.r, target_modules=targets)
        if made is None:
            made = peft.get_peft_model(model, config, adapter_name="0")
        else:
            made.add_adapter(str(index), config)
    with torch.no_grad():
        for name, module in made.base_model.model.named_modules():
            for index, adapter in enumerate(adapters):
                if name in adapter.factors:
                    module.lora_A[str(index)].weight.copy_(adapter.factors[name].a)
                    module.lora_B[str(index)].weight.copy_(adapter.factors[name].b)
    return made.eval().requires_grad_(False)


def logits_error(ours, base, adapters, prompt) -> float:
    """Largest difference of a batch with each kind of adapter and the base from merged models, over
    the largest logit."""
    import copy

    import torch

    names = [*(str(i) for i in range(min(len(KINDS), len(adapters)))), None]
    prompt = prompt[:1].expand(len(names), -1)
    with torch.no_grad():
        mixed = ours(prompt, adapters=names).logits.double()
        worst = 0.0
        for row, name in enumerate(names):
            alone = copy.deepcopy(base)
            for layer, f in adapters[int(name)].factors.items() if name else ():
                weight = alone.get_submodule(layer).weight
                merged = weight.double() + f.scale * f.b.double() @ f.a.double()
                if f.magnitude is not None:
                    merged *= (f.magnitude.double() / merged.norm(dim=1))[:, None]
                weight.copy_(merged)
            wanted = alone(prompt[:1]).logits[0].double()
            worst = max(worst, ((mixed[row] - wanted).abs().max() / wanted.abs().max()).item())
    return worst


def forward_seconds(call, prompt, tokens: int) -> list[float]:
    """Seconds of each forward of a greedy generation with a cache: the prompt's, then one for each
    token."""
    import torch
    from transformers import DynamicCache

    cache, ids, taken = DynamicCache(), prompt, []
    with torch.no_grad():
        for _ in range(tokens):
            start = time.perf_counter()
            logits = call(ids, cache)
            ids = logits[:, -1].argmax(-1, keepdim=True)
            taken.append(time.perf_counter() - start)
    return taken


def run_workloads(options, console):
    import smollm2
    import torch

    from lora_kernels.serving import AdapterPool, serve

    dtype = getattr(torch, options.dtype)
    with console.status("Loading the model and making the adapters"):
        base = smollm2.load_base(dtype).eval().requires_grad_(False)
        adapters = [random_adapter(base, index) for index in range(options.adapters)]
        ours = smollm2.load_base(dtype).eval().requires_grad_(False)
        size = sum(adapter.nbytes for adapter in adapters)
        pool = AdapterPool(ours, capacity_bytes=4 * size + (1 << 28), slots=options.adapters, max_rank=max(RANKS))
        start = time.perf_counter()
        for index, adapter in enumerate(adapters):
            pool.load(str(index), adapter)
        loading = (time.perf_counter() - start) / len(adapters)
        serve(ours, pool)
        theirs = peft_model(smollm2.load_base(dtype), adapters)
    console.print(f"{options.adapters} adapters loaded, {1e3 * loading:.0f} ms each; {options.requests} requests a batch")
    draw_ids = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, base.config.vocab_size, (options.requests, 16), generator=draw_ids)
    error, allowed = logits_error(ours, base, adapters, prompt), ALLOWED[options.dtype]
    verdict = "[green]within rounding[/green]" if error <= allowed else f"[red]above {allowed}[/red]"
    console.print(f"Logits of a mixed batch against merged models: {error:.1e} of the largest, {verdict}")
    rows = []
    for kind in WORKLOADS[:1] if options.quick else WORKLOADS:
        which = workload(kind, options.requests, options.adapters)
        groups = [[i for i, w in enumerate(which) if w == each] for each in sorted(set(which))]
        names = [str(w) for w in which]

        def ours_logits(ids, cache, names=names):
            return ours(ids, past_key_values=cache, adapters=names).logits

        def peft_logits(ids, cache, names=names):
            return theirs(input_ids=ids, past_key_values=cache, adapter_names=names).logits

        def base_logits(ids, cache):
            return base(ids, past_key_values=cache).logits

        # a merged model computes as the base does, each adapter's requests by themselves
        def merged_seconds(groups=groups):
            parts = [forward_seconds(base_logits, prompt[group], options.tokens) for group in groups]
            return [sum(part) for part in zip(*parts, strict=True)]

        contenders = {
            "base only": lambda: forward_seconds(base_logits, prompt, options.tokens),
            "ours": lambda: forward_seconds(ours_logits, prompt, options.tokens),
            "PEFT": lambda: forward_seconds(peft_logits, prompt, options.tokens), "merged": merged_seconds,
        }  # fmt: skip
        taken = {name: [] for name in contenders}
        with console.status(f"{kind}: {len(groups)} adapters"):
            for _ in range(1 if options.quick else 3):
                for name, call in contenders.items():
                    taken[name].append(call())
        for name, found in taken.items():
            first = statistics.median(one[0] for one in found)
            later = statistics.median(t for one in found for t in one[1:])
            rows.append({
                "workload": kind, "adapters": len(groups), "contender": name, "first_token_seconds": first,
                "token_seconds": later, "tokens_per_second": options.requests / later,
            })  # fmt: skip
    print_table(rows, console)
    return {
        "dtype": options.dtype, "requests": options.requests, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "logits_error": error, "passed": error <= allowed, "rows": rows,
    }  # fmt: skip


def print_table(rows, console) -> None:
    from bench.palette import three_digits

    table = Table("workload", "adapters", "", "first token ms", "a token ms", "tokens/s", "of base only")
    for row in rows:
        base = next(r for r in rows if r["workload"] == row["workload"] and r["contender"] == "base only")
        table.add_row(
            row["workload"], str(row["adapters"]), row["contender"], f"{1e3 * row['first_token_seconds']:.0f}",
            f"{1e3 * row['token_seconds']:.1f}", f"{row['tokens_per_second']:.0f}",
            three_digits(row["tokens_per_second"] / base["tokens_per_second"]),
        )  # fmt: skip
    console.print(table)


def draw_picture(result, path: Path) -> None:
    """Tokens a second of each contender, a group of bars for each workload."""
    from bench.palette import OTHERS, OURS, PEFT, draw_headline, load_pyplot, save_picture, tidy_axes

    rows = result["rows"]
    kinds, names = list(dict.fromkeys(r["workload"] for r in rows)), list(dict.fromkeys(r["contender"] for r in rows))
    colours = {"base only": "0.8", "ours": OURS, "PEFT": PEFT, "merged": OTHERS[0]}
    figure, panel = load_pyplot().subplots(figsize=(max(8.0, 1.5 + 2 * len(kinds)), 4.4), layout="constrained")
    speed = {(r["workload"], r["contender"]): r["tokens_per_second"] for r in rows}
    for i, name in enumerate(names):
        places = [k + 0.2 * (i - 1.5) for k in range(len(kinds))]
        bars = panel.bar(places, [speed[k, name] for k in kinds], 0.19, label=name, color=colours[name])
        panel.bar_label(bars, fmt="%.0f", fontsize=8)
    counts = {r["workload"]: r["adapters"] for r in rows}
    panel.set_xticks(range(len(kinds)), [f"{kind}\n{counts[kind]} adapter{'s' * (counts[kind] > 1)}" for kind in kinds])
    panel.set_ylabel("tokens a second")
    tidy_axes(panel, grid="y")
    said = f"{counts[kinds[0]]} adapters in one batch keep {speed[kinds[0], 'ours'] / speed[kinds[0], 'base only']:.0%}"
    said += f" of the base's speed, with PEFT {speed[kinds[0], 'PEFT'] / speed[kinds[0], 'base only']:.0%}"
    note = f"{result['requests']} requests, {result['dtype']}, threads: {result['threads']}, torch {result['torch']}"
    draw_headline(figure, said, note)
    save_picture(figure, path)


if __name__ == "__main__":
    sys.exit(main())
