"""Fine-tunes SmolLM2-135M-Instruct with LoRA and DoRA, with stock PEFT and with
`lora_kernels.fuse`, and compares them.

    python examples/demo/finetune.py            a few minutes on two cores
    python examples/demo/finetune.py --quick    under 90 seconds
    python examples/demo/finetune.py --base nf4 the linear layers in 4 bits (QLoRA), by bitsandbytes

Both models start from the same seed and step in turn on the same batches. The run fails (exit
status 1) if the two loss curves differ by more than rounding, if the held-out loss does not fall,
or if the saved adapter does not come back equal. Results: demo_out/summary.json,
demo_out/summary.png and one adapter folder per comparison.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

from rich.console import Console

METHODS = ("lora", "dora")
DTYPES = ("float32", "bfloat16")
BASES = ("dense", "nf4", "int8")


def main(argv: list[str] | None = None) -> int:
    """Runs the demo and returns its exit status: 0 all checks hold, 1 one does not, 2 something
    needed is missing."""
    start = time.perf_counter()
    options = parse_options(argv)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    # the weights are local, so no library may look for them elsewhere
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    sys.path.append(str(Path(__file__).parents[2]))  # for bench.palette

    import smollm2

    try:
        smollm2.check_packages(options.base)
    except smollm2.MissingPackageError as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        return 2

    import comparison  # only now: these import torch, transformers and peft, which takes seconds
    import summary
    import torch

    torch.set_num_threads(options.threads or torch.get_num_threads())
    with console.status("Loading the weights (the first time they are converted from GGUF, about half a minute)"):
        smollm2.converted()
    comparisons = [
        comparison.run_comparison(
            method, dtype, options.base, options.quick, options.steps, options.seed, options.out, console
        )
        for method in options.methods
        for dtype in options.dtypes
    ]
    result = {
        "quick": options.quick,
        "seed": options.seed,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "comparisons": comparisons,
        "passed": all(all(c["checks"].values()) for c in comparisons),
        "seconds": time.perf_counter() - start,
    }
    summary.write_summary(result, options.out)
    summary.print_summary(result, options.out, console)
    return 0 if result["passed"] else 1


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the options; a bad one ends the program with status 2 and a message."""
    parser = argparse.ArgumentParser(prog="finetune.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer layers, steps and tokens; under 90 seconds")
    parser.add_argument("--steps", type=int, help="optimizer steps of each comparison (at least 2)")
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="both", help="of the base weights")
    parser.add_argument("--base", choices=BASES, default="dense", help="how the base weights are kept; dense: in --dtype")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="both if not given; of an int8 base lora alone")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps: wanted at least 2 (the first warms up and is not timed), found {options.steps}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: wanted at least 1, found {options.threads}")
    options.dtypes = DTYPES if options.dtype == "both" else (options.dtype,)
    if options.base == "int8" and "dora" in (options.methods or ()):
        # bitsandbytes loses the scales once PEFT has read the weight for its norm
        parser.error("--methods: stock PEFT's DoRA raises over an int8 base on a CPU, so there is nothing to compare with")
    wanted = options.methods or (METHODS if options.base != "int8" else ("lora",))
    options.methods = [method for method in METHODS if method in wanted]
    return options


if __name__ == "__main__":
    sys.exit(main())
