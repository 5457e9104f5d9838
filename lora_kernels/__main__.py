"""`python -m lora_kernels doctor`: what is here, what is missing and why. `tune`: times the kernels on the GPU that is here.
`serve-demo`: many adapters over one model."""

import argparse
import importlib.metadata
import platform
import runpy
import shutil
import sys
from pathlib import Path

import torch

import lora_kernels
from lora_kernels.ops import explain, lora_linear, missing_backends, tables, tuning
from lora_kernels.ops.launch import cuda_build


def doctor() -> int:
    """Prints versions, backends and one checked forward; 0 if it is right."""
    print(f"lora_kernels {lora_kernels.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "triton", "peft", "transformers", "safetensors", "pybind11"):
        try:
            print(f"  {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name} is not installed")
    for tool in ("c++", "cmake", "nvcc"):
        print(f"  {tool}: {shutil.which(tool) or 'not on PATH'}")
    print(f"  threads {torch.get_num_threads()}, CPU capability of torch {torch.backends.cpu.get_cpu_capability()}")
    print(f"  GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    for backend, reason in missing_backends().items():
        if backend != "cuda":  # of which not every op has a kernel
            print(f"  backend {backend} is absent: {reason}")
    print(f"  backend cuda: {cuda_build()}")
    if "cpu" not in missing_backends():
        from lora_kernels import _cpu

        print(f"  backend cpu: instruction set {_cpu.level()}, of {', '.join(_cpu.levels())}")
    x, w, a, b = (torch.randn(shape) for shape in ((3, 20), (12, 20), (4, 20), (12, 4)))
    print(explain(lora_linear, x, w, a, b, 0.5))
    wide = [t.double() for t in (x, w, a, b)]
    exact = wide[0] @ wide[1].T + 0.5 * wide[0] @ wide[2].T @ wide[3].T
    error = ((lora_linear(x, w, a, b, 0.5) - exact).norm() / exact.norm()).item()
    right = error < 1e-6
    print(f"{'OK' if right else 'WRONG'}: relative error {error:.1e} against float64")
    return 0 if right else 1


def tune(arguments: list[str]) -> int:
    """Times the ways to compute common layers and keeps the fastest for this user; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m lora_kernels tune", description=tune.__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long it may take (60)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layer", action="append", metavar="INxOUT", help="such a layer, e.g. 4096x11008; may be repeated")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: it measures on a GPU, and torch finds none here; nothing was written", file=sys.stderr)
        return 2
    layers = [tuple(map(int, layer.split("x"))) for layer in options.layer or []] or tuning.LAYERS
    problems = tuning.usual(getattr(torch, options.dtype), options.rank, layers)
    found = tuning.tune(problems, "cuda", options.seconds)
    print(*tuning.words(found), sep="\n")
    print(f"{len(found)} of {len(problems)} measured, in {tables.place(torch.cuda.get_device_name())}")
    return 0


def serve_demo(arguments: list[str]) -> int:
    """Runs examples/demo/serve.py, which a checkout of the repository has; its exit status."""
    script = Path(lora_kernels.__file__).parents[1] / "examples" / "demo" / "serve.py"
    if not script.is_file():
        print(f"serve-demo: {script} is not here; a checkout of the repository has it", file=sys.stderr)
        return 2
    return int(runpy.run_path(str(script))["main"](arguments))


if __name__ == "__main__":
    if sys.argv[1:] == ["doctor"]:
        sys.exit(doctor())
    if sys.argv[1:2] == ["serve-demo"]:
        sys.exit(serve_demo(sys.argv[2:]))
    if sys.argv[1:2] == ["tune"]:
        sys.exit(tune(sys.argv[2:]))
    print("usage: python -m lora_kernels doctor | tune [--help] | serve-demo [--quick]", file=sys.stderr)
    sys.exit(2)
