"""PEFT's own tests on fused layers: which share of the calls of LoRA layers is fast, and why the
others are not. Fails if a test fails on fused layers alone, or if the share is below the minimum.

    python -m tests.peft_suite             the files in files.py
    python -m tests.peft_suite FILE...     these of PEFT's test files, without the minimum
    -n N                                   processes (2)
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

from tests.peft_suite.files import KNOWN, LEFT_OUT, MINIMUM, RUN

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "peft_suite"
FAST = "fast"
_FAILED = re.compile(r"^(?:FAILED|ERROR) (?:tests/)?(\S+\.py\S*(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)


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


def run_tests(source: Path, out: Path, tests: list[str], processes: int, stock: bool = False) -> str:
    """The output of pytest over these of PEFT's tests, on fused layers or on stock ones."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.json"):
        old.unlink()
    paths = [str(ROOT), str(Path(__file__).parent), str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
    # models of the hub are wanted from a folder that has none, whatever this machine has
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "HF_HOME": str(FOLDER / "hub"),
        "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "LK_SUITE_OUT": str(out), "LK_SUITE_STOCK": "1" if stock else "",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "lora_calls", "-p", "no:cacheprovider", "-q", "--tb=short", "-rfE"]
    # a class's tests stay in one process: its fixtures are expensive, and some use one port
    command += ["-n", str(processes), "--dist", "loadscope"] if processes > 1 else []
    done = subprocess.run([*command, *tests], cwd=source, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode not in (0, 1):
        sys.exit(f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}\npeft_suite: pytest ended with {done.returncode}")
    (out / "log").write_text(done.stdout, encoding="utf-8")
    return done.stdout


def failures(output: str) -> list[str]:
    """The tests that pytest's summary names, as FILE::CLASS::TEST."""
    return _FAILED.findall(output)


def failed_on_fused_alone(source: Path, failed: list[str]) -> list[str]:
    """Those of them that are not known to fail and that pass on stock layers."""
    left = [name for name in failed if name not in KNOWN]
    if not left:
        return []
    stock = failures(run_tests(source, FOLDER / "stock", [f"tests/{name}" for name in left], 1, stock=True))
    return [name for name in left if name not in stock]


def summary(output: str) -> str:
    """pytest's last line."""
    return output.strip().splitlines()[-1].strip("= ")


def counts_in(out: Path) -> Counter[str]:
    """How the calls ran, of all processes."""
    calls: Counter[str] = Counter()
    for file in out.glob("*.json"):
        calls.update(json.loads(file.read_text("utf-8")))
    return calls


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
    out = FOLDER / "fused"
    output = run_tests(source, out, [f"tests/{name}" for name in options.files or RUN], options.n)
    calls = counts_in(out)
    alone = failed_on_fused_alone(source, failures(output))
    print(f"PEFT's tests on fused layers: {summary(output)}")
    print(f"Calls of LoRA layers with arithmetic to do: {sum(calls.values())}\n{table(calls)}")
    known = [name for name in failures(output) if name in KNOWN]
    print(*(f"known to differ: {name}: {KNOWN[name]}" for name in known), sep="\n")
    print(*(f"FAILED on fused layers alone: {name}" for name in alone), sep="\n", end="\n" * bool(alone))
    share = calls[FAST] / max(1, sum(calls.values()))
    below = not options.files and share < MINIMUM
    if below:
        print(f"FAILED: {share:.1%} of the calls are fast, wanted {MINIMUM:.0%}")
    print(f"{time.monotonic() - begin:.0f} s")
    return int(bool(alone) or below)


if __name__ == "__main__":
    sys.exit(main())
