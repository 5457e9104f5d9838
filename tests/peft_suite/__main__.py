"""PEFT's own tests on fused layers: which share of the calls of LoRA layers is fast, and why the
others are not. Fails if a test fails on fused layers alone, or if the share is below the minimum.

    python -m tests.peft_suite             the files in files.py
    python -m tests.peft_suite FILE...     these of PEFT's test files, without the minimum
    -n N                                   processes (2)
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.peft_suite.files import CHEAPER, KNOWN, LEFT_OUT, MINIMUM, RUN

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "peft_suite"
FAST = "fast"


def unpacked() -> Path:
    """The folder of PEFT's source distribution, of the version that is installed; downloads it on
    the first call."""
    import peft

    source = FOLDER / f"peft-{peft.__version__}"
    if not (source / "tests" / "__init__.py").exists():
        archive = FOLDER / f"{source.name}.tar.gz"
        if not archive.exists():
            wanted = [f"peft=={peft.__version__}", "--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", str(FOLDER), *wanted], check=True)
        with tarfile.open(archive) as file:
            file.extractall(FOLDER, filter="data")
        (source / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        (source / "tests" / "__init__.py").touch()
    return source


def check_files(source: Path) -> None:
    """Every file of PEFT's that speaks of LoRA is run or left out by name."""
    found = {file.name for file in (source / "tests").glob("test_*.py") if "LoraConfig" in file.read_text("utf-8")}
    if unnamed := found - {*RUN, *LEFT_OUT}:
        sys.exit(f"peft_suite: files.py neither runs nor leaves out {', '.join(sorted(unnamed))}")


class Outcome(NamedTuple):
    """What a run of PEFT's tests gave."""

    calls: Counter[str]
    failed: list[str]
    summary: str
    """pytest's last line."""


def run_tests(source: Path, out: Path, tests: list[str], processes: int, stock: bool = False) -> Outcome:
    """Runs these of PEFT's tests on fused layers or on stock ones."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.json"):
        old.unlink()
    paths = [str(ROOT), str(Path(__file__).parent), str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
    # models of the hub are wanted from a folder that has none, whatever this machine has
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "HF_HOME": str(FOLDER / "hub"),
        "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "LK_SUITE_OUT": str(out), "LK_SUITE_STOCK": "1" if stock else "",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "lora_calls", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += ["-n", str(processes)] if processes > 1 else []
    done = subprocess.run([*command, *tests], cwd=source, env=environment, capture_output=True, text=True, errors="replace")
    (out / "log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode not in (0, 1):
        sys.exit(f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}\npeft_suite: pytest ended with {done.returncode}")
    found = [json.loads(file.read_text("utf-8")) for file in out.glob("*.json")]
    calls = sum((Counter(each["calls"]) for each in found), Counter())
    # with several processes their controller sees each failure, too
    failed = sorted({name for each in found for name in each["failed"]})
    return Outcome(calls, failed, done.stdout.strip().splitlines()[-1].strip("= "))


def failed_on_fused_alone(source: Path, failed: list[str]) -> list[str]:
    """Those of them that are not known to fail and that pass on stock layers."""
    left = [name for name in failed if name not in KNOWN]
    if not left:
        return []
    stock = run_tests(source, FOLDER / "stock", left, 1, stock=True)
    return [name for name in left if name not in stock.failed]


def fast_share(calls: Counter[str]) -> float:
    """The share of the fast ones among those that PEFT's forward does not compute faster."""
    total = sum(count for how, count in calls.items() if not how.endswith(CHEAPER))
    return calls[FAST] / total if total else 0.0


def table(calls: Counter[str]) -> str:
    """A line for each reason, the most frequent first."""
    total = sum(calls.values())
    lines = [f"{calls[FAST]:7} {calls[FAST] / total:6.1%}  fast"] if total else ["no call had arithmetic to do"]
    return "\n".join(
        lines + [f"{count:7} {count / total:6.1%}  PEFT's: {why}" for why, count in calls.most_common() if why != FAST]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.peft_suite")
    parser.add_argument("files", nargs="*", metavar="FILE", help="of PEFT's tests; those of files.py if none is given")
    parser.add_argument("-n", type=int, default=2, metavar="N", help="processes")
    options = parser.parse_args()
    source, begin = unpacked(), time.monotonic()
    check_files(source)
    outcome = run_tests(source, FOLDER / "fused", [f"tests/{name}" for name in options.files or RUN], options.n)
    alone = failed_on_fused_alone(source, outcome.failed)
    total = sum(outcome.calls.values())
    print(f"PEFT's tests on fused layers: {outcome.summary}")
    print(f"Calls of LoRA layers with arithmetic to do: {total}\n{table(outcome.calls)}")
    for name in outcome.failed:
        if name in KNOWN:
            print(f"known to differ: {name}: {KNOWN[name]}")
    for name in alone:
        print(f"FAILED on fused layers alone: {name}")
    share = fast_share(outcome.calls)
    print(f"Fast, but for those that PEFT's forward computes faster: {share:.1%}")
    below = not options.files and share < MINIMUM
    if below:
        print(f"FAILED: {share:.1%} of the calls are fast, wanted {MINIMUM:.0%}")
    print(f"{time.monotonic() - begin:.0f} s; pytest's output: {FOLDER / 'fused' / 'log'}")
    return int(bool(alone) or below)


if __name__ == "__main__":
    sys.exit(main())
