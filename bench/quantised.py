"""`python -m bench.quantised`: layers over bitsandbytes' quantised weights, square, r = 16:

    ours       lora_linear over the packed weight; DoRA's norm anew in a step, kept in a forward
    peft       PEFT's layer over bitsandbytes' as a model in training has it
    peft eval  the same in eval mode, in which bitsandbytes packs 4-bit weights for some processors
    dense      our layer over the dequantised weight
    linear     nn.Linear over that, without an adapter

    --levels avx2 avx512    instruction sets of ours, PyTorch's libraries held to each as in
                            bench.never_slower; bitsandbytes' library is not
    --formats nf4 fp4 int8 --dtypes bfloat16 float32 --sizes 4096 1024 576 --kinds lora dora
    --forward 1 16 64 --step 64 512      tokens; without gradients, and forward + backward
    --threads 1             by processor time, which a busy machine disturbs least; the median
    --seconds 1             of each case, at least
    --quick                 few and small, to see that it works
    --no-memory             leaves out the peaks of memory
    --out FILE              JSON

All run in turn in one process for each level. GOALS that are missed, and where ours loses to PEFT,
are printed at the end. Memory is the peak beyond what was resident before a step, without y.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.never_slower import HELD_TO

R, SCALE = 16, 2.0
CONTENDERS = ("ours", "peft", "peft eval", "dense", "linear")
FORMATS, DTYPES, KINDS = ("nf4", "fp4", "int8"), ("bfloat16", "float32"), ("lora", "dora")
SIZES, FORWARD, STEP = (4096, 1024, 576), (1, 16, 64), (64, 512)
GOALS = {
    ("forward", 1): {"peft": 1 / 40, "linear": 0.35},
    ("forward", 16): {"peft": 1 / 12},
    ("forward", 64): {"peft": 1 / 4},
    ("step", 64): {"peft": 1 / 4},
    ("step", 512): {"peft": 1 / 2.2, "dense": 1.15},
}
"""Ours over a contender's time at most, at 4096² in bfloat16 of nf4 with LoRA."""
DORA_GOAL = 1.1
"""A QDoRA step of 512 tokens over a QLoRA step."""
MEMORY_GOAL = 8 * 2**20
MEMORY_TOKENS = 512


def base_layer(kind: str, size: int, dtype: Any) -> Any:
    """bitsandbytes' layer, 4-bit with double quantisation, of the same weight at each call."""
    import bitsandbytes
    import torch

    torch.manual_seed(0)
    plain = torch.nn.Linear(size, size, bias=False).to(dtype)
    named: dict[str, Any] = {"has_fp16_weights": False, "threshold": 0.0}
    if kind != "int8":
        named = {"compute_dtype": dtype, "compress_statistics": True, "quant_type": kind}
    made = (bitsandbytes.nn.Linear8bitLt if kind == "int8" else bitsandbytes.nn.Linear4bit)(size, size, bias=False, **named)
    made.load_state_dict(plain.state_dict())
    return made.to("cpu")


def peft_layer(base: Any, dtype: Any, use_dora: bool) -> Any:
    """PEFT's layer over it, with random B."""
    import peft
    import torch

    config = peft.LoraConfig(r=R, lora_alpha=SCALE * R, target_modules=["0"], use_dora=use_dora)
    holder = torch.nn.Sequential(base)
    made = peft.get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model[0]
    for name, parameter in made.named_parameters():
        if "lora_" in name:  # the base's own to() would quantise it again
            parameter.data = parameter.data.to(dtype)
    torch.nn.init.normal_(made.lora_B["default"].weight, std=0.02)
    return made


def our_layer(w: Any, a: Any, b: Any, magnitude: Any) -> Callable[[Any], Any]:
    """x to y over a weight, packed or not."""
    import torch

    from lora_kernels import lora_linear, weight_norm
    from lora_kernels.ops import row_norm_squared
    from lora_kernels.ops.weight_norm.op import dora_gain

    if magnitude is None:
        return lambda x: lora_linear(x, w, a, b, SCALE)
    squared = row_norm_squared(w)

    def gain() -> Any:
        return dora_gain(magnitude, weight_norm(w, a.detach(), b.detach(), SCALE, squared))

    kept = gain().detach()
    return lambda x: lora_linear(x, w, a, b, SCALE, gain=gain() if torch.is_grad_enabled() else kept)


def contenders(case: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The calls to time, by name."""
    import torch

    from lora_kernels.nn.quantised import quantised_weight

    dtype, dora, step = getattr(torch, case["dtype"]), case["kind"] == "dora", case["what"] == "step"
    stock = peft_layer(base_layer(case["format"], case["size"], dtype), dtype, dora)
    x = torch.randn(case["M"], case["size"], dtype=dtype, requires_grad=step)
    packed = quantised_weight(stock.base_layer, dtype)
    if isinstance(packed, str):
        raise RuntimeError(f"bench.quantised: {packed}")
    dense = torch.nn.Linear(case["size"], case["size"], bias=False, dtype=dtype)
    dense.weight = torch.nn.Parameter(packed.dequantise(), requires_grad=False)
    a, b = stock.lora_A["default"].weight, stock.lora_B["default"].weight
    magnitude = stock.lora_magnitude_vector["default"].weight if dora else None
    layers = {
        "ours": our_layer(packed, a, b, magnitude), "peft": stock, "dense": our_layer(dense.weight, a, b, magnitude),
        "linear": dense,
    }  # fmt: skip
    if case["format"] != "int8" and not step:
        layers["peft eval"] = peft_layer(base_layer(case["format"], case["size"], dtype), dtype, dora).eval()
    dy, learnt = torch.randn(case["M"], case["size"], dtype=dtype), [a, b, magnitude]

    def timed(layer: Callable[[Any], Any]) -> Callable[[], Any]:
        def forward() -> None:
            with torch.no_grad():
                layer(x)

        def forward_and_backward() -> None:
            layer(x).backward(dy)
            for leaf in (x, *learnt):
                if leaf is not None:
                    leaf.grad = None

        return forward_and_backward if step else forward

    return {name: timed(layers[name]) for name in CONTENDERS if name in layers}


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured; not DoRA over int8, in which PEFT's layer loses bitsandbytes' scales."""
    for size in options.sizes:
        for fmt in options.formats:
            for dtype in options.dtypes:
                for kind in options.kinds:
                    if (fmt, kind) == ("int8", "dora"):
                        continue
                    for what, tokens in (("forward", options.forward), ("step", options.step)):
                        for m in tokens:
                            yield {"format": fmt, "dtype": dtype, "size": size, "kind": kind, "what": what, "M": m}


def measure(case: dict[str, Any], seconds: float) -> dict[str, float]:
    """Seconds of each contender."""
    import torch

    from lora_kernels.commands.paired import interleaved_medians

    one = torch.get_num_threads() == 1
    clock = time.process_time if one else time.perf_counter
    return interleaved_medians(contenders(case), rounds=2000, seconds=seconds, clock=clock)


def peak(name: str, fmt: str, dtype: str, size: int, tokens: int) -> int:
    """Bytes of a forward + backward at its peak beyond what was resident before, without y."""
    import torch

    from bench.memory import peak_of

    case = {"format": fmt, "dtype": dtype, "size": size, "kind": "lora", "what": "step", "M": tokens}
    call = contenders(case)[name]
    call()
    return int(peak_of(call)[0]) - tokens * size * getattr(torch, dtype).itemsize


def memory(fmt: str, dtype: str, size: int, tokens: int) -> dict[str, int]:
    """The same for those that it is asked of, each in a process of its own."""
    found = {}
    for name in ("ours", "peft", "dense", "linear"):
        what = [name, fmt, dtype, str(size), str(tokens)]
        command = [sys.executable, "-W", "ignore", "-m", "bench.quantised", "--peak", *what]
        found[name] = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    return found


def line(row: dict[str, Any]) -> str:
    """A case in words."""
    ours = row["seconds"]["ours"]
    ratios = "  ".join(f"/ {name} {ours / taken:.3f}" for name, taken in row["seconds"].items() if name != "ours")
    return (
        f"{row['level']:10} {row['format']:4} {row['dtype']:8} {row['kind']} {row['what']:7} {row['size']}² M={row['M']}:"
        f" {1e6 * ours:.0f} µs  {ratios}"
    )


def missed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Goals that were not reached, and rows in which PEFT is faster."""
    steps = {}
    for row in rows:
        ours, named = row["seconds"]["ours"], (row["level"], row["format"], row["dtype"], row["size"], row["M"])
        for rival, most in GOALS.get((row["what"], row["M"]), {}).items():
            if (row["size"], row["dtype"], row["format"], row["kind"]) == (4096, "bfloat16", "nf4", "lora"):
                if ours > most * row["seconds"][rival]:
                    yield f"goal {most:.3f} of {rival}: {line(row)}"
        best = min(row["seconds"][name] for name in ("peft", "peft eval") if name in row["seconds"])
        if ours > best:
            yield f"PEFT is faster: {line(row)}"
        if row["what"] == "step" and row["M"] == 512:
            steps[named, row["kind"]] = ours
    for (named, kind), taken in steps.items():
        if kind == "dora" and taken > DORA_GOAL * steps.get((named, "lora"), taken):
            yield f"goal {DORA_GOAL} of a QLoRA step: {named} {taken / steps[named, 'lora']:.2f}"


def run_level(options: argparse.Namespace) -> int:
    """Measures one level in this process, a line of JSON for each case."""
    import torch

    from lora_kernels import _cpu

    _cpu.set_level(options.held)
    torch.set_num_threads(options.threads)
    for case in cases(options):
        print(json.dumps({**case, "level": options.held, "seconds": measure(case, options.seconds)}), flush=True)
    return 0


def rows_of(level: str, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a process of its own measures on a level."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.quantised", *argv, "--held", level]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **HELD_TO.get(level, {})}) as child:
        assert child.stdout is not None
        yield from (json.loads(text) for text in child.stdout if text.startswith("{"))
    if child.returncode:
        raise RuntimeError(f"bench.quantised: {level} ended with {child.returncode}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="bench.quantised")
    for name, of in (("formats", FORMATS), ("dtypes", DTYPES), ("kinds", KINDS)):
        parser.add_argument(f"--{name}", nargs="+", choices=of, default=of)
    for name, numbers in (("sizes", SIZES), ("forward", FORWARD), ("step", STEP)):
        parser.add_argument(f"--{name}", nargs="*", type=int, default=numbers)
    parser.add_argument("--levels", nargs="+")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--held", help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.sizes, options.forward, options.step, options.seconds = (128,), (1, 16), (64,), 0.0
        options.formats, options.dtypes = ("nf4", "int8"), ("bfloat16",)
    if options.held:
        return run_level(options)
    if options.peak:
        name, fmt, dtype, size, tokens = options.peak
        print(peak(name, fmt, dtype, int(size), int(tokens)))
        return 0

    from bench.paired import machine_stamp, write_measured
    from lora_kernels import _cpu

    rows: list[dict[str, Any]] = []
    for level in options.levels or _cpu.levels()[-1:]:
        for row in rows_of(level, argv):
            print(line(row), flush=True)
            rows.append(row)
    peaks = {}
    if not options.no_memory:
        peaks = memory("nf4", "bfloat16", options.sizes[0], MEMORY_TOKENS)
        print("memory beyond y and the weight:", {name: f"{taken / 2**20:.1f} MiB" for name, taken in peaks.items()})
    for text in missed(rows):
        print(text)
    if peaks.get("ours", 0) > MEMORY_GOAL:
        print(f"goal {MEMORY_GOAL >> 20} MiB: {peaks['ours'] / 2**20:.1f}")
    if options.out:
        stamp = {**machine_stamp(), "threads": options.threads, "bitsandbytes": __import__("bitsandbytes").__version__}
        write_measured(options.out, stamp, rows, peaks=peaks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
