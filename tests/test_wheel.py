"""A wheel of the package: its tags and files, and that it runs where it is installed. Nothing is
compiled."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from lora_kernels import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Of a copy of the sources, without the extensions."""
    copy = tmp_path_factory.mktemp("sources") / "repository"
    shutil.copytree(ROOT / "lora_kernels", copy / "lora_kernels", ignore=shutil.ignore_patterns("*.so", "*.txt", "__pycache__"))
    shutil.copytree(ROOT / "tests" / "nn", copy / "tests" / "nn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    environment = {**os.environ, "LORA_KERNELS_CPU": "0", "LORA_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [made] = (copy / "dist").iterdir()
    return made


def test_tags_and_files(wheel):
    """It is of one Python and one platform, whose extensions it may hold; it has what the package
    reads, and no tests."""
    version, python, abi, platform = wheel.stem.removeprefix("lora_kernels-").split("-")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert (version, python) == (__version__, tag) and abi.startswith(tag)
    assert platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"lora_kernels/py.typed", "lora_kernels/_cpu.pyi", "lora_kernels/_build_error.txt"} <= names
    for folder, pattern in (("lora_kernels", "*.py"), ("lora_kernels/ops/tables", "*.json")):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)} <= names
    assert not any(name.split("/")[0] in ("tests", "bench", "csrc") for name in names)


def test_it_runs_where_it_is_installed(wheel, tmp_path):
    """In an environment of its own, which has torch and the rest by a path to those that are
    here."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python" if os.name == "posix" else home / "Scripts" / "python.exe"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, capture_output=True, cwd=tmp_path)
    [package] = home.rglob("lora_kernels/__init__.py")
    (package.parents[1] / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = [python, "-W", "error", "-m", "lora_kernels", "doctor"]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "backend cpu: absent: not built: LORA_KERNELS_CPU=0 when the package was built" in done.stdout
    assert "\nOK: lora_linear on cpu: relative error " in done.stdout and done.stdout.endswith("by reference\n")
