"""`python -m lora_kernels doctor`: what is here, what is missing and why."""

import importlib.metadata
import platform
import shutil
import sys

import torch

import lora_kernels
from lora_kernels.ops import explain, lora_linear, missing_backends
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


if __name__ == "__main__":
    if sys.argv[1:] != ["doctor"]:
        print("usage: python -m lora_kernels doctor", file=sys.stderr)
        sys.exit(2)
    sys.exit(doctor())
