"""Builds the CPU kernels with AddressSanitizer (and that of undefined behaviour) and with
ThreadSanitizer, runs every kernel under each, plants bugs that each must find, and runs tests of
the ops on the first build. Exits with 1 on any report, and where a planted bug stays unfound.

    python -m tests.sanitize           all of it
    python -m tests.sanitize --plant   only the planted bugs
"""

import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
# short ones, which reach every kernel through the bindings, and whose threads replace memory in use
TESTS = ["tests/ops/test_cpu_levels.py", "tests/ops/test_threads.py"]


def run(name: str, *command: str, **variables: str) -> None:
    """Runs a command and says what it took; exits with its output if it fails."""
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, errors="replace")
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        sys.exit("\n".join([*lines[-60:], f"sanitize: {name}: failed with {done.returncode}"]))
    print(f"  {name}: {lines[-1] if lines else 'done'} ({time.monotonic() - begin:.0f} s)", flush=True)


def build(sanitizer: str, *targets: str) -> Path:
    folder = ROOT / "build" / "sanitize" / sanitizer
    options = [f"-DLK_SANITIZE={sanitizer}", "-DLK_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    options += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'python'}"]
    run(f"{sanitizer}, configure", "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    run(f"{sanitizer}, build", "cmake", "--build", str(folder), "--parallel", jobs, "--target", *targets)
    return folder


def library(name: str) -> str:
    return subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()


def same_addresses() -> list[str]:
    """What runs a program without random addresses, where it may: ThreadSanitizer wants its shadow
    where they may lie."""
    command = ["setarch", platform.machine(), "-R"]
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []


def main() -> None:
    planted_only = sys.argv[1:] == ["--plant"]
    if sys.argv[1:] and not planted_only:
        sys.exit(f"sanitize: only --plant is known, found {' '.join(sys.argv[1:])}")
    folder = build("thread", "kernels")
    # what a driver does keeps half of two cores busy: the other build goes beside it
    with ThreadPoolExecutor(1) as beside:
        thread = beside.submit(look, "thread", folder, planted_only)
        folder = build("address", "kernels", *([] if planted_only else ["_cpu"]))
        look("address", folder, planted_only)
        thread.result()


def look(sanitizer: str, folder: Path, planted_only: bool) -> None:
    driver = [str(folder / "tests" / "sanitize" / "kernels")]
    if sanitizer == "thread":
        driver = [*same_addresses(), *driver]
    run(f"{sanitizer}, planted bugs", *driver, "--plant")
    if planted_only:
        return
    run(f"{sanitizer}, kernels", *driver)
    if sanitizer == "address":
        # first of all libraries, since Python was built without it; then the one that throws
        # exceptions, which it watches. What Python and torch never free is not looked at
        module = next((folder / "python").glob("_cpu*.so"))
        run(
            "address, tests of the ops", sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p",
            "tests.sanitize.instrumented", *TESTS, LK_SANITIZED=str(module), PYTHONPATH=str(ROOT),
            LD_PRELOAD=f"{library('libasan.so')} {library('libstdc++.so')}", ASAN_OPTIONS="detect_leaks=0",
            OMP_WAIT_POLICY="passive",
        )  # fmt: skip


if __name__ == "__main__":
    main()
