"""How the modules are built: which nvcc, which GPUs, and what is said where something is missing.
Nothing is compiled."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc, source_architecture

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
    assert {name: source_architecture(f"sm_{name}") for name in fronts} == fronts
    codes = [f"arch=compute_{seen},code=sm_{name}" for name, seen in fronts.items()]
    assert asked == [*codes, "arch=compute_90,code=compute_90"]
    assert "-cudart static" in command
    assert _codes_of_specialised(rules) == ["arch=compute_90a,code=sm_90a"]
    status, _, rules = configured("-DLK_CUDA=ON", "-DLK_CUDA_ARCHITECTURES=86", "-DLK_CUDA_PTX=", f"-DLK_NVCC={find_nvcc()}")
    # and is empty there
    assert status == 0 and _codes_of_specialised(rules) == ["arch=compute_80,code=sm_86"]


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
    assert setup_py().architectures() == options


def setup_py():
    spec = importlib.util.spec_from_file_location("setup_of_lora_kernels", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


@pytest.fixture
def built(tmp_path):
    """What setup.py leaves as its reason, with these programs alone on PATH."""

    def build(tools):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, place in tools.items():
            (folder / name).symlink_to(place)
        ours = ("CXX", "CC", "PYTHONPATH", "LORA_KERNELS")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        command = [sys.executable, ROOT / "setup.py", "build_ext", "-b", tmp_path / "lib", "-t", tmp_path / "temp"]
        environment = kept | {"PATH": str(folder), "LORA_KERNELS_CUDA": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        [note] = (tmp_path / "lib" / "lora_kernels").glob("_build_error.txt")
        assert not list((tmp_path / "lib" / "lora_kernels").glob("*.so"))
        return note.read_text(), done.stderr

    return build


@pytest.mark.parametrize(("tools", "reason"), [
    ({}, "no cmake: pip install cmake ninja"),
    ({"cmake": CMAKE}, "no ninja: pip install ninja"),
    ({"cmake": CMAKE, "ninja": NINJA}, "no C++17 compiler: apt install g++"),
])  # fmt: skip
def test_a_build_that_cannot_be_says_what_is_missing(built, tools, reason):
    if not (CMAKE and NINJA):
        pytest.skip("cmake and ninja build the package; requirements-dev.txt has both")
    if sys.platform == "darwin":
        reason = reason.replace("apt install g++", "xcode-select --install")
    note, told = built(tools)
    assert note == f"{reason}, then pip install --force-reinstall --no-deps .\n" and note.strip() in told


def test_a_build_into_the_sources_leaves_its_reason_there(tmp_path):
    """As `pip install -e .` does; modules of an older build go."""
    (tmp_path / "lora_kernels").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "lora_kernels/_version.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    old = [tmp_path / "lora_kernels" / f"{name}{suffix}" for name in ("_cpu", "_ptxsim", "_cuda")]
    for path in old:
        path.touch()
    environment = {"PATH": "", "LORA_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, env=environment, capture_output=True, check=True, cwd=tmp_path)
    notes = {path.name: path.read_text() for path in (tmp_path / "lora_kernels").glob("_*.txt")}
    assert notes["_build_error.txt"].startswith("no cmake: ") and not any(path.exists() for path in old)
    assert notes["_cuda_build_error.txt"] == "LORA_KERNELS_CUDA=0 when the package was built\n"


@pytest.mark.parametrize(("said", "linux", "mac"), [
    ("CMake Error at x.cmake:230 (message):\n  Could NOT find OpenMP_CXX (missing: OpenMP_CXX_FLAGS)",
     "no OpenMP: apt install libomp-dev", "no OpenMP: brew install libomp"),
    ("CMake Error at x.cmake:230 (message):\n  Could NOT find Python (missing: Python_INCLUDE_DIRS Development.Module)",
     "no Python headers: apt install python3-dev", "no Python headers: brew install python"),
    ('  The C++ compiler\n\n    "/usr/bin/c++"\n\n  is not able to compile a simple test program.',
     "no C++17 compiler: apt install g++", "no C++17 compiler: xcode-select --install"),
    ("python: No module named pybind11\nCMake Error at CMakeLists.txt:21", "no pybind11: pip install pybind11", None),
    ("g++: fatal error: Killed signal terminated program cc1plus", "too little memory: export MAX_JOBS=1", None),
])  # fmt: skip
def test_what_is_missing_in_words(said, linux, mac):
    why = setup_py().build_error_line
    for system, wanted in (("linux", linux), ("darwin", mac or linux)):
        assert why(said, system) == f"{wanted}, then pip install --force-reinstall --no-deps ."


def test_any_other_failure_is_its_first_error():
    why = setup_py().build_error_line
    said = "[1/9] Building\nsrc/a.cpp:3:1: error: 'foo' was not declared\nninja: build stopped: subcommand failed."
    assert why(said) == "src/a.cpp:3:1: error: 'foo' was not declared; `pip install -v .` says more"
    assert why("CMake Error at CMakeLists.txt:7 (message):\n  it is Monday\n") == "it is Monday; `pip install -v .` says more"
    assert why("\n".join(["all well", "then not"])).startswith("then not; ") and why("").startswith("no output; ")
    assert len(why("error: " + "x" * 10_000)) < 250


SAID = """
import importlib, warnings, sys
sys.modules["lora_kernels._cpu"] = None
from pathlib import Path
note, read, is_file = "no C++17 compiler: do this", Path.read_text, Path.is_file
Path.read_text = lambda self, **o: note if self.name == "_build_error.txt" else read(self, **o)
Path.is_file = lambda self: self.name == "_build_error.txt" or is_file(self)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import lora_kernels, torch
    x, w, a, b = (torch.randn(s).requires_grad_() for s in ((3, 8), (4, 8), (2, 8), (4, 2)))
    lora_kernels.lora_linear(x, w.detach(), a, b, 1.0).sum().backward()
    lora_kernels.weight_norm(w.detach(), a, b, 1.0)
print(*(f"{w.category.__name__}: {w.message}" for w in seen), sep=chr(10))
print(Path(seen[0].filename).name if seen else "")
"""


def test_a_missing_build_is_told_once_and_at_import():
    done = subprocess.run([sys.executable, "-c", SAID], capture_output=True, text=True, cwd=ROOT, check=True)
    told = "FallbackWarning: lora_kernels runs on the slow reference on CPUs. cpu: not built: no C++17 compiler: do this"
    assert done.stdout.splitlines() == [told, "<string>"]
    wanted = SAID.replace("no C++17 compiler: do this", "LORA_KERNELS_CPU=0 when the package was built")
    done = subprocess.run([sys.executable, "-c", wanted], capture_output=True, text=True, cwd=ROOT, check=True)
    [first, _] = done.stdout.splitlines()
    told = "FallbackWarning: lora_linear_forward runs on the slow reference. cpu: not built: LORA_KERNELS_CPU=0"
    assert first.startswith(told)
