"""`python -m bench.gpu`: everything that only a GPU can show, and where the results are.

    --dry-run    the same stages with CPU tensors in the simulator and tiny shapes: no times, nothing in bench/results
    --quick      fewer shapes and repetitions
    --only A B   these stages alone
    --out FILE   the JSON file; bench/results/<gpu>.json if not given, a temporary file in a dry run. A picture goes beside it

Each stage runs in a process of its own, because an access out of bounds leaves a process without its GPU, and says passed,
failed or not run. Exit status: 0, 1 if a stage failed, 2 without a GPU (nothing is written then).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

STAGES = ("environment", "correctness", "sanitizer", "determinism", "graphs", "speed")
ROOT = Path(__file__).parents[2]
SECONDS = 3 * 3600  # of one stage: a kernel that hangs must not hold the others


def main(argv: list[str] | None = None, here: bool = False) -> int:
    """The exit status. With `here` the stages run in this process."""
    parser = argparse.ArgumentParser(prog="bench.gpu")
    parser.add_argument("--dry-run", action="store_true", help="CPU tensors in the simulator, tiny shapes, no times")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--tiny", action="store_true", help="with --dry-run: hardly anything, for the test of this command")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # one stage, in the process made for it
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # what compute-sanitizer looks at
    options = parser.parse_args(argv)
    if options.tiny and not options.dry_run:
        parser.error("--tiny is for --dry-run")

    import torch

    from bench.gpu.setting import Setting

    if not options.dry_run and (not torch.cuda.is_available() or torch.version.hip is not None):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        print(
            f"bench.gpu: it needs an NVIDIA GPU and a torch built for it, and torch {torch.__version__}, with {built}, finds"
            " none here; nothing was written. --dry-run walks through it without one",
            file=sys.stderr,
        )
        return 2
    setting = Setting(options.dry_run, options.quick, options.tiny)
    if options.once:
        from bench.gpu.cases import once

        return once(setting)
    if options.stage:
        options.out.write_text(json.dumps(run(options.stage, setting)), encoding="utf-8")
        return 0

    from bench.gpu.environment import stamp

    circumstances = stamp(setting)
    found = {name: run(name, setting) if here else apart(name, setting) for name in STAGES if name in options.only}
    rows = [row for stage in found.values() for row in stage.pop("rows", [])]
    result = {"dry_run": setting.dry, "quick": setting.quick, "stamp": circumstances, "stages": found, "rows": rows}
    path = options.out or place(setting, circumstances["gpu"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, result)
    picture = drawn(result, path.with_suffix(".png"))
    if picture:
        found["picture"] = picture
        write(path, result)
    for name, stage in found.items():
        print(f"{name:12} {stage['status']:8} {stage['checked']} checks, {stage['failed']} failed", flush=True)
        for text in (*stage["failures"], *(f"not run: {reason}" for reason in summed(stage["not_run"]))):
            print(f"    {text.splitlines()[0][:300]}")
    print(path)
    return int(any(stage["status"] == "failed" for stage in found.values()))


def summed(reasons: list[str]) -> list[str]:
    """The first few, and how many more."""
    return reasons if len(reasons) <= 6 else [*reasons[:5], f"and {len(reasons) - 5} more, in the JSON file"]


def run(name: str, setting: Any) -> dict[str, Any]:
    """One stage in this process; what escapes from it is a failure of it."""
    from bench.gpu.setting import Found

    print(f"{name}:", flush=True)
    start = time.perf_counter()
    try:
        found = import_module(f"bench.gpu.{name}").stage(setting).plain()
    except Exception as error:
        broken = Found()
        broken.fail(f"the stage ended with {type(error).__name__}: {error}")
        found = broken.plain()
    return {**found, "wall_seconds": round(time.perf_counter() - start, 1)}


def apart(name: str, setting: Any) -> dict[str, Any]:
    """One stage in a process of its own."""
    from bench.gpu.setting import Found

    environment = dict(os.environ)
    if name != "speed":
        # torch refuses cuBLAS in its deterministic mode without it; it costs speed, which is therefore not measured under it
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    given = {"--dry-run": setting.dry, "--quick": setting.quick, "--tiny": setting.tiny}
    flags = [flag for flag, wanted in given.items() if wanted]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = [sys.executable, "-m", "bench.gpu", "--stage", name, "--out", str(file), *flags]
        try:
            status: object = subprocess.run(words, check=False, cwd=ROOT, env=environment, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            status = f"{SECONDS} seconds without an end"
        if file.is_file():
            # a context that a kernel broke may also fail as the process ends; what was found stands
            return json.loads(file.read_text(encoding="utf-8"))
    broken = Found()
    broken.fail(f"its process ended with {status} and left no result")
    return broken.plain()


def place(setting: Any, gpu: str) -> Path:
    """Where the JSON file goes if nobody says."""
    if setting.dry:
        return Path(tempfile.mkdtemp(prefix="bench-gpu-")) / "dry-run.json"
    return ROOT / "bench" / "results" / f"{kebab(gpu)}.json"


def kebab(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def drawn(result: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The picture; if it cannot be drawn, a stage that failed. Without times to draw, nothing."""
    from bench.gpu.plot import draw
    from bench.gpu.setting import Found

    if not any(row["op"] == "lora_linear" for row in result["rows"]):
        return None
    found = Found()
    found.check("picture", lambda: draw(result, path))
    return found.plain() if found.failures else None


if __name__ == "__main__":
    sys.exit(main())
