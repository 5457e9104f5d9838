"""How the CUDA module is configured: which nvcc, which GPUs, and what is said where there is none. Nothing is compiled."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.testing.nvcc import MISSING, find_nvcc, front

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
NINJA = shutil.which("ninja", path=Path(sys.executable).parent) or shutil.which("ninja")


@pytest.fixture
def configured(tmp_path):
    if not (CMAKE and NINJA):
        pytest.skip("cmake and ninja build the package; requirements-dev.txt has both")

    def configure(*options):
        command = [CMAKE, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reason, rules = tmp_path / "no_cuda.txt", tmp_path / "build.ninja"
        why = reason.read_text() if reason.is_file() else None
        return done.returncode, why, rules.read_text() if rules.is_file() else ""

    return configure


def test_without_nvcc(configured, tmp_path):
    nothing = tmp_path / "nvcc"
    nothing.write_text("#!/bin/sh\necho not me\n")
    nothing.chmod(0o755)
    for wanted, fails in (("AUTO", False), ("ON", True)):
        status, why, rules = configured(f"-DLK_CUDA={wanted}", f"-DLK_NVCC={nothing}")
        assert (status != 0) == fails and why.startswith(f"{nothing} does not run") and "compute_80" not in rules


def test_the_gpus_that_are_asked_for(configured):
    if find_nvcc() is None:
        pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)")
    gpus = "-DLK_CUDA_ARCHITECTURES=86;90;100a;120", "-DLK_CUDA_PTX=90"
    status, why, rules = configured("-DLK_CUDA=ON", *gpus, f"-DLK_NVCC={find_nvcc()}")
    assert status == 0 and why is None
    command = next(line for line in rules.splitlines() if "cuda_small.cu" in line and "-gencode" in line)
    asked = [word for word in command.split() if word.startswith("arch=")]
    fronts = {"86": "80", "90": "90", "100a": "100a", "120": "90"}
    assert {name: front(f"sm_{name}") for name in fronts} == fronts
    codes = [f"arch=compute_{seen},code=sm_{name}" for name, seen in fronts.items()]
    assert asked == [*codes, "arch=compute_90,code=compute_90"]
    assert "-cudart static" in command
    assert _codes_of_specialised(rules) == ["arch=compute_90a,code=sm_90a"]
    status, _, rules = configured("-DLK_CUDA=ON", "-DLK_CUDA_ARCHITECTURES=86", "-DLK_CUDA_PTX=", f"-DLK_NVCC={find_nvcc()}")
    assert status == 0 and _codes_of_specialised(rules) == ["arch=compute_80,code=sm_86"]  # and is empty there


def _codes_of_specialised(rules):
    command = next(line for line in rules.splitlines() if "cuda_specialised_sm90a.cu" in line and "-gencode" in line)
    return [word for word in command.split() if word.startswith("arch=")]


@pytest.mark.parametrize(("given", "options"), [
    ("", []),
    ("native", []),
    ("8.0", ["-DLK_CUDA_ARCHITECTURES=80", "-DLK_CUDA_PTX="]),
    ("8.0;9.0+PTX", ["-DLK_CUDA_ARCHITECTURES=80;90", "-DLK_CUDA_PTX=90"]),
    ("8.6 10.0 12.0+PTX", ["-DLK_CUDA_ARCHITECTURES=86;100;120", "-DLK_CUDA_PTX=120"]),
])  # fmt: skip
def test_torchs_list_of_gpus(monkeypatch, given, options):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    spec = importlib.util.spec_from_file_location("setup_of_lora_kernels", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    assert setup.architectures() == options
