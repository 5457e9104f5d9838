"""What a run needs, looked at in a second before it begins, and said in words."""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "triton", "numpy", "safetensors", "peft", "transformers")
# of the ptxas for sm_90: those before reuse wgmma's registers too early
FIRST_SOUND_PTXAS = (13, 3)


def missing(package: str) -> str | None:
    """Why a package is not there; None if it is."""
    return None if find_spec(package) else f"{package} is not installed"


def report_requirements(dry: bool = False) -> list[str]:
    """What is there, printed; what is not, with what will not run for it."""
    words = []
    for name in NEEDED:
        try:
            words.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            words.append(f"{name} is not installed: what needs it will fail")
    if gone := missing("matplotlib"):
        words.append(f"{gone}: no picture")
    if not list((ROOT / "lora_kernels").glob(f"_cuda.*{sys.implementation.cache_tag.split('-')[-1]}*.so")):
        words.append(
            "lora_kernels._cuda is not built: " + ("nvcc is there" if nvcc_path() else "and there is no nvcc: no CUDA C++")
        )
    if not dry and not shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin"):
        words.append("compute-sanitizer is not there")
    for name, environment in assemblers().items():
        words.append(f"assembler: {name} ({environment.get('TRITON_PTXAS_PATH') or 'of Triton'})")
    if len(assemblers()) == 1:
        least = ".".join(map(str, FIRST_SOUND_PTXAS))
        words.append(f"no ptxas from {least} on: the witness runs by one assembler; BENCH_PTXAS names another")
    print("\n".join(f"    {each}" for each in words), flush=True)
    return words


def nvcc_path() -> str | None:
    return os.environ.get("LORA_KERNELS_NVCC") or shutil.which("nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")


def build_cuda_module(seconds: float) -> list[str]:
    """Builds _cuda for the GPU that is here, without a network, if it is not there and nvcc is;
    says how that went."""
    # in a process of its own: a module that could not be imported here would still be missing after
    # its build
    asked = "from lora_kernels.ops import launch; print(launch._no_cuda or '')"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False, cwd=ROOT)
    if said.returncode == 0 and not said.stdout.strip():
        return []
    if nvcc_path() is None:
        return ["lora_kernels._cuda was not built: no nvcc"]
    import torch

    major, minor = torch.cuda.get_device_capability()
    print("building lora_kernels._cuda", flush=True)
    there = any((ROOT / "lora_kernels").glob("_cpu.*.so"))
    environment = {
        **os.environ, "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "LORA_KERNELS_CPU": "0" if there else "auto",
        "LORA_KERNELS_CUDA": "1", "LORA_KERNELS_NVCC": nvcc_path() or "",
    }  # fmt: skip
    # beside the tree: in place, the modules that are not built again would be taken away
    with tempfile.TemporaryDirectory() as folder:
        places = ["--build-lib", f"{folder}/lib", "--build-temp", f"{folder}/temp"]
        words = [sys.executable, "setup.py", "--quiet", "build_ext", *places]
        try:
            done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=seconds)
        except subprocess.TimeoutExpired:
            return [f"lora_kernels._cuda was not built: no end within {seconds:.0f} s"]
        if done.returncode:
            return [f"lora_kernels._cuda was not built: {(done.stdout + done.stderr)[-800:]}"]
        for path in Path(folder).glob("lib/lora_kernels/*.so"):
            shutil.copy(path, ROOT / "lora_kernels")
    return [f"lora_kernels._cuda was built here for sm_{major}{minor}"]


def assemblers() -> dict[str, dict[str, str | None]]:
    """By name: the environment with which Triton takes its own ptxas for sm_90, and one from
    FIRST_SOUND_PTXAS on if there is one: that of BENCH_PTXAS or TRITON_PTXAS_PATH, or what Triton
    has for later GPUs."""
    found: dict[str, dict[str, str | None]] = {"bundled": {"TRITON_PTXAS_PATH": None}}
    spec = find_spec("triton")
    places = [os.environ.get("BENCH_PTXAS", ""), os.environ.get("TRITON_PTXAS_PATH", "")]
    if spec and spec.submodule_search_locations:
        places.append(str(Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "ptxas-blackwell"))
    for place in places:
        number = release(place) if place else ()
        if number >= FIRST_SOUND_PTXAS:
            found[".".join(map(str, number))] = {"TRITON_PTXAS_PATH": place}
            if spec and tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
                # from then on Triton itself gives those of CUDA 13 this option, around a fault of
                # theirs
                found[".".join(map(str, number))]["PTXAS_OPTIONS"] = "--regAllocOptLevel=2"
            break
    return found


def release(path: str) -> tuple[int, ...]:
    """The version of a ptxas; () if it does not run."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ()
    at = said.partition(", V")[2].split("\n")[0].strip()
    return tuple(int(each) for each in at.split(".") if each.isdigit())


def assembler() -> str:
    """The version of the ptxas that Triton takes for sm_90; "" without one."""
    try:
        from triton import knobs

        return ".".join(map(str, release(knobs.nvidia.ptxas.path)))
    except (ImportError, RuntimeError):
        return ""
