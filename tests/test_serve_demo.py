"""`python -m lora_kernels serve-demo`; CI runs all of it, here are its workloads."""

import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

DEMO = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "demo" / "serve.py"))


@pytest.mark.parametrize(("kind", "counts"), [("distinct", [1] * 32), ("uniform", [6, 6, 5, 5, 5, 5]), ("identical", [32])])
def test_popularity(kind, counts):
    assert sorted(Counter(DEMO["workload"](kind, 32, 32)).values(), reverse=True) == counts


def test_skewed_workload():
    found = Counter(DEMO["workload"]("skewed", 4000, 32))
    assert found[0] / found[1] == pytest.approx(1.5, rel=0.1) and found[1] / found[2] == pytest.approx(1.5, rel=0.1)


def test_no_more_adapters_than_there_are():
    for kind in DEMO["WORKLOADS"]:
        assert set(DEMO["workload"](kind, 20, 3)) <= {0, 1, 2}


def test_bad_option_is_refused():
    command = [sys.executable, "-m", "lora_kernels", "serve-demo", "--requests", "1"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and ("--requests: wanted at least 2" in ran.stderr or "is not installed" in ran.stdout)
