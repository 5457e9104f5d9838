"""`doctor`: what is here, what is missing and how to get it. It runs when things are broken, so it
wants nothing but torch."""

import importlib.metadata
import json
import platform
import shutil
import warnings
from typing import Any

import torch

from lora_kernels._version import __version__
from lora_kernels.ops import FallbackWarning, explain, lora_linear, missing_backends
from lora_kernels.ops.launch import cuda_build, refuse_device

PACKAGES = ("torch", "triton", "peft", "transformers", "safetensors", "pybind11")
TOOLS = ("c++", "cmake", "ninja", "nvcc")
BOUNDS = {"cpu": 1e-6, "cuda": 5e-3}  # a GPU may take float32 products in TF32


def doctor(as_json: bool = False) -> int:
    """Prints what `examine` found; 0 if every checked forward was right."""
    found = examine()
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else report_text(found))
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """Versions, tools, processor and GPU; each backend and why it is absent; one forward on each
    device against float64."""
    forwards = [forward(device) for device in ("cpu", "cuda") if device == "cpu" or torch.cuda.is_available()]
    return {
        "lora_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": backends(),
        "forwards": forwards,
        "ok": all(found["right"] for found in forwards),
    }


def backends() -> dict[str, dict[str, Any]]:
    """Of each backend whether it can run here, and what there is to say of it."""
    missing = missing_backends()
    found = {"reference": {"runs": True, "what": "any device, in plain PyTorch"}}
    if "cpu" in missing:
        found["cpu"] = {"runs": False, "what": missing["cpu"]}
    else:
        from lora_kernels import _cpu

        found["cpu"] = {"runs": True, "what": f"instruction set {_cpu.level()}, of {', '.join(_cpu.levels())}"}
    elsewhere = refuse_device(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    build = cuda_build()
    reasons = {"triton": missing.get("triton"), "cuda": None if build.startswith("built for") else build}
    for name, reason in reasons.items():
        if reason is not None and reason == missing.get("cpu"):
            reason = "as cpu"
        no_gpu = None if torch.cuda.is_available() else "torch finds no GPU here"
        what = "; ".join(each for each in (no_gpu or elsewhere, reason or (build if name == "cuda" else None)) if each)
        found[name] = {"runs": elsewhere is None and reason is None, "what": what or "ready"}
    return found


def forward(device: str) -> dict[str, Any]:
    """One small forward: who ran it and its relative error against float64, or what it raised."""
    x, w, a, b = (torch.randn(shape).to(device) for shape in ((3, 20), (12, 20), (4, 20), (12, 4)))
    wide = [t.double() for t in (x, w, a, b)]
    exact = wide[0] @ wide[1].T + 0.5 * wide[0] @ wide[2].T @ wide[3].T
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)  # the list of backends has the reason
            told = explain(lora_linear, x, w, a, b, 0.5)
            error = ((lora_linear(x, w, a, b, 0.5) - exact).norm() / exact.norm()).item()
    except Exception as problem:  # which is what is asked
        return {"device": device, "by": None, "right": False, "raised": f"{type(problem).__name__}: {problem}"}
    by = ", ".join(d.chosen for d in told.decisions)
    return {"device": device, "by": by, "right": error < BOUNDS[device], "error": error}


def report_text(found: dict[str, Any]) -> str:
    """What `examine` found, for people."""
    lines = [f"lora_kernels {found['lora_kernels']}, Python {found['python']}, {found['platform']}"]
    lines += [f"  {name} {version or 'is not installed'}" for name, version in found["packages"].items()]
    lines += [f"  {tool}: {place or 'not on PATH'}" for tool, place in found["tools"].items()]
    lines.append(f"  threads {found['threads']}, CPU capability of torch {found['cpu']}")
    lines.append(f"  GPU: {found['gpu'] or 'none'}")
    lines += [f"  backend {name}: {'' if b['runs'] else 'absent: '}{b['what']}" for name, b in found["backends"].items()]
    for each in found["forwards"]:
        said = each["raised"] if "raised" in each else f"relative error {each['error']:.1e} against float64, by {each['by']}"
        lines.append(f"{'OK' if each['right'] else 'WRONG'}: lora_linear on {each['device']}: {said}")
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
