"""Every Triton that was tried, besides the one installed: downloaded once, into .venv/tritons."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed here (requirements-dev.txt has it for Linux on x86-64)")

import triton

from lora_kernels.testing.gates.versions import installed
from lora_kernels.testing.triton_versions import TRIED

ROOT = Path(__file__).parents[2]
# a version that is not where it was looked for must not pass for another
RUN = "import sys, pytest, triton; assert triton.__version__ == sys.argv[1], triton; sys.exit(pytest.main(sys.argv[2:]))"


@pytest.mark.slow
@pytest.mark.parametrize("version", [version for version in TRIED if version != triton.__version__])
def test_version(version):
    files = [str(Path(__file__).with_name(name)) for name in ("test_interpreter.py", "test_triton.py")]
    ops = ROOT / "tests" / "ops"
    files += [str(ops / name) for name in ("test_simulated.py", "test_simulated_sm90.py", "test_maps.py")]
    environment = os.environ | {"PYTHONPATH": str(installed(version))}
    command = [sys.executable, "-c", RUN, version, "-p", "no:cacheprovider", "--tb=short", *files]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"triton {version}:\n" + "\n".join((run.stdout + run.stderr).splitlines()[-40:])
